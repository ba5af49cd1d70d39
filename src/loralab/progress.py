"""How long work tells what it does, without knowing where it is shown.

Owns the silent base; `cli` shows it on a terminal or as plain lines.
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
