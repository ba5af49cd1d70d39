"""The run folder: the names of its files, and reading and writing them safely.

Owns paths, JSON and JSONL reading and writing (atomic: a reader never sees half a file). Does
not own what stands in the files; each writer does. No torch here: `report` must work without.
"""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.errors import RunFolderError

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of one run.

    Args:
        path: the folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """Resolved configuration, YAML."""
        return self.path / "config.yaml"

    @property
    def record(self) -> Path:
        """What was run, on what, with which result."""
        return self.path / "run.json"

    @property
    def data(self) -> Path:
        """The data report."""
        return self.path / "data.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The adapter in PEFT's layout."""
        return self.path / "adapter"

    @property
    def evaluation(self) -> Path:
        """Final evaluation of adapter and base."""
        return self.path / "evaluation.json"

    @property
    def comparison(self) -> Path:
        """Base against adapter, prompt by prompt."""
        return self.path / "comparison.json"

    @property
    def comparison_page(self) -> Path:
        """The comparison as a page."""
        return self.path / "comparison.html"

    @property
    def preference(self) -> Path:
        """Result of the blind preference test."""
        return self.path / "preference.json"

    @property
    def preference_votes(self) -> Path:
        """Folder of the preference test's items and votes."""
        return self.path / "preference"

    @property
    def samples(self) -> Path:
        """Prompts answered by base and adapter."""
        return self.path / "samples.json"

    @property
    def predictions(self) -> Path:
        """What base and adapter made of each prompt of the final evaluation, one JSON object a line."""
        return self.path / "predictions.jsonl"

    @property
    def trackers(self) -> Path:
        """Folder of what trackers keep here."""
        return self.path / "trackers"

    @property
    def plots(self) -> Path:
        """Folder of pictures."""
        return self.path / "plots"

    @property
    def report(self) -> Path:
        """The self-contained page."""
        return self.path / "report.html"

    def exists(self) -> bool:
        """Return whether the folder holds a run."""
        return self.record.is_file()


def open_run(path: Path) -> RunFolder:
    """Return the run folder at `path`.

    Raises:
        RunFolderError: there is no run in that folder.
    """
    folder = RunFolder(path)
    if folder.exists():
        return folder
    what = "no such folder" if not path.exists() else "not a run folder (it has no run.json)"
    fix = "give the folder that `loralab train` wrote"
    if RunFolder(path.parent).exists():
        fix += f": {str(path.parent)!r}"
    raise RunFolderError(f"{what}: {str(path)!r}", where="argument RUN", fix=fix)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; move it there on success, remove it on failure.

    Raises:
        OSError: `path` cannot be written, or is a folder or device, whose place no file must take.
    """
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        raise FileExistsError(errno.EEXIST, "neither a file nor a new name", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step (UTF-8)."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` to `path` as indented JSON, in one step."""
    write_text(path, render_json(value) + "\n")


def render_json(value: object) -> str:
    """Return indented JSON; numbers that JSON does not have (NaN, infinity) become null."""
    return json.dumps(finite_json(value), indent=2, ensure_ascii=False, default=str, allow_nan=False)


def finite_json(value: object) -> object:
    """Return a value with null in the place of numbers that JSON does not have (NaN, infinity)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_json(each) for each in value]
    return value


def read_json(path: Path) -> Json:
    """Read a JSON object.

    Raises:
        RunFolderError: the file is missing, cannot be read or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(
            f"missing file: {path.name}", where=str(path.parent), fix="is this a finished run folder?"
        ) from None
    except OSError as error:
        raise RunFolderError(
            f"cannot read {path.name}: {error.strerror}", where=str(path), fix="allow yourself to read that file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise RunFolderError(
            f"not valid JSON: {error}", where=str(path), fix="restore the file from a backup"
        ) from None
    if not isinstance(value, dict):
        raise RunFolderError(
            f"expected a JSON object, got {type(value).__name__}", where=str(path), fix="restore the file from a backup"
        )
    return value


def read_metrics(path: Path) -> list[Json]:
    """Read `metrics.jsonl`; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    rows: list[Json] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number == len(lines):
                break
            raise RunFolderError(f"line {number} is not valid JSON", where=str(path), fix="remove that line") from None
    return rows


def replace_folder(made: Path, folder: Path) -> None:
    """Move a folder to where an older one may be; a kill in between leaves the older one beside it, never half of one.

    Args:
        made: the new folder, beside `folder`.
        folder: its place.
    """
    aside = folder.with_name(f".{folder.name}-before-{os.getpid()}")
    there = folder.exists()
    if there:
        folder.rename(aside)
    try:
        made.rename(folder)
    except OSError:
        if there:
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
