"""One rater's sitting: the pairs in this rater's order and sides, and the answers given so far.

Owns what a rater may see of an item, and which acts are allowed. Does not know which side is which; how acts lie on
disk is `votes.py`'s.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from loralab.errors import JudgingError
from loralab.judging.votes import CHOICES, LONGEST_SECONDS, Choice, VoteLog

__all__ = ["CHOICES", "BlindPair", "Choice", "Sitting"]


@dataclass(frozen=True, slots=True)
class BlindPair:
    """All that a rater may see of an item.

    Attributes:
        item: 16 hexadecimal digits, which say nothing about sides.
        prompt: what both models were asked.
        left: one answer.
        right: the other answer.
        pictures: small copies of the prompt's pictures, in their order.
    """

    item: str
    prompt: str
    left: str
    right: str
    pictures: tuple[Path, ...]


class Sitting:
    """One rater's sitting. Threads may share it; every method leaves the files durable before it returns.

    Args:
        rater: name of the rater.
        pairs: what the rater is shown, in the rater's order.
        log: the rater's votes on disk, which this process holds.
    """

    def __init__(self, rater: str, pairs: Sequence[BlindPair], log: VoteLog) -> None:
        self.rater = rater
        self.pairs = tuple(pairs)
        self._items = frozenset(pair.item for pair in self.pairs)
        self._log = log
        self._lock = threading.Lock()

    @property
    def answers(self) -> Mapping[str, Choice]:
        """The choice that counts now, by item."""
        with self._lock:
            return MappingProxyType(dict(self._log.votes.choices))

    @property
    def closed(self) -> bool:
        """Whether the rater has closed the sitting, and names may be shown."""
        with self._lock:
            return self._log.votes.closed

    def record(self, item: str, choice: Choice, *, seconds: float | None) -> None:
        """Record a choice; the last one of an item counts. A choice that counts already is not written again.

        Args:
            item: of a pair of this sitting.
            choice: which side is better, if any.
            seconds: that the pair was looked at, or None where nobody measured.

        Raises:
            JudgingError: no such item or choice, a time that is none, or the sitting is closed.
            StorageError: the choice could not be written, and does not count.
        """
        if choice not in CHOICES:
            raise JudgingError(
                f"no such choice: {choice!r}", where=f"item {item}", fix=f"give one of {', '.join(CHOICES)}"
            )
        if seconds is not None and not 0 <= seconds <= LONGEST_SECONDS:  # nan compares as false
            raise JudgingError(
                f"no time that a choice can take: {seconds!r} seconds",
                where=f"item {item}",
                fix=f"give 0 to {LONGEST_SECONDS:.0f} seconds, or none",
            )
        with self._lock:
            self._check(item)
            if self._log.votes.choices.get(item) != choice:
                self._log.append(item, choice, seconds=seconds)

    def withdraw(self, item: str) -> None:
        """Take back the choice of an item, if there is one.

        Raises:
            JudgingError: no such item, or the sitting is closed.
            StorageError: it could not be written, and the choice still counts.
        """
        with self._lock:
            self._check(item)
            if item in self._log.votes.choices:
                self._log.append(item, None, seconds=None)

    def close(self) -> None:
        """End the sitting, with all its pairs answered or not: nothing can be changed after it.

        Raises:
            StorageError: it could not be written, and the sitting is still open.
        """
        with self._lock:
            if not self._log.votes.closed:
                self._log.extend([], closed=True)

    def _check(self, item: str) -> None:
        if self._log.votes.closed:
            raise JudgingError(
                f"the sitting of {self.rater!r} is closed",
                where=f"item {item}",
                fix="its votes are final; somebody else may judge (--rater NAME)",
            )
        if item not in self._items:
            raise JudgingError(
                f"no such item: {item!r}",
                where=f"the sitting of {self.rater!r}",
                fix="load the page again: it may have been made for other items",
            )
