"""What a container leaves of processors and memory: the control groups of this process, and where it may run.

Owns reading both versions of control groups, for the token budget, threads, `plan` and `doctor` alike. No torch
here: `doctor` reads it where torch is what is broken.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
# Version 1 writes "no limit" as the largest number of pages; no machine has so much memory.
_UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class Limits:
    """What the control groups allow; None where they set no limit.

    Attributes:
        version: of the control groups, 1 or 2, or None where there are none.
        cpus: processors' worth of time.
        memory_bytes: most memory.
        used_bytes: memory that the group with that limit uses now.
    """

    version: int | None
    cpus: float | None = None
    memory_bytes: int | None = None
    used_bytes: int | None = None

    @property
    def left_bytes(self) -> int | None:
        """Memory that the limit leaves, or None where there is none."""
        return None if self.memory_bytes is None else max(self.memory_bytes - (self.used_bytes or 0), 0)


def runnable_cpus() -> int:
    """Return how many logical processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_cpus(runnable: int, limits: Limits) -> float:
    """Return how many processors' worth of time this process can have.

    Args:
        runnable: processors that it may run on.
        limits: of its control groups.
    """
    return min(float(runnable), limits.cpus) if limits.cpus else float(runnable)


def read_limits(root: Path = CONTROL_GROUPS, membership: Path = MEMBERSHIP) -> Limits:
    """Return the tightest limits of the groups that this process is in, up to the root.

    Args:
        root: where control groups are mounted.
        membership: the file that names the groups of the process.
    """
    paths = _membership(membership)
    if (root / "cgroup.controllers").is_file():
        return _read_second(_group_and_above(root, paths.get("", "/")))
    if (root / "memory").is_dir() or (root / "cpu").is_dir():
        memory = list(_group_and_above(root / "memory", paths.get("memory", "/")))
        return _read_first(memory, list(_group_and_above(root / "cpu", paths.get("cpu", "/"))))
    return Limits(None)


def _membership(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    fields = (line.split(":", 2) for line in lines if line.count(":") >= 2)
    return {name: group for _, names, group in fields for name in names.split(",")}


def _group_and_above(root: Path, group: str) -> Iterator[Path]:
    """Yield the folders of a group and those above it; inside a container only the root may be there."""
    folder = root / group.strip("/")
    while folder != root and root in folder.parents:
        yield folder
        folder = folder.parent
    yield root


def _read_second(folders: Iterator[Path]) -> Limits:
    cpus: list[float] = []
    memory: list[tuple[int, int | None]] = []
    for folder in folders:
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            cpus.append(int(quota) / int(period))
        limit = _number(folder / "memory.max")
        if limit is not None:
            memory.append((limit, _number(folder / "memory.current")))
    limit, used = min(memory, default=(None, None), key=lambda pair: pair[0])
    return Limits(2, min(cpus, default=None), limit, used)


def _read_first(memory_folders: list[Path], cpu_folders: list[Path]) -> Limits:
    cpus: list[float] = []
    memory: list[tuple[int, int | None]] = []
    for folder in cpu_folders:
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota and period:
            cpus.append(quota / period)
    for folder in memory_folders:
        limit = _number(folder / "memory.limit_in_bytes")
        if limit is not None and limit < _UNLIMITED_BYTES:
            memory.append((limit, _number(folder / "memory.usage_in_bytes")))
    limit, used = min(memory, default=(None, None), key=lambda pair: pair[0])
    return Limits(1, min(cpus, default=None), limit, used)


def _number(path: Path) -> int | None:
    """Return a file's number; -1 and "max" stand for no limit."""
    text = _read(path)
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
