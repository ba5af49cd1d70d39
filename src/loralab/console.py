"""What a person sees on the terminal: progress, lines, tables.

Owns the console's form. Everything but results goes to stderr, so that stdout can be piped.
"""

import sys
import time
from typing import ClassVar

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from loralab.progress import Reporter

# Where there is no terminal, a stage says how far it is at most this often.
_PLAIN_SECONDS = 10.0
_BAR_WIDTH = 24


class ConsoleReporter(Reporter):
    """Shows a live line per stage on a terminal, plain lines elsewhere."""

    # One terminal, one live line: whoever reports an error must be able to end it.
    _live: ClassVar[Live | None] = None

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr, highlight=False)
        self._started: dict[str, float] = {}
        self._said: dict[str, float] = {}

    def say(self, text: str) -> None:
        """Print a line above the live one."""
        self.console.print(escape(text), soft_wrap=True)

    def progress(self, label: str, done: int, total: int | None, *, detail: str = "") -> None:
        """Show the state of a stage."""
        now = time.monotonic()
        started = self._started.setdefault(label, now)
        line = _progress_line(label, done, total, now - started, detail)
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
        return f"{label}: {done:,} rows"
    filled = int(_BAR_WIDTH * done / total)
    bar = "█" * filled + "░" * (_BAR_WIDTH - filled)
    left = f", {_clock(seconds / done * (total - done))} left" if 0 < done < total else ""
    return f"{label} {bar} {done:,}/{total:,}{left}{', ' + detail if detail else ''}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
