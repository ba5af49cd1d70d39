"""What `data.train` and its like name: files, globs, saved data sets and splits on the Hub.

Owns the order in which a name is tried and the errors for a name that leads nowhere. Does not
own what stands in a file (`readers.py`) or comes from the `datasets` library (`hub.py`).
"""

import functools
import glob
import itertools
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loralab.data.reading.hub import (
    HubId,
    content_sha256,
    dataset_rows,
    is_saved,
    load_hub_split,
    load_saved_split,
    parse_hub_id,
)
from loralab.data.reading.json_rows import parse_row
from loralab.data.reading.readers import NUMBERED, READERS, data_suffix, read_rows, read_text, unreadable
from loralab.data.reading.rows import Row, UnparsedRow, excerpt
from loralab.errors import DataError, Problem
from loralab.lookup import nearest_name
from loralab.run import file_sha256

__all__ = ["Row", "Source", "resolve_sources"]

_FORMS = "name a data file, a folder of save_to_disk, a glob, or a Hub id: OWNER/NAME[:CONFIG][@REVISION][#SPLIT]"
_LISTED_FILES = 1000


@dataclass(frozen=True, slots=True)
class Source:
    """One file, one Hub split or one saved split.

    Attributes:
        name: path as the user wrote it, or Hub id with its split.
        fingerprint: SHA-256 of the content, in hexadecimal.
        read: begins a new pass over the rows, of which it leaves out as many as it is told.
        is_unchanged: whether it is still what the fingerprint was made of, as far as that costs nothing.
        read_numbered: as `read`, for a file whose columns may have no names; None for others.
    """

    name: str
    fingerprint: str
    read: Callable[[int], Iterator[UnparsedRow]]
    is_unchanged: Callable[[], bool] = lambda: True
    read_numbered: Callable[[int], Iterator[UnparsedRow]] | None = None

    def by_number(self, columns: Collection[str]) -> "Source":
        """Return the source with its columns by number, where `columns` are numbers and none is named so."""
        if self.read_numbered is None or not columns or not all(column.isdecimal() for column in columns):
            return self
        header = next(iter(replace(self, read=self.read_numbered).rows())).fields.values()
        return self if set(columns) & set(map(str, header)) else replace(self, read=self.read_numbered)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Yield the rows behind the first `start`; may be called again.

        Raises:
            DataError: a row cannot be read, or there is none.
        """
        return map(parse_row, self.read(start))

    def unparsed(self, start: int = 0) -> Iterator[UnparsedRow]:
        """Yield the rows behind the first `start`, for `parse_row`.

        Raises:
            DataError: the source cannot be read, or there is no row.
        """
        return self.read(start)

    def pick(self, numbers: Sequence[int]) -> Iterator[UnparsedRow]:
        """Yield the rows with these numbers, and read no further than the last of them.

        Args:
            numbers: from 1, ascending.

        Raises:
            DataError: the source cannot be read, or there is no row.
        """
        waiting = iter(numbers)
        number = next(waiting, None)
        if number is None:
            return
        for row in self.unparsed(number - 1):
            if row.number != number:
                continue
            yield row
            number = next(waiting, None)
            if number is None:
                return


@dataclass(frozen=True, slots=True)
class _Found:
    """Something that a name leads to; `identity` is the same for two names of one thing."""

    name: str
    identity: str
    load: Callable[[], Source]


def resolve_sources(spec: str | Sequence[str], *, where: str, split: str | None = None) -> list[Source]:
    """Find what each name stands for and open it.

    A name is tried as a file, a folder, a Hub id and a glob. One that looks like a path (known
    suffix, a leading `.`, `/` or `~`, several slashes, or an existing folder before the last
    part) is never looked for on the Hub.

    Args:
        spec: one name or several.
        where: the key or argument that gave the names, for messages.
        split: split to take of saved and Hub data sets; None takes the one in the Hub id, else `train`.

    Returns:
        The sources in the order of the names, the files of a glob sorted.

    Raises:
        DataError: a name leads nowhere, or two lead to the same; all such names at once.
    """
    found: list[_Found] = []
    problems: list[Problem] = []
    for name in [spec] if isinstance(spec, str) else spec:
        try:
            found += _find(name, where, split)
        except DataError as error:
            problems += error.problems
        except OSError as error:
            problems += unreadable(error, name=name, where=where).problems
    if problems:
        raise DataError.from_problems(problems)
    if not found:
        raise DataError("no data given", where=where, fix=_FORMS)
    _refuse_duplicates(found, where)
    return [_load(entry, where) for entry in found]


def _load(entry: _Found, where: str) -> Source:
    try:
        return entry.load()
    except OSError as error:
        raise unreadable(error, name=entry.name, where=where) from error


def _refuse_duplicates(found: Sequence[_Found], where: str) -> None:
    identity, times = Counter(entry.identity for entry in found).most_common(1)[0]
    if times > 1:
        names = [entry.name for entry in found if entry.identity == identity]
        raise DataError(
            f"{names[0]!r} is given {times} times" + (f", also as {names[1]!r}" if names[1] != names[0] else ""),
            where=where,
            fix="name each source once; to see rows more often, train for more epochs",
        )


def _find(name: str, where: str, split: str | None) -> list[_Found]:
    path = _expand(name, where)
    if path.is_file():
        return [_find_file(name, path, where, split)]
    if path.is_dir():
        return [_find_folder(name, path, where, split)]
    if path.exists():
        raise DataError(f"{name!r} is neither a file nor a folder", where=where, fix="copy its content to a file")
    hub_id = find_hub_id(name)
    if hub_id is not None:
        return [_find_on_hub(name, where, split or hub_id.split or "train")]
    if any(mark in name for mark in "*?["):
        return _find_matches(name, where, split)
    if _looks_like_path(name, name):
        raise _missing_file(name, path, where)
    raise DataError(f"{name!r} is no file, folder or Hub id", where=where, fix=_FORMS)


def _expand(name: str, where: str) -> Path:
    if not name.strip() or "\0" in name:
        raise DataError(f"{name!r} names nothing", where=where, fix=_FORMS)
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise DataError(f"cannot expand {name!r}: {error}", where=where, fix="write the whole path") from None


def find_hub_id(name: str) -> HubId | None:
    """Return the parts of a name that is looked for on the Hub, or None where it means a file or folder."""
    try:
        path = _expand(name, name)
        if path.exists():
            return None
    except (DataError, OSError):
        return None
    hub_id = parse_hub_id(name)
    return None if hub_id is None or _looks_like_path(name, hub_id.name) else hub_id


def _looks_like_path(name: str, base: str) -> bool:
    """Return whether `name`, whose part before configuration and split is `base`, is meant as a path."""
    if data_suffix(name) in READERS or data_suffix(base) in READERS or "\\" in name:
        return True
    return name.startswith((".", "/", "~")) or base.count("/") > 1 or ("/" in base and Path(base).parent.is_dir())


def _find_file(name: str, path: Path, where: str, split: str | None) -> _Found:
    if split is not None:
        raise DataError(
            f"{name!r} is one file and has no split {split!r}",
            where=where,
            fix="name a file of its own, or a fraction or number of rows",
        )
    if data_suffix(path.name) not in READERS:
        raise DataError(
            f"unknown kind of file {data_suffix(path.name) or 'without suffix'!r}: {name!r}",
            where=where,
            fix=f"convert or rename it; known suffixes: {', '.join(READERS)}",
        )
    if not path.stat().st_size:
        raise DataError(f"empty file: {name!r}", where=where, fix="give a file with at least one row")
    return _Found(name, os.path.realpath(path), functools.partial(_load_file, name, path))


def _load_file(name: str, path: Path) -> Source:
    state = _state(path)  # before it is hashed: what changes meanwhile is seen too
    numbered = functools.partial(read_rows, path, name, numbered=True) if data_suffix(path.name) in NUMBERED else None
    return Source(
        name,
        file_sha256(path),
        functools.partial(read_rows, path, name),
        is_unchanged=lambda: _state(path) == state,
        read_numbered=numbered,
    )


def _state(path: Path) -> tuple[int, ...] | None:
    """Return what differs after a file was written or replaced, or None where it is gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _find_folder(name: str, path: Path, where: str, split: str | None) -> _Found:
    if not is_saved(path):
        raise DataError(f"{name!r} is a folder", where=where, fix=_suggest_glob(name, path))
    return _Found(name, f"{os.path.realpath(path)}#{split}", functools.partial(_load_saved, name, path, where, split))


