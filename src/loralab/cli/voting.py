"""Voting in the terminal: one pair after the other, a key and Enter for each.

Owns what is shown and asked. Votes are the sitting's; nothing here knows which side is which.
"""

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from loralab.cli.terminal import is_terminal, read_edited, read_from
from loralab.console import printable
from loralab.errors import JudgingError
from loralab.judging.sitting import BlindPair, Choice, Sitting
from loralab.judging.votes import LONGEST_SECONDS

CHOICES: dict[str, Choice] = {"a": "left", "b": "right", "t": "tie", "n": "both_bad"}
KEYS = "a: A is better, b: B is better, t: about the same, n: neither is good, u: back, s: skip, q: go on later"
END_KEYS = "y: close it and show the names, n or q: leave it open, u: back to the last pair"
_LETTERS = {choice: key for key, choice in CHOICES.items()}


class TerminalVoting:
    """A sitting in the terminal.

    Args:
        sitting: what is voted on.
        read_line: shows a prompt and returns the next line without its end, or None behind the last.
        screen: where pairs are shown.
        person: whether somebody sits there: times are taken, and an unknown key is asked for again.
    """

    def __init__(
        self, sitting: Sitting, *, read_line: Callable[[str], str | None], screen: TextIO, person: bool
    ) -> None:
        self._sitting = sitting
        self._read_line = read_line
        self._screen = screen
        self._person = person
        self._line = 0
        answers = sitting.answers
        self._pairs = {pair.item: pair for pair in sitting.pairs}
        self._open = deque(item for item in self._pairs if item not in answers)
        self._done = list(answers)

    def hold(self) -> None:
        """Ask for pair after pair, until the sitting is closed or left.

        Raises:
            JudgingError: a key that none of these is, where nobody sits to be asked again.
            StorageError: a vote could not be written.
        """
        judged = f", {len(self._done)} of them judged already" if self._done else ""
        self._say(f"{len(self._pairs)} pairs{judged}; the names of the models come at the end.\n{KEYS}")
        going = True
        while going:
            going = self._ask_pair() if self._open else self._ask_end()

    def _ask_pair(self) -> bool:
        """Ask about the next pair; return whether the sitting goes on."""
        pair = self._pairs[self._open[0]]
        self._show(pair)
        started = time.monotonic()
        key = self._ask("a/b/t/n, u, s, q: ", allowed=(*CHOICES, "u", "s", "q"), words=KEYS)
        if key is None or key == "q":
            return False
        if key == "u":
            self._undo()
        elif key == "s":
            self._open.rotate(-1)
        else:
            spent = round(time.monotonic() - started, 1)
            seconds = spent if self._person and spent <= LONGEST_SECONDS else None
            self._sitting.record(pair.item, CHOICES[key], seconds=seconds)
            self._done.append(self._open.popleft())
        return True

    def _ask_end(self) -> bool:
        """Ask whether the sitting is over; return whether it goes on."""
        self._say(f"\nAll {len(self._pairs)} pairs are judged.")
        question = "Close the sitting and show the names? After that nothing can be changed. y/n, u: "
        key = self._ask(question, allowed=("y", "n", "u", "q"), words=END_KEYS)
        if key == "u":
            self._undo()
        elif key == "y":
            self._sitting.close()
        return key == "u"

    def _undo(self) -> None:
        if not self._done:
            self._say("There is nothing to go back to.")
            return
        item = self._done.pop()
        choice = self._sitting.answers[item]
        self._sitting.withdraw(item)
        self._open.appendleft(item)
        self._say(f"Taken back; the choice was {_LETTERS[choice]}.")

    def _show(self, pair: BlindPair) -> None:
        number = len(self._done) + 1
        self._say(f"\n===== {number} of {len(self._pairs)}\n{pair.prompt}")
        for path in pair.pictures:
            self._say(f"[picture: {path}]")
        self._say(f"----- A\n{pair.left}\n----- B\n{pair.right}\n-----")

    def _ask(self, question: str, *, allowed: tuple[str, ...], words: str) -> str | None:
        """Return one of the keys that are allowed, or None at the end of the input."""
        while True:
            self._line += 1
            line = self._read_line(question)
            if line is None:
                return None
            key = line.strip().lower()
            if key in allowed:
                return key
            if key and not self._person:
                raise JudgingError(
                    f"not a key: {line.strip()[:40]!r}",
                    where=f"standard input, line {self._line}",
                    fix=f"give one a line ({words}); the votes before it are kept",
                )
            if key:
                self._say(words)

    def _say(self, text: str) -> None:
        print(printable(text, self._screen), file=self._screen, flush=True)


def vote_in_terminal(sitting: Sitting, *, screen: TextIO | None = None) -> None:
    """Hold a sitting on standard input; Ctrl-C leaves it to be gone on with.

    Args:
        sitting: what is voted on.
        screen: where pairs are shown; None is stdout.
    """
    shown = screen or sys.stdout
    person = is_terminal(sys.stdin)
    read_line: Callable[[str], str | None]
    if sys.stdin is None:
        read_line = _no_line
    elif person and shown is sys.stdout and is_terminal(sys.stdout):
        read_line = read_edited
    else:
        read_line = read_from(sys.stdin, shown if person else None)
    try:
        TerminalVoting(sitting, read_line=read_line, screen=shown, person=person).hold()
    except KeyboardInterrupt:
        print(file=shown)


def _no_line(_question: str) -> str | None:
    return None
