"""The folders that a run writes to: whether they can be written, and how much space they have."""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loralab.doctor.findings import Finding, Section, render_bytes

# Less than one checkpoint of a small run; and less than a model of a few billion parameters.
_FULL_BYTES, _LITTLE_BYTES = 200 * 2**20, 10 * 2**30


@dataclass(frozen=True, slots=True)
class Place:
    """A folder and what is known of it.

    Attributes:
        path: the folder; it need not exist yet.
        error: why it cannot be written, or None.
        free_bytes: space that is left, or None where that is not known.
    """

    path: Path
    error: str | None
    free_bytes: int | None


def look_at(path: Path) -> Place:
    """Try to write in a folder, or where it would be made, and return what is known of it."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    error = None
    try:
        with tempfile.TemporaryFile(dir=there) as stream:
            stream.write(b"loralab")
    except OSError as problem:
        error = problem.strerror or str(problem)
    try:
        free = shutil.disk_usage(there).free
    except OSError:
        free = None
    return Place(path, error, free)


def examine_folders(places: Mapping[str, Path], look: Callable[[Path], Place] = look_at) -> Section:
    """Judge the folders that a run writes to.

    Args:
        places: names in `USES` and their folders.
        look: returns what is known of a folder.
    """
    section = Section("folders")
    for name, path in places.items():
        place, use = look(path), USES[name]
        section.facts[name] = str(path)
        section.facts[f"{name}_free_bytes"] = place.free_bytes
        if place.error is not None:
            what = f"cannot write to {str(path)!r}: {place.error}"
            section.findings.append(Finding("problem", what, use.why, use.fix))
        elif place.free_bytes is not None and place.free_bytes < _FULL_BYTES:
            what = f"the disk of {str(path)!r} is full ({render_bytes(place.free_bytes)} left)"
            section.findings.append(Finding("problem", what, use.why, f"free space there, or {use.fix}"))
        elif place.free_bytes is not None and place.free_bytes < min(_LITTLE_BYTES, use.wanted_bytes):
            what = f"{render_bytes(place.free_bytes)} left on the disk of {str(path)!r}"
            section.findings.append(Finding("warning", what, use.why, f"free space there, or {use.fix}"))
    return section


@dataclass(frozen=True, slots=True)
class Use:
    """What a folder is for.

    Attributes:
        why: what fails without it.
        fix: how to take another one.
        wanted_bytes: space that it should have.
    """

    why: str
    fix: str
    wanted_bytes: int


USES: dict[str, Use] = {
    "current": Use("run folders are made here by default", "set output.dir to another folder", 2 * 2**30),
    "hub_cache": Use("models and data of the Hub are kept there", "export HF_HOME=FOLDER", 10 * 2**30),
    "loralab_cache": Use("tokenized data is kept there", "set data.cache_dir, or export XDG_CACHE_HOME=FOLDER", 2**30),
    "temporary": Use(
        "libraries write temporary files there, the compiler of kernels too", "export TMPDIR=FOLDER", 2**30
    ),
}
