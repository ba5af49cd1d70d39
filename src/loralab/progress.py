"""How long work tells what it does, without knowing where it is shown.

Owns the silent base and one that passes on progress alone; `cli` shows it on a terminal or as plain lines.
"""


class Reporter:
    """Receives what long work has to say; this one stays silent."""

    def say(self, text: str) -> None:
        """Take one line about a choice or a finished stage."""

    def progress(self, label: str, done: int, total: int | None, *, detail: str = "") -> None:
        """Take the state of a stage.

        Args:
            label: name of the stage.
            done: units done so far.
            total: units in all, or None where that is not known.
            detail: figures to show beside, such as the loss.
        """

    def finish(self, label: str) -> None:
        """Take the end of a stage."""


class ProgressOnly(Reporter):
    """Passes on how far work is, under a name of its own, and nothing that it says.

    Args:
        reporter: told of it.
        label: what the work is for.
    """

    def __init__(self, reporter: Reporter, label: str) -> None:
        self._reporter = reporter
        self._label = label

    def progress(self, label: str, done: int, total: int | None, *, detail: str = "") -> None:
        """Take the state of a stage."""
        self._reporter.progress(f"{self._label}: {label}", done, total, detail=detail)

    def finish(self, label: str) -> None:
        """Take the end of a stage."""
        self._reporter.finish(f"{self._label}: {label}")
