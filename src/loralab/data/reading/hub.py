"""Data sets of the `datasets` library: splits of the Hub's and of those that `save_to_disk` wrote.

Owns the form of a Hub id and the wording of the library's errors. No code of a data set runs:
`datasets` 5 loads no scripts, and the names of its own loaders (`json`, `text`, ...), which
would read the current folder, are refused here. What needs the network cannot be tested
without one; the tests cover the forms of a name and the errors of offline mode.
"""

import hashlib
import pkgutil
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import datasets.packaged_modules
import pyarrow
from datasets.exceptions import DatasetNotFoundError

from loralab.data.reading.hub_cache import commit_of, load_prepared
from loralab.data.reading.rows import Row, excerpt
from loralab.errors import DataError
from loralab.hub.cache import is_commit
from loralab.lookup import suggest
from loralab.run import file_sha256

_HUB_ID = re.compile(
    r"(?P<name>\w[\w.-]*(?:/\w[\w.-]*)?)"
    r"(?::(?P<config>[^@#:/*?\[]+))?(?:@(?P<revision>[^@#*?\[]+))?(?:#(?P<split>[\w.]+(?:\[[-\d:%]+\])?))?",
    re.ASCII,
)
_REASON_CHARACTERS = 300
# What damaged files and missing decoders raise, below and beside pyarrow.
_READ_ERRORS = (
    pyarrow.ArrowException,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    ImportError,
)


@dataclass(frozen=True, slots=True)
class HubId:
    """What `OWNER/NAME[:CONFIG][@REVISION][#SPLIT]` names; SPLIT may be a slice, as in `train[:1000]`."""

    name: str
    config: str | None
    revision: str | None
    split: str | None


def parse_hub_id(spec: str) -> HubId | None:
    """Return the parts of a Hub id, or None where `spec` does not have its form."""
    found = _HUB_ID.fullmatch(spec)
    return HubId(**found.groupdict()) if found else None


