"""The file of votes that an offline page saves: read, checked, and taken into the folder of the test.

Owns what such a file must be. It comes from somebody else's hands, so nothing in it is believed.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.errors import JudgingError
from loralab.judging.folder import PreferenceFolder, check_rater, check_votes
from loralab.judging.items import ItemSet
from loralab.judging.votes import VERSION, Act, Votes, is_held, open_votes, parse_act, read_votes

# Changing one's mind a hundred times about each of a thousand items takes less.
_MOST_BYTES = 16 << 20
_KEYS = {"loralab_votes", "items_sha256", "rater", "acts", "closed"}


def read_saved_votes(path: Path, items: ItemSet) -> Votes:
    """Read the file that an offline page saved.

    Args:
        path: of the file.
        items: that the page must have been made for.

    Raises:
        JudgingError: the file is none, or was made for other items.
    """
    value = _load(path)
    where = str(path)
    version, sha256, name, acts, closed = (
        value.get(key) for key in ("loralab_votes", "items_sha256", "rater", "acts", "closed")
    )
    if value.keys() != _KEYS or version != VERSION or not isinstance(acts, list) or not isinstance(closed, bool):
        raise _foreign(path, "it is no file of votes of this version")
    if not isinstance(sha256, str) or not isinstance(name, str):
        raise _foreign(path, "it does not name rater and items")
    votes = Votes(check_rater(name, where=where), sha256)
    for number, act in enumerate(acts, start=1):
        votes.take(parse_act(act, where=f"{where}, act {number}"))
    votes.closed = closed
    check_votes(votes, items, rater=votes.rater, where=where)
    return votes


def _load(path: Path) -> Mapping[str, Any]:
    try:
        if not path.is_file():
            raise _foreign(path, "it is no file" if path.exists() else "there is no such file")
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise _foreign(path, f"it has {size:,} bytes, more than {_MOST_BYTES:,}")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise _foreign(path, error.strerror or str(error)) from None
    except (ValueError, RecursionError):
        raise _foreign(path, "it is not JSON") from None
    if not isinstance(value, dict):
        raise _foreign(path, f"it holds {type(value).__name__} instead of an object")
    return value


def _foreign(path: Path, why: str) -> JudgingError:
    return JudgingError(
        f"no votes can be taken from {path.name!r}: {why}",
        where=str(path),
        fix="give the file that the page saved, unchanged (button at its end)",
    )


def check_takeable(saved: Mapping[Path, Votes], folder: PreferenceFolder) -> None:
    """Check that saved votes can be added to what is there, all of them in their order.

    Args:
        saved: from `read_saved_votes`, by file.
        folder: of the test.

    Raises:
        JudgingError: a rater has other votes, or is judging at this moment.
    """
    known: dict[str, Votes | None] = {}
    for path, votes in saved.items():
        rater = votes.rater
        file = folder.votes_file(rater)
        if rater not in known:
            known[rater] = read_votes(file)
        if is_held(file):
            raise JudgingError(
                f"{rater!r} is judging at this moment", where=str(file), fix="wait for the end of that sitting"
            )
        there = known[rater]
        if there is None or _new_acts(votes, there, where=str(path), folder=folder):
            known[rater] = votes


def take_votes(votes: Votes, folder: PreferenceFolder, *, where: str) -> tuple[int, Votes]:
    """Add saved votes to those of their rater.

    Args:
        votes: from `read_saved_votes`.
        folder: of the test.
        where: they come from.

    Returns:
        How many acts were new, and what the folder holds of the rater now: more than the file where it is an old one.

    Raises:
        JudgingError: the rater has other votes here, or is judging at this moment.
        StorageError: they could not be written.
    """
    path = folder.votes_file(votes.rater)
    with open_votes(path, rater=votes.rater, items_sha256=votes.items_sha256) as log:
        new = _new_acts(votes, log.votes, where=where, folder=folder)
        if not log.votes.closed:
            # An end counts only where it is the end of all that is there.
            log.extend(new, closed=votes.closed and len(votes.acts) == len(log.votes.acts) + len(new))
        return len(new), log.votes


def _new_acts(votes: Votes, there: Votes, *, where: str, folder: PreferenceFolder) -> Sequence[Act]:
    """Return the acts that a file adds. One is the beginning of the other: a page may be saved several times."""
    known = len(there.acts)
    if there.acts[: len(votes.acts)] != votes.acts[:known]:
        raise JudgingError(
            f"{votes.rater!r} has other votes here already: {known} acts that are not those of the file",
            where=where,
            fix="make every rater a page of their own (--html FILE --rater NAME); to take these instead, move "
            f"{str(folder.votes_file(votes.rater))!r} away",
        )
    new = votes.acts[known:]
    if there.closed and new:
        raise _closed(votes, where)
    return new


def _closed(votes: Votes, where: str) -> JudgingError:
    return JudgingError(
        f"the sitting of {votes.rater!r} is closed, and the file has more votes",
        where=where,
        fix="a closed sitting is final: leave the file out",
    )
