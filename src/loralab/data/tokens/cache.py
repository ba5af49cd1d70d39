"""Tokenized rows, kept by content: found again, taken up where a killed run left them, or made.

Owns the cache's folder, when an entry is taken, and what is said about it.
"""

import errno
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loralab.config.paths import local_path
from loralab.config.schema import DataConfig
from loralab.data.reading.sources import Source
from loralab.data.tokens.changed_pictures import find_changed_picture
from loralab.data.tokens.identity import describe_entry, entry_key
from loralab.data.tokens.pipeline import RowPipeline, RowTokenizer
from loralab.data.tokens.staging import PREFIX, partial_folder
from loralab.data.tokens.store import TokenStore, find_damage, read_manifest, read_report
from loralab.data.tokens.store_writer import PROGRESS, StoreWriter
from loralab.errors import DataError, MaskError, StorageError
from loralab.progress import Reporter

# What a kill costs at most, in work that must be done again.
COMMIT_SECONDS = 5.0
_NAME_CHARACTERS = 12
# Of two values that differ, those up to this length are shown.
_SHOWN_CHARACTERS = 24
_LISTED_ENTRIES = 1000


def load_or_tokenize(
    sources: Sequence[Source],
    workers: Sequence[RowTokenizer],
    *,
    data: DataConfig,
    label: str,
    reporter: Reporter,
) -> tuple[TokenStore, dict[str, Any]]:
    """Return the tokens of all rows of some sources, from the cache where they are there.

    Args:
        sources: read one after the other.
        workers: what tokenizes the rows of each source; they may differ in format and columns.
        data: the data section; `cache_dir` and `num_workers` are read.
        label: name of the stage, such as "tokenize train".
        reporter: told of hit or miss and why, and of progress.

    Returns:
        The store, and the report: `rows`; `units` (what became of them, dropped ones counted);
        `dropped`, a list of [unit, source index, row, reason]; `systems`, kept units by system
        message for the first 4 different ones; and `systems_without`, kept units without one.

    Raises:
        DataError: a row cannot be used.
        MaskError: what would carry loss of a row is not the answer.
        StorageError: the cache cannot be read or written.
        WorkerError: a worker process was killed; the next run goes on there.
    """
    parts = describe_entry(sources, workers)
    folder = cache_folder(data) / entry_key(parts)
    try:
        if not _is_there(folder, parts, label, reporter):
            with partial_folder(folder.parent, folder.name, on_wait=lambda: reporter.say(_waiting(label))) as partial:
                # Whoever had the lock may have made it, or another run since the first look.
                if not folder.is_dir() or _find_flaw(folder) is not None:
                    pipeline = RowPipeline(sources, workers, workers=data.num_workers)
                    _tokenize(partial, pipeline, sources, parts, label=label, reporter=reporter)
                    _move(partial, folder)
                else:
                    reporter.say(f"{label}: taken from another process ({_short(folder)})")
        return TokenStore(folder), read_report(folder)
    except OSError as error:
        raise _cache_error(error, folder) from error


def _is_there(folder: Path, parts: dict[str, str], label: str, reporter: Reporter) -> bool:
    """Return whether there is a whole entry, and say what was found."""
    if not folder.is_dir():
        reporter.say(f"{label}: cache miss: {_explain_miss(folder.parent, parts)}")
        return False
    flaw = _find_flaw(folder)
    if flaw is not None:
        reporter.say(f"{label}: {flaw}; they are made again")
        return False
    reporter.say(f"{label}: cache hit ({_short(folder)}: same {', '.join(parts)})")
    return True


def _find_flaw(folder: Path) -> str | None:
    """Return why an entry cannot be used, or None: it is damaged, or its pictures are others by now."""
    damage = find_damage(folder)
    if damage is not None:
        return f"the cached tokens {_short(folder)} are damaged ({damage})"
    changed = find_changed_picture(TokenStore(folder).image_files())
    return None if changed is None else f"a picture behind the cached tokens {_short(folder)} changed ({changed})"


def _short(folder: Path) -> str:
    return folder.name[:_NAME_CHARACTERS]


def _waiting(label: str) -> str:
    return f"{label}: another process is tokenizing these rows; waiting for it"


def _explain_miss(cache: Path, parts: dict[str, str]) -> str:
    """Say which entry of the same rows comes nearest, of several the latest, and in what it differs."""
    best: tuple[int, str, dict[str, str]] | None = None
    for entry in _latest_entries(cache):
        try:
            key = read_manifest(entry)["key"]
        except (OSError, ValueError):  # a folder that is no entry, or a damaged one
            continue
        differing = [name for name in {**key, **parts} if key.get(name) != parts.get(name)]
        if "rows" not in differing and (best is None or len(differing) < best[0]):
            best = len(differing), _short(entry), {name: _difference(name, key, parts) for name in differing}
    if best is None:
        return "nothing is cached yet for these rows"
    return f"the nearest entry of these rows ({best[1]}) differs in {', '.join(best[2].values())}"


