"""The file of votes that an offline page saves: read, checked, and taken into the folder of the test.

Owns what such a file must be. It comes from somebody else's hands, so nothing in it is believed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralab.errors import JudgingError
from loralab.judging.folder import PreferenceFolder, check_rater, check_votes
from loralab.judging.items import ItemSet
from loralab.judging.votes import VERSION, Votes, open_votes, parse_act

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


def take_votes(votes: Votes, folder: PreferenceFolder, *, where: str) -> int:
    """Add saved votes to those of their rater; return how many acts were new.

    What is there already must be the beginning of what comes: the same page may be saved several times.

    Args:
        votes: from `read_saved_votes`.
        folder: of the test.
        where: they come from.

    Raises:
        JudgingError: the rater has other votes here, or is judging at this moment.
        StorageError: they could not be written.
    """
    path = folder.votes_file(votes.rater)
    with open_votes(path, rater=votes.rater, items_sha256=votes.items_sha256) as log:
        there, known = log.votes, len(log.votes.acts)
        if there.acts == votes.acts[:known]:
            new = votes.acts[known:]
            if there.closed and new:
                raise _closed(votes, where)
            if not there.closed:
                log.extend(new, closed=votes.closed)
            return len(new)
        if votes.acts == there.acts[: len(votes.acts)]:  # saved earlier than what was taken before
            return 0
    raise JudgingError(
        f"{votes.rater!r} has other votes here already: {known} acts that are not those of the file",
        where=where,
        fix="make every rater a page of their own (--html FILE --rater NAME); to take these instead, move "
        f"{str(path)!r} away",
    )


def _closed(votes: Votes, where: str) -> JudgingError:
    return JudgingError(
        f"the sitting of {votes.rater!r} is closed, and the file has more votes",
        where=where,
        fix="a closed sitting is final; votes of a later sitting need another name",
    )
