"""Where the turns of a chat come from: a terminal or a pipe, one line or several.

Owns reading lines, the marks that join them to one turn, and the history of the arrow keys.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from loralab.config.paths import local_path
from loralab.console import printable
from loralab.errors import DataError
from loralab.workflows.dialogue import Turn
from loralab.workflows.prompts import readable_input

BLOCK = '"""'
_GOES_ON = "\\"
_NEXT_LINE = "... "
_HISTORY_LINES = 1000


class TurnReader:
    """Reads turns from lines: a backslash at the end joins the next line, triple quotes hold several.

    Args:
        read_line: shows a prompt and returns the next line without its end, or None behind the last.
        numbered: whether errors name the line, as in a file.
    """

    def __init__(self, read_line: Callable[[str], str | None], *, numbered: bool) -> None:
        self._read_line = read_line
        self._numbered = numbered
        self._line = 0

    def __call__(self, prompt: str) -> Turn | None:
        """Return the next turn, or None at the end of the input.

        Raises:
            DataError: the input ends within triple quotes.
        """
        line = self._next(prompt)
        if line is None:
            return None
        where = f"standard input, line {self._line}" if self._numbered else "your turn"
        if line.startswith(BLOCK):
            return Turn(self._block(line.removeprefix(BLOCK), where), where, literal=True)
        pasted = "\n" in line  # several lines that came as one are a text, whatever it begins with
        lines = []
        while line is not None and line.endswith(_GOES_ON):
            lines.append(line.removesuffix(_GOES_ON))
            line = self._next(_NEXT_LINE)
        return Turn("\n".join([*lines, *([] if line is None else [line])]), where, literal=pasted)

    def _block(self, first: str, where: str) -> str:
        lines: list[str] = []
        line: str | None = first
        while line is not None and not line.rstrip().endswith(BLOCK):
            lines.append(line)
            line = self._next(_NEXT_LINE)
        if line is None:
            raise DataError(
                f"a text that {BLOCK} opened does not end",
                where=where,
                fix=f"close it with {BLOCK} at the end of a line",
            )
        lines.append(line.rstrip().removesuffix(BLOCK))
        # The marks may stand on lines of their own.
        return "\n".join(lines).removeprefix("\n").removesuffix("\n")

    def _next(self, prompt: str) -> str | None:
        self._line += 1
        return self._read_line(prompt)


def read_from(stdin: TextIO, prompts: TextIO | None) -> Callable[[str], str | None]:
    """Return a reader of lines, which shows its prompts on `prompts`, if anywhere."""

    def read_line(prompt: str) -> str | None:
        if prompts is None:
            with readable_input():
                line = stdin.readline()
        else:
            print(prompt, end="", file=prompts, flush=True)
            with readable_input(), _ending_line(prompts):
                line = stdin.readline()
            if not line:
                print(file=prompts)
        return line.removesuffix("\n") if line else None

    return read_line


def read_edited(prompt: str) -> str | None:
    """Read a line from the terminal, with the keys that edit it where there is readline."""
    try:
        with readable_input(), _ending_line(sys.stdout):
            return input(prompt)
    except EOFError:
        return None


@contextmanager
def _ending_line(screen: TextIO) -> Iterator[None]:
    """End the prompt's line where Ctrl-C or Ctrl-D has left it open."""
    try:
        yield
    except (EOFError, KeyboardInterrupt):
        print(file=screen)
        raise


def history_path() -> Path | None:
    """Return the file of earlier inputs, in the user's folder of states, or None without a home."""
    base = local_path(os.environ.get("XDG_STATE_HOME") or "~/.local/state")
    return None if base is None else base / "loralab" / "chat_history"


@contextmanager
def keeping_history(path: Path | None, note: Callable[[str], None]) -> Iterator[None]:
    """Give the arrow keys the inputs of earlier chats, and keep those of this one for later.

    The file is for its user alone: it holds what was typed.

    Args:
        path: the file; made where it does not exist.
        note: told where nothing can be kept.
    """
    try:
        import readline
    except ImportError:  # as on Windows; lines are then edited as the terminal does
        yield
        return
    usable = path is not None and _load_history(path, readline.read_history_file, note)
    known = readline.get_current_history_length()
    try:
        yield
    finally:
        if path is not None and usable:
            readline.set_history_length(_HISTORY_LINES)
            new = readline.get_current_history_length() - known
            try:
                if hasattr(readline, "append_history_file"):  # so that two chats do not overwrite each other's
                    readline.append_history_file(new, path)
                else:
                    readline.write_history_file(path)
                path.chmod(0o600)
            except OSError as error:
                note(f"the input history is not kept: {error}")


def _load_history(path: Path, load: Callable[[Path], None], note: Callable[[str], None]) -> bool:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.chmod(0o600)
        if path.stat().st_size:  # editline takes an empty file for a broken one
            load(path)
    except OSError as error:
        note(f"the input history is not kept: {error}")
        return False
    return True


def write_answer(text: str) -> None:
    """Print a piece of an answer at once."""
    print(printable(text), end="", flush=True)


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a person sits at a stream."""
    return stream is not None and stream.isatty()


def turn_reader() -> TurnReader:
    """Return the reader of standard input, as it is."""
    if sys.stdin is None:
        return TurnReader(lambda _: None, numbered=True)
    if not sys.stdin.isatty():
        return TurnReader(read_from(sys.stdin, None), numbered=True)
    if is_terminal(sys.stdout):
        return TurnReader(read_edited, numbered=False)
    return TurnReader(read_from(sys.stdin, sys.stderr), numbered=False)  # stdout is for the answers