def is_saved(folder: Path) -> bool:
    """Return whether `folder` is one that `save_to_disk` wrote."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def load_hub_split(spec: str, *, split: str, where: str) -> datasets.Dataset:
    """Load one split from the Hub, or from its cache when offline.

    Args:
        spec: a Hub id.
        split: name or slice of the split, which goes before the one in `spec`.
        where: the key that named it, for messages.

    Raises:
        DataError: it cannot be had, for whatever reason.
    """
    hub_id = parse_hub_id(spec)
    if hub_id is None or hub_id.name in _loader_names():
        raise DataError(
            f"{spec!r} is no data set of the Hub", where=where, fix="name a file, a folder or a Hub id, OWNER/NAME"
        )
    try:
        prepared = load_prepared(hub_id.name, hub_id.config, hub_id.revision, split=split)
        if prepared is not None:
            return prepared
        loaded = datasets.load_dataset(
            hub_id.name, hub_id.config, split=split, revision=hub_id.revision, keep_in_memory=False
        )
    except Exception as error:  # the library lets through whatever its HTTP client and its 25 loaders raise
        raise _hub_error(error, spec=spec, where=where) from error
    _check_commit(loaded, hub_id, spec, where=where)
    return loaded


def _check_commit(loaded: datasets.Dataset, hub_id: HubId, spec: str, *, where: str) -> None:
    """Check that rows are those of the commit that was named: without the Hub the library takes what is newest here."""
    taken = commit_of(loaded)
    if is_commit(hub_id.revision) and taken is not None and taken != hub_id.revision:
        raise DataError(
            f"{spec!r}: the Hub does not answer, and the cache has another commit of it, {taken}",
            where=where,
            fix="connect to the network (HF_HUB_OFFLINE must not be set), or name the commit that the cache has",
        )


def _loader_names() -> set[str]:
    return {module.name for module in pkgutil.iter_modules(datasets.packaged_modules.__path__)}


def _hub_error(error: Exception, *, spec: str, where: str) -> DataError:
    reason = str(error).strip().partition("\n")[0][:_REASON_CHARACTERS] or type(error).__name__
    if isinstance(error, ConnectionError):
        fix = "connect to the network (HF_HUB_OFFLINE must not be set), or download the data and name a local file"
    elif isinstance(error, DatasetNotFoundError):
        fix = "check the name and the revision; private and gated data needs `hf auth login` or HF_TOKEN, and access"
    elif isinstance(error, ValueError):
        fix = "mend the name, OWNER/NAME[:CONFIG][@REVISION][#SPLIT]; the message lists what there is"
    else:
        fix = "try again, or download the data and name a local file"
    return DataError(
        f"{spec!r} is no file or folder here, and cannot be loaded from the Hub: {reason}", where=where, fix=fix
    )


def load_saved_split(folder: Path, *, split: str | None, where: str) -> tuple[datasets.Dataset, str | None]:
    """Load a saved data set, or one split of several.

    Args:
        folder: what `save_to_disk` wrote.
        split: name of the split; None takes `train` where there are several.
        where: the key that named it, for messages.

    Returns:
        The rows, and the name of their split where the folder has several.

    Raises:
        DataError: the folder is damaged, or has no such split.
    """
    try:
        saved = datasets.load_from_disk(str(folder), keep_in_memory=False)
    except _READ_ERRORS as error:
        raise DataError(
            f"cannot load the saved data set {str(folder)!r}: {excerpt(error)}", where=where, fix="save it again"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        name = split or "train"
        if name not in saved:
            known = suggest(name, map(str, saved))
            raise DataError(
                f"no split {name!r} in {str(folder)!r}",
                where=where,
                fix=f"{known}; or name the folder of one split, {folder}/SPLIT",
            )
        return saved[name], name
    if split is not None and split != str(saved.split):
        raise DataError(
            f"{str(folder)!r} is a data set without splits; it has no {split!r}",
            where=where,
            fix="name a file or folder of its own, or a fraction or number of rows",
        )
    return saved, None


def content_sha256(dataset: datasets.Dataset, *, label: str) -> str:
    """Return a hash of the data in the files behind `dataset`, its columns and `label` (its split or slice of one)."""
    digest = hashlib.sha256(f"{label}\n{len(dataset)}\n{dataset.features}".encode())
    for file in dataset.cache_files:
        digest.update(bytes.fromhex(file_sha256(Path(file["filename"]))))
    return digest.hexdigest()


def _undecoded(dataset: datasets.Dataset) -> datasets.Dataset:
    """Return the data set with rows of Python values, in which pictures, sound and videos stay {bytes, path}."""
    plain = dataset.with_format(None)  # a copy, with features of its own
    for name, feature in plain.features.items():
        plain.info.features[name] = _undecoded_feature(feature)
    return plain


def _undecoded_feature(feature: Any) -> Any:
    if isinstance(feature, (datasets.Image, datasets.Audio, datasets.Video)):
        return replace(feature, decode=False)
    if isinstance(feature, Mapping):
        return {name: _undecoded_feature(inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List):
        return datasets.List(_undecoded_feature(feature.feature), length=feature.length)
    if isinstance(feature, datasets.LargeList):
        return datasets.LargeList(_undecoded_feature(feature.feature))
    return feature


def dataset_rows(dataset: datasets.Dataset, name: str, start: int = 0) -> Iterator[Row]:
    """Yield the rows as Python values; pictures as the files that they are, not decoded.

    Args:
        dataset: the split.
        name: what the user knows it as, for messages.
        start: rows to leave out at the beginning.

    Raises:
        DataError: there is none, or one cannot be decoded.
    """
    if start and start >= len(dataset):
        return
    rest = dataset.select(range(start, len(dataset))) if start else dataset
    rows: Iterator[dict[str, Any]] = iter(_undecoded(rest))
    number = start
    while True:
        try:
            fields = next(rows, None)
        except _READ_ERRORS as error:
            raise DataError(
                f"cannot read row {number + 1}: {excerpt(error)}",
                where=Row({}, number + 1, name).describe(),
                fix="load or save the data set again",
            ) from error
        if fields is None:
            break
        number += 1
        yield Row(fields, number, name)
    if not number:
        raise DataError(f"no rows in {name!r}", where=name, fix="give a split with at least one row")
