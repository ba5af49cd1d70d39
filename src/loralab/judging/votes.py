"""A rater's votes on disk: one JSON object a line, written for good before it is answered.

Owns the form of the file, what counts of it, the lock that keeps a second process of the same rater out, and what a
kill may leave. The first line names rater and item set; every further line is an act: a choice, one taken back
(null), or the end. Which items there are is `items.py`'s.
"""

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from loralab.errors import JudgingError, StorageError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

logger = logging.getLogger(__name__)

Choice = Literal["left", "right", "tie", "both_bad"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
# Of the file, and of what the offline page saves.
VERSION = 1
# A pair that lay open over night says nothing about how long it took.
LONGEST_SECONDS = 24 * 3600.0
_ITEM = re.compile(r"[0-9a-f]{16}")
# Behind all that will ever be written: where locks are mandatory (Windows), the file must stay readable.
_LOCKED_BYTE = 1 << 30


@dataclass(frozen=True, slots=True)
class Act:
    """One act of a rater.

    Attributes:
        item: what it is about.
        choice: what was chosen, or None where a choice was taken back.
        seconds: that the pair was looked at, or None where nobody measured.
        at: when, ISO 8601 in UTC.
    """

    item: str
    choice: Choice | None
    seconds: float | None
    at: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, as a line of the file has them."""
        return {"item": self.item, "choice": self.choice, "seconds": self.seconds, "at": self.at}


@dataclass(slots=True)
class Votes:
    """What a rater's acts come to.

    Attributes:
        rater: name of the rater.
        items_sha256: of the item set that was voted on.
        acts: in their order.
        choices: the choice that counts, by item.
        closed: whether the rater has ended the sitting.
    """

    rater: str
    items_sha256: str
    acts: list[Act] = field(default_factory=list)
    choices: dict[str, Choice] = field(default_factory=dict)
    closed: bool = False

    def take(self, act: Act) -> None:
        """Let an act count."""
        self.acts.append(act)
        if act.choice is None:
            self.choices.pop(act.item, None)
        else:
            self.choices[act.item] = act.choice

    def seconds(self) -> list[float]:
        """Return how long each choice that counts took, in seconds, as far as it was measured."""
        last = {act.item: act.seconds for act in self.acts}
        return [seconds for item in self.choices if (seconds := last[item]) is not None]


def parse_act(value: object, *, where: str) -> Act:
    """Return an act as it was written or sent.

    Raises:
        JudgingError: it is none.
    """
    wrong = _objection(value)
    if wrong is not None or not isinstance(value, Mapping):
        raise JudgingError(f"not a vote: {wrong}", where=where, fix="use the file as it was written, unchanged")
    seconds = value["seconds"]
    return Act(value["item"], value["choice"], None if seconds is None else float(seconds), value["at"])


def _objection(value: object) -> str | None:
    """Return what is wrong with an act, or None."""
    if not isinstance(value, Mapping):
        return f"{type(value).__name__} instead of an object"
    if value.keys() != {"item", "choice", "seconds", "at"}:
        return f"the keys are {', '.join(map(str, value))[:80]!r} instead of item, choice, seconds, at"
    item, choice, seconds, at = (value[name] for name in ("item", "choice", "seconds", "at"))
    if not isinstance(item, str) or _ITEM.fullmatch(item) is None:
        return f"item {str(item)[:40]!r}"
    if choice is not None and choice not in CHOICES:
        return f"choice {str(choice)[:40]!r}"
    measured = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if seconds is not None and not (measured and 0 <= seconds <= LONGEST_SECONDS):
        return f"seconds {str(seconds)[:40]!r}"
    return None if _is_time(at) else f"time {str(at)[:40]!r}"


def _is_time(at: object) -> bool:
    try:
        return isinstance(at, str) and len(at) <= 40 and datetime.fromisoformat(at).year > 0
    except ValueError:
        return False


def read_votes(path: Path) -> Votes | None:
    """Read a rater's votes; None where there are none. Half a line at the end, as a kill leaves it, is left out.

    Raises:
        JudgingError: the file is no file of votes.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None
    return _parse(data, path)[0]


def now() -> str:
    """Return the time as acts have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _header(votes: Votes) -> dict[str, Any]:
    return {"loralab_votes": VERSION, "items_sha256": votes.items_sha256, "rater": votes.rater}


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _unreadable(
    path: Path, why: str, fix: str = "restore it from a backup, or move it away to vote again"
) -> JudgingError:
    return JudgingError(f"cannot read the votes of {path.stem!r}: {why}", where=str(path), fix=fix)


def _parse(data: bytes, path: Path) -> tuple[Votes | None, int]:
    """Return what a file's lines come to, and how many of its bytes hold them; editors leave the last end away."""
    votes: Votes | None = None
    good, lines = 0, data.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines) and not line.endswith(b"\n"):
                break  # what a kill left of a vote that was not answered
            raise JudgingError(
                "a line that is not JSON", where=where, fix="restore the file from a backup, or remove that line"
            ) from None
        if votes is None:
            votes = _start(value, path)
        elif votes.closed:
            raise JudgingError("an act behind the end of the sitting", where=where, fix="remove that line")
        elif isinstance(value, dict) and value.get("closed") is True:
            votes.closed = True
        else:
            votes.take(parse_act(value, where=where))
        good += len(line)
    return votes, good


def _start(value: object, path: Path) -> Votes:
    rater, sha256 = (value.get("rater"), value.get("items_sha256")) if isinstance(value, dict) else (None, None)
    if not isinstance(value, dict) or not isinstance(rater, str) or not isinstance(sha256, str):
        raise _unreadable(path, "the first line does not name rater and items")
    if value.get("loralab_votes") != VERSION:
        why = f"version {str(value.get('loralab_votes'))[:40]!r} is not known here"
        raise _unreadable(path, why, fix="take the version of loralab that wrote them")
    return Votes(rater, sha256)


