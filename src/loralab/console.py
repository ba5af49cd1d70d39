"""What a person sees on the terminal: progress, lines, tables.

Owns the console's form, and what happens where a stream is closed or knows few characters.
Everything but results goes to stderr, so that stdout can be piped.
"""

import os
import select
import sys
import time
from typing import ClassVar, TextIO

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from loralab.config.distributed_checks import LAUNCHER_VARIABLE
from loralab.errors import LoralabError, WorkerError
from loralab.progress import Reporter

# Where there is no terminal, a stage says how far it is at most this often.
_PLAIN_SECONDS = 10.0
_BAR_WIDTH = 24


class ClosedOutput(Exception):
    """Whoever read stdout has closed it, as `head` does."""


class ResultConsole(Console):
    """Prints tables on stdout."""

    def on_broken_pipe(self) -> None:
        """Say that stdout is closed.

        Raises:
            ClosedOutput: always.
        """
        raise ClosedOutput


class _NoteConsole(Console):
    """Prints notes on stderr; a run does not end because nobody reads them."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Let a closed stream swallow what is still written to it, at the end of Python too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def nobody_reads(stream: TextIO) -> bool:
    """Return whether the other end of the pipe that a stream writes to is closed."""
    if not hasattr(select, "poll"):  # Windows; a broken pipe is then taken for the stream's
        return True
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)  # errors are reported unasked
    except (OSError, ValueError):
        return False
    return bool(poll.poll(0))


def tolerate_characters() -> None:
    """Write what stdout and stderr cannot encode as replacement characters, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)  # streams that tests put there have none
        if reconfigure is not None:
            reconfigure(errors="replace")


# A terminal obeys control characters; a model's answer must not move the cursor or set the clipboard.
_CONTROLS = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "\N{SYMBOL FOR DELETE}",
    **dict.fromkeys(range(0x80, 0xA0), "\N{REPLACEMENT CHARACTER}"),
}


def printable(text: str, stream: TextIO | None = None) -> str:
    """Return text from elsewhere as a stream may show it: on a terminal, control characters as pictures.

    Args:
        text: any.
        stream: where it goes; None is stdout.
    """
    shown = sys.stdout if stream is None else stream
    return text.translate(_CONTROLS) if shown is not None and shown.isatty() else text


def speaks(error: LoralabError | None = None) -> bool:
    """Return whether this process tells the user something, as one of those that a launcher started.

    The first one speaks for all. That it is gone, the others must say; and to `loralab launch`, which keeps it, why
    they ended.

    Args:
        error: what is to be told, or None for a result.
    """
    rank, count = (os.environ.get(name, "").strip() for name in ("RANK", "WORLD_SIZE"))
    if not (rank.isdecimal() and count.isdecimal() and 0 < int(rank) < int(count)):
        return True
    return isinstance(error, WorkerError) or (error is not None and LAUNCHER_VARIABLE in os.environ)


class ConsoleReporter(Reporter):
    """Shows a live line per stage on a terminal, plain lines elsewhere."""

    # One terminal, one live line: whoever reports an error must be able to end it.
    _live: ClassVar[Live | None] = None

    def __init__(self) -> None:
        self.console = _NoteConsole(file=sys.stderr, highlight=False)
        self._started: dict[str, float] = {}
        self._said: dict[str, float] = {}

    def say(self, text: str) -> None:
        """Print a line above the live one."""
        shown = text.translate(_CONTROLS) if self.console.is_terminal else text
        self.console.print(escape(shown), soft_wrap=True)

    def progress(self, label: str, done: int, total: int | None, *, detail: str = "") -> None:
        """Show the state of a stage."""
        now = time.monotonic()
        started = self._started.setdefault(label, now)
        line = _progress_line(label, done, total, now - started, detail)
        if self.console.options.ascii_only:
            line = line.replace("█", "#").replace("░", ".")
        if self.console.is_terminal:
            if ConsoleReporter._live is None:
                ConsoleReporter._live = Live(console=self.console, auto_refresh=False, transient=True)
                ConsoleReporter._live.start()
            if now - self._said.get(label, 0.0) > 0.1 or done == total:
                self._said[label] = now
                ConsoleReporter._live.update(Text(line), refresh=True)
            return
        if now - self._said.setdefault(label, started) >= _PLAIN_SECONDS or (total is not None and done == total):
            self._said[label] = now
            self.console.print(escape(line), soft_wrap=True)

    def finish(self, label: str) -> None:
        """Close the live line."""
        self._started.pop(label, None)
        self._said.pop(label, None)
        self.close()

    @classmethod
    def close(cls) -> None:
        """End the live line, if there is one."""
        if ConsoleReporter._live is not None:
            ConsoleReporter._live.stop()
            ConsoleReporter._live = None


def _progress_line(label: str, done: int, total: int | None, seconds: float, detail: str) -> str:
    if not total:
        return f"{label}: {done:,} rows{', ' + detail if detail else ''}"
    filled = int(_BAR_WIDTH * done / total)
    bar = "█" * filled + "░" * (_BAR_WIDTH - filled)
    left = f", {_clock(seconds / done * (total - done))} left" if 0 < done < total else ""
    return f"{label} {bar} {done:,}/{total:,}{left}{', ' + detail if detail else ''}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