def _latest_entries(cache: Path) -> list[Path]:
    if not cache.is_dir():
        return []
    with os.scandir(cache) as found:
        entries = [entry for entry in found if entry.is_dir() and not entry.name.startswith(PREFIX)]
    entries.sort(key=_last_change, reverse=True)
    return [Path(entry.path) for entry in entries[:_LISTED_ENTRIES]]


def _last_change(entry: "os.DirEntry[str]") -> int:
    try:
        return entry.stat().st_mtime_ns
    except FileNotFoundError:  # another process has just replaced it
        return 0


def _difference(name: str, there: dict[str, str], here: dict[str, str]) -> str:
    values = there.get(name), here.get(name)
    if any(value is not None and len(value) > _SHOWN_CHARACTERS for value in values):
        return name
    return f"{name} ({values[0]} there, {values[1]} here)"


def _tokenize(
    partial: Path,
    pipeline: RowPipeline,
    sources: Sequence[Source],
    parts: dict[str, str],
    *,
    label: str,
    reporter: Reporter,
) -> None:
    """Tokenize all rows into `partial`; what is there when it fails is what the next run can take up."""
    writer = _open_writer(partial, label, reporter)
    try:
        _say_start(writer, sources, label, reporter)
        _write_rows(writer, pipeline, label, reporter)
        _refuse_changed(sources)
        writer.finish(parts)
    except BaseException as error:
        writer.close()
        # Whoever mends rows or template has others, and nobody comes back for these.
        if isinstance(error, DataError | MaskError) or not (partial / PROGRESS).exists():
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        reporter.finish(label)


def _open_writer(partial: Path, label: str, reporter: Reporter) -> StoreWriter:
    """Return a writer behind the rows of an earlier run, unless pictures of theirs changed since."""
    writer = StoreWriter(partial)
    changed = find_changed_picture(TokenStore(partial).image_files()) if writer.progress.path_bytes else None
    if changed is None:
        return writer
    writer.close()
    (partial / PROGRESS).unlink()
    reporter.say(f"{label}: a picture changed since an earlier run left off ({changed}); starting at the first row")
    return StoreWriter(partial)


def _refuse_changed(sources: Sequence[Source]) -> None:
    """Refuse rows of a file that was written to: they would be kept under the name of what it held before."""
    for source in sources:
        if not source.is_unchanged():
            raise DataError(
                "the file changed while it was read", where=source.name, fix="start again once nothing writes to it"
            )


def _say_start(writer: StoreWriter, sources: Sequence[Source], label: str, reporter: Reporter) -> None:
    progress = writer.progress
    if writer.restarted is not None:
        reporter.say(f"{label}: what an earlier run left is damaged ({writer.restarted}); starting at the first row")
    elif progress.rows:
        name = sources[progress.source].name
        reporter.say(
            f"{label}: going on at row {progress.source_rows + 1:,} of {name}, as far as an earlier run had come"
        )


def _write_rows(writer: StoreWriter, pipeline: RowPipeline, label: str, reporter: Reporter) -> None:
    progress = writer.progress
    before, started = progress.rows, time.monotonic()
    committed = started
    for source, packed in pipeline.run(source=progress.source, row=progress.source_rows):
        writer.add(packed, source)
        now = time.monotonic()
        if now - committed >= COMMIT_SECONDS:
            writer.commit()
            committed = time.monotonic()
        reporter.progress(label, progress.rows, None, detail=_rate(progress.rows - before, now - started))
    seconds = time.monotonic() - started
    count = f"{pipeline.processes} process{'es' if pipeline.processes > 1 else ''}"
    rows = progress.rows - before
    reporter.say(f"{label}: tokenized {rows:,} rows in {seconds:.1f} s, {_rate(rows, seconds)}, {count}")


def _rate(rows: int, seconds: float) -> str:
    return f"{rows / max(seconds, 1e-3):,.0f} rows/s"


def _move(partial: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    try:
        partial.replace(folder)
    except OSError:
        # Where files cannot be locked, another process may have made the same entry.
        if not folder.is_dir() or find_damage(folder) is not None:
            raise
    (folder / PROGRESS).unlink(missing_ok=True)


def _cache_error(error: OSError, folder: Path) -> StorageError:
    reason = error.strerror or str(error)
    if isinstance(error, PermissionError) and folder.exists():
        what, where = "cannot read tokenized data that another user wrote", str(folder)
        fix = "have its owner run `chmod -R a+rX` on it, or set data.cache_dir to a folder of your own"
    else:
        what, where = "cannot write tokenized data", str(folder.parent)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free space there, or set data.cache_dir" if full else "set data.cache_dir to a folder that you may write"
    return StorageError(f"{what}: {reason}", where=where, fix=fix)


def cache_folder(data: DataConfig) -> Path:
    """Return the folder of tokenized data: `data.cache_dir`, else the user's cache folder.

    Raises:
        StorageError: the user has no home folder.
    """
    if data.cache_dir is not None:
        return Path(data.cache_dir).expanduser()
    base = local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if base is None:
        raise StorageError(
            "no home folder to keep tokenized data in",
            where="environment variables HOME, XDG_CACHE_HOME",
            fix="set HOME, or data.cache_dir",
        )
    return base / "loralab" / "tokenized"