class VoteLog:
    """The open and locked file of one rater.

    Args:
        descriptor: of the file.
        path: of the file.
        votes: what it holds.
        size: bytes of whole lines in it.
        before_first: called before the first line is written; what it raises stops the vote.
    """

    def __init__(
        self, descriptor: int, path: Path, *, votes: Votes, size: int, before_first: Callable[[], None]
    ) -> None:
        self.votes = votes
        self._descriptor = descriptor
        self._path = path
        self._size = size
        self._before_first = before_first

    def begin(self) -> None:
        """Write who is going to vote on which items, if that is not there yet.

        Raises:
            StorageError: it could not be written.
        """
        if not self._size:
            self._write([])

    def append(self, item: str, choice: Choice | None, *, seconds: float | None) -> None:
        """Write an act, and let it count.

        Raises:
            StorageError: it could not be written, and does not count.
        """
        act = Act(item, choice, seconds, now())
        self._write([act.as_dict()])
        self.votes.take(act)

    def extend(self, acts: Sequence[Act], *, closed: bool) -> None:
        """Write acts that were made elsewhere, or the end, and let them count.

        Args:
            acts: in their order; none where only the end is to be written.
            closed: whether the sitting is over with them.

        Raises:
            StorageError: they could not be written, and do not count.
        """
        end = [{"closed": True, "at": now()}] if closed else []
        if acts or end:
            self._write([*(act.as_dict() for act in acts), *end])
        for act in acts:
            self.votes.take(act)
        self.votes.closed = closed

    def _write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        values = list(lines)
        if not self._size:
            self._before_first()
            values.insert(0, _header(self.votes))
        data = "".join(map(_line, values)).encode()
        try:
            os.lseek(self._descriptor, self._size, os.SEEK_SET)
            written = 0
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
            os.fsync(self._descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):  # half a line may be there; whoever reads next cuts it
                os.ftruncate(self._descriptor, self._size)
            raise StorageError(
                f"the vote could not be written: {error.strerror or error}",
                where=str(self._path),
                fix="make room on that disk, or make the file writable, and vote again",
            ) from None
        self._size += len(data)


@contextmanager
def open_votes(
    path: Path, *, rater: str, items_sha256: str, before_first: Callable[[], None] = lambda: None
) -> Iterator[VoteLog]:
    """Hold a rater's file: made where it is missing, locked, and cut behind its last whole line.

    Args:
        path: of the file.
        rater: name of the rater.
        items_sha256: of the item set that is voted on.
        before_first: called before the first line is written; what it raises stops the vote.

    Raises:
        JudgingError: another process holds the file, or it belongs to another rater or item set.
        StorageError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
    except OSError as error:
        raise StorageError(
            f"cannot write the votes of {rater!r}: {error.strerror}",
            where=str(path),
            fix=f"make {str(path.parent)!r} a writable folder",
        ) from None
    try:
        _lock(descriptor, path, rater)
        _sync_folder(path.parent)
        with open(descriptor, "rb", closefd=False) as stream:
            data = stream.read()
        found, size = _parse(data, path)
        size = _trim(descriptor, data[:size], path)
        votes = Votes(rater, items_sha256) if found is None else found
        check_belongs(votes, rater=rater, items_sha256=items_sha256, where=str(path))
        yield VoteLog(descriptor, path, votes=votes, size=size, before_first=before_first)
    finally:
        os.close(descriptor)  # the lock goes with it


def _trim(descriptor: int, data: bytes, path: Path) -> int:
    """Cut a file behind its lines, end the last of them, and return its size in bytes."""
    try:
        os.ftruncate(descriptor, len(data))
        if data and not data.endswith(b"\n"):
            os.lseek(descriptor, len(data), os.SEEK_SET)
            return len(data) + os.write(descriptor, b"\n")
    except OSError as error:
        raise StorageError(
            f"cannot write the votes of {path.stem!r}: {error.strerror}", where=str(path), fix="make room on that disk"
        ) from None
    return len(data)


def is_held(path: Path) -> bool:
    """Return whether a sitting holds a rater's file at this moment, in this process or another.

    Args:
        path: of the file.
    """
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        _lock(descriptor, path, path.stem)
    except JudgingError:
        return True
    finally:
        os.close(descriptor)
    return False


def check_belongs(votes: Votes, *, rater: str, items_sha256: str, where: str) -> None:
    """Check that votes are of this rater and on these items.

    Raises:
        JudgingError: they are not.
    """
    if votes.items_sha256 != items_sha256:
        raise JudgingError(
            f"these votes are on other items: set {votes.items_sha256[:12]} instead of {items_sha256[:12]}",
            where=where,
            fix="use the file with the run whose items it was made for",
        )
    if votes.rater != rater:
        raise JudgingError(
            f"these are the votes of {votes.rater[:80]!r}, not of {rater!r}",
            where=where,
            fix="give every file the name of its rater again",
        )


def _lock(descriptor: int, path: Path, rater: str) -> None:
    # flock goes with the open file: reading the file elsewhere in this process does not let go of it.
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise JudgingError(
            f"{rater!r} is judging in another process already",
            where=str(path),
            fix="go on there, or end that process; another rater takes another name (--rater NAME)",
        ) from None
    except OSError as error:
        logger.warning("%s cannot be locked (%s): do not vote as %r twice at a time", path, error.strerror, rater)


def _sync_folder(folder: Path) -> None:
    """Make the name of a new file last."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot, and need not
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
