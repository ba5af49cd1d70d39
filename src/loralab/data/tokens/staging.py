"""Unfinished folders in a cache: where an entry grows before one rename makes it visible.

Owns their names, the lock that says that somebody is writing there, and sweeping away those that
nobody came back for. A lock and not a process number: numbers mean nothing on another host or in
another container, and both may share a cache.
"""

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None  # type: ignore[assignment]

PREFIX = ".partial-"
_LOCK_SUFFIX = ".lock"
# An interrupted preparation can be taken up for this long.
KEPT_SECONDS = 7 * 24 * 3600.0
_POLL_SECONDS = 0.2


@contextmanager
def partial_folder(parent: Path, key: str, *, on_wait: Callable[[], None]) -> Iterator[Path]:
    """Yield the place of the unfinished entry `key`, which may be there from an earlier run, or not at all.

    It is locked meanwhile, also against other processes of the same user; what is there in the
    end stays. Where files cannot be locked, the place is a new one, which is removed in the end.

    Args:
        parent: the cache; made if need be.
        key: name of the entry.
        on_wait: called once if another process has the lock.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(parent)
    folder = parent / f"{PREFIX}{key}"
    descriptor = _lock(_lock_of(folder), on_wait)
    if descriptor is None:
        folder = folder.with_name(f"{folder.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        yield folder
    finally:
        if descriptor is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            if not folder.exists():
                _lock_of(folder).unlink(missing_ok=True)
            os.close(descriptor)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + _LOCK_SUFFIX)


def _lock(path: Path, on_wait: Callable[[], None]) -> int | None:
    """Wait for a lock; return its descriptor, or None where files cannot be locked."""
    waited = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _take(descriptor, path):
                return descriptor
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if path.exists() and not waited:
            waited = True
            on_wait()
        time.sleep(_POLL_SECONDS if waited else 0)


def _take(descriptor: int, path: Path) -> bool:
    """Return whether nobody else has the lock, and the file still has its name.

    Raises:
        OSError: files cannot be locked here.
    """
    if fcntl is None:
        raise OSError("no locks on this system")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def _sweep(parent: Path) -> None:
    """Remove the unfinished entries in `parent` that nobody has been writing for long."""
    names = {path.name.removesuffix(_LOCK_SUFFIX) for path in parent.glob(f"{PREFIX}*")}
    for folder in sorted(parent / name for name in names):
        with suppress(OSError):
            if time.time() - _last_change(folder) > KEPT_SECONDS:
                _remove(folder)


def _last_change(folder: Path) -> float:
    inside = folder.iterdir() if folder.is_dir() else ()
    paths = [path for path in (folder, _lock_of(folder), *inside) if path.exists()]
    return max((path.stat().st_mtime for path in paths), default=time.time())


def _remove(folder: Path) -> None:
    lock = _lock_of(folder)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if _take(descriptor, lock):
            # The folder first: one without a lock would look as if nobody had ever written there.
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