def _suggest_glob(name: str, path: Path) -> str:
    files = [file for file in itertools.islice(path.rglob("*"), _LISTED_FILES) if data_suffix(file.name) in READERS]
    if not files:
        return f"there is no data file in it; known suffixes: {', '.join(READERS)}"
    # A README is rarely the data.
    files = [file for file in files if READERS[data_suffix(file.name)] is not read_text] or files
    suffix, count = Counter(data_suffix(file.name) for file in files).most_common(1)[0]
    deep = "" if any(file.parent == path and data_suffix(file.name) == suffix for file in files) else "**/"
    return f"name its files, for example '{name.rstrip('/')}/{deep}*{suffix}' ({count} found)"


def _load_saved(name: str, path: Path, where: str, split: str | None) -> Source:
    dataset, part = load_saved_split(path, split=split, where=where)
    full_name = name if part is None else f"{name}#{part}"
    return Source(full_name, content_sha256(dataset, label=""), functools.partial(dataset_rows, dataset, full_name))


def _find_on_hub(name: str, where: str, split: str) -> _Found:
    full_name = f"{name.partition('#')[0]}#{split}"
    return _Found(full_name, full_name, functools.partial(_load_from_hub, full_name, where, split))


def _load_from_hub(name: str, where: str, split: str) -> Source:
    dataset = load_hub_split(name, split=split, where=where)
    return Source(name, content_sha256(dataset, label=split), functools.partial(dataset_rows, dataset, name))


def _find_matches(name: str, where: str, split: str | None) -> list[_Found]:
    # Not through Path, which drops the leading ./ that the user wrote.
    matches = glob.glob(os.path.expanduser(name), recursive=True)  # noqa: PTH111
    files = [match for match in sorted(set(matches)) if Path(match).is_file()]
    if not files:
        raise DataError(f"no file matches {name!r}", where=where, fix=f"check the pattern; it is read in {Path.cwd()}")
    return [_find_file(match, Path(match), where, split) for match in files]


def _missing_file(name: str, path: Path, where: str) -> DataError:
    folder, missing = path.parent, path.name
    while not folder.is_dir() and folder != folder.parent:
        folder, missing = folder.parent, folder.name
    near = nearest_name(missing, sorted(entry.name for entry in itertools.islice(folder.iterdir(), _LISTED_FILES)))
    hint = f"did you mean {str(folder / near)!r}? " if near else ""
    note = f"{hint}there is no {excerpt(missing)} in {folder.resolve()}"
    return DataError(f"no such file: {excerpt(name)}", where=where, fix=note)
