"""Staging folders in a cache: where something is written before one rename makes it visible.

Owns their names, the lock that says that their process lives, and sweeping away those of dead
processes. A lock and not a process number: numbers mean nothing on another host or in another
container, and both may share a cache.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none; leftovers then stay
    fcntl = None  # type: ignore[assignment]

PREFIX = ".tokenizing-"
_LOCK_SUFFIX = ".lock"


@contextmanager
def staging_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in `parent`, locked while this process lives; remove it in the end.

    Folders of processes that died are removed first. The permissions follow the umask, unlike
    those of `tempfile`: a cache may be shared.
    """
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent)
    lock, descriptor = _new_lock(parent)
    staging = lock.with_suffix("")
    with _closing(descriptor):
        try:
            staging.mkdir()
            yield staging
        finally:
            _remove(lock)


@contextmanager
def _closing(descriptor: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(descriptor)


def sweep(parent: Path) -> None:
    """Remove the staging folders in `parent` whose process is dead."""
    if fcntl is None:
        return
    for lock in sorted(parent.glob(f"{PREFIX}*{_LOCK_SUFFIX}")):
        try:
            descriptor = os.open(lock, os.O_RDWR)
        except OSError:
            continue
        with _closing(descriptor), suppress(OSError):
            if _take(descriptor, lock):
                _remove(lock)


def _new_lock(parent: Path) -> tuple[Path, int]:
    while True:
        lock = parent / f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}{_LOCK_SUFFIX}"
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if fcntl is None or _take(descriptor, lock):
                return lock, descriptor
        except OSError:  # files cannot be locked here, so nobody sweeps here either
            return lock, descriptor
        os.close(descriptor)  # a sweeper came between


def _take(descriptor: int, lock: Path) -> bool:
    """Return whether nobody else has the lock, and the file still has its name."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _remove(lock: Path) -> None:
    # The folder first: one without a lock would never be swept.
    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    lock.unlink(missing_ok=True)
