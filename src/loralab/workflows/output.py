"""The output folder of a run: who may write it, and what may be replaced in it.

Owns the lock (one process writes a run folder), the rules for a folder that is not empty, and
the removal of a run's own files. Does not own what the files hold.
"""

import contextlib
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loralab.errors import RunFolderError, StorageError
from loralab.reports.pictures import pictures_folder
from loralab.run import RunFolder, read_json
from loralab.workflows.thumbnails import remove_thumbnails

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

logger = logging.getLogger(__name__)

LOCK = ".lock"
STARTING = "starting"
# What a killed process may leave beside the run's files: its lock, half-written files, a half-written adapter.
_LEFTOVER = re.compile(
    r"\.lock|\.adapter-.+|\.(config\.yaml|(run|data|evaluation.*|samples)\.json|metrics\.jsonl|report\.html)\.\d+\.tmp"
)
# A range lock far behind the pid, which must stay readable where locks are mandatory (Windows).
_LOCKED_BYTE = 1 << 30


@contextmanager
def claim_output(folder: RunFolder, *, resume: bool, overwrite: bool, start: str = "") -> Iterator[None]:
    """Check that a run may be written to `folder`, and keep other processes out of it meanwhile.

    A folder that was made for the lock and stayed empty is removed again.

    Args:
        folder: the run folder.
        resume: go on with the run in it.
        overwrite: replace the run in it.
        start: adapter that the run starts from, noted for the case of a kill before the first record.

    Raises:
        RunFolderError: another process, another run or foreign files are in the way, or there is nothing to resume.
        StorageError: the place cannot be written.
    """
    if not (folder.path / LOCK).is_file():  # else: who is at work there is better to know than which run it is
        check_output(folder, resume=resume, overwrite=overwrite)
    made = _make_folders(folder.path)
    try:
        with locked(folder.path / LOCK, note=start) as before:
            check_output(folder, resume=resume, overwrite=overwrite)  # again: it may have changed until now
            if resume and before and not folder.exists():
                raise RunFolderError(
                    f"the start that was to be resumed was a warm start, and had recorded nothing yet: {before}",
                    where=str(folder.path),
                    fix="start it again with --warm-start, without --resume",
                )
            yield
    finally:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def _make_folders(path: Path) -> list[Path]:
    """Make a folder with its parents; return those that were not there, deepest first."""
    missing = [each for each in (path.absolute(), *path.absolute().parents) if not each.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot make {str(path)!r}: {error.strerror}", where="key output.dir", fix="name another output.dir"
        ) from None
    return missing


@contextmanager
def locked(path: Path, *, note: str) -> Iterator[str]:
    """Hold the lock file `path`, and yield the note of a killed owner ("" without one).

    The system drops the lock with the process, however that ends.
    """
    descriptor = _open_locked(path)
    try:
        _, _, before = os.read(descriptor, 4096).decode(errors="replace").partition("\n")
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f"{os.getpid()}\n{note}".encode())
        _held.add(path.absolute())
        yield before
    finally:
        _held.discard(path.absolute())
        with contextlib.suppress(OSError):
            if sys.platform == "win32":  # an open file cannot be removed there
                os.close(descriptor)
                path.unlink(missing_ok=True)
            else:
                path.unlink(missing_ok=True)
                os.close(descriptor)


# A process never conflicts with its own POSIX locks, so threads of one process are told apart here.
_held: set[Path] = set()


def _open_locked(path: Path) -> int:
    while True:
        if path.absolute() in _held:
            raise _in_use(path, os.getpid())
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StorageError(
                f"cannot write to {str(path.parent)!r}: {error.strerror}",
                where="key output.dir",
                fix=f"make {str(path.parent)!r} a writable folder, or name another output.dir",
            ) from None
        try:
            _lock(descriptor)
        except (BlockingIOError, PermissionError):
            owner = os.read(descriptor, 32).decode(errors="replace").partition("\n")[0]
            os.close(descriptor)
            raise _in_use(path, owner or "unknown") from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): do not start a second run there", path.parent, error.strerror)
        # Its last owner may have removed the file between our two calls; a lock on a removed file keeps nobody out.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    # Not flock: workers that are forked later would hold it on, behind a main process that was killed.
    if sys.platform == "win32":
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def writer_of(folder: RunFolder) -> str | None:
    """Return the pid of another process that writes a run folder now, or None; asking locks nobody out for long."""
    path = folder.path / LOCK
    if path.absolute() in _held:  # to close the file once more would drop our own lock
        return None
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        _lock(descriptor)
    except (BlockingIOError, PermissionError):
        return os.read(descriptor, 32).decode(errors="replace").partition("\n")[0] or "unknown"
    except OSError:
        return None  # a disk without locks
    finally:
        os.close(descriptor)
    return None


def _in_use(path: Path, pid: int | str) -> RunFolderError:
    return RunFolderError(
        f"another process is writing {str(path.parent)!r}: pid {pid}",
        where="key output.dir",
        fix="wait for it or stop it (a checkpoint is written on SIGTERM), or name another output.dir",
    )


def check_output(folder: RunFolder, *, resume: bool, overwrite: bool) -> None:
    """Check that a run may be written to `folder`, before anything is.

    Raises:
        RunFolderError: another run or foreign files are in the way, or there is nothing to resume.
        StorageError: the place cannot be written.
    """
    path = folder.path
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"not a folder: {str(path)!r}", where="key output.dir", fix="name another output.dir")
    if has_begun(folder) and not (resume or overwrite):
        status = read_json(folder.record).get("status", "unknown")
        raise RunFolderError(
            f"output folder holds another run ({status}): {str(path)!r}",
            where="key output.dir",
            fix="go on with --resume, replace it with --overwrite, or name another output.dir",
        )
    if not folder.exists():
        names = [each.name for each in path.iterdir()] if path.is_dir() else []
        only_leftovers = all(_LEFTOVER.fullmatch(name) for name in names)
        if resume and not (names and only_leftovers):
            raise RunFolderError(
                f"no run to resume in {str(path)!r}", where="option --resume", fix="start it without --resume"
            )
        if not only_leftovers:
            raise RunFolderError(
                f"output folder is not empty and holds no run: {str(path)!r}",
                where="key output.dir",
                fix="name an empty or new folder; nothing there was touched",
            )
    _check_writable(path)


def has_begun(folder: RunFolder) -> bool:
    """Return whether `folder` holds a run that got beyond writing its first files."""
    return folder.exists() and read_json(folder.record).get("status") != STARTING


def _check_writable(path: Path) -> None:
    ancestor = path.absolute()
    while not ancestor.exists():
        ancestor = ancestor.parent
    try:
        with tempfile.TemporaryFile(dir=ancestor):
            return
    except OSError as error:
        raise StorageError(
            f"cannot write to {str(path)!r}: {error.strerror}",
            where="key output.dir",
            fix=f"make {str(ancestor)!r} a writable folder, or name another output.dir",
        ) from None


def clear_run(folder: RunFolder, *, keep_record: bool = False) -> None:
    """Remove the files of an earlier run, and nothing else that may lie in its folder.

    Args:
        folder: the run folder.
        keep_record: leave `run.json`, by which the folder is known as a run's.
    """
    for path in (folder.checkpoints, folder.adapter, folder.plots, folder.trackers):
        shutil.rmtree(path, ignore_errors=True)
    remove_thumbnails(pictures_folder(folder))
    files = [folder.config, folder.data, folder.metrics, folder.evaluation, folder.predictions, folder.samples]
    files += [folder.report, folder.comparison, folder.comparison_page, folder.preference]
    for path in (*files, *folder.path.glob("evaluation-*.json")):
        path.unlink(missing_ok=True)
    sweep_leftovers(folder)
    if not keep_record:
        folder.record.unlink(missing_ok=True)


def sweep_leftovers(folder: RunFolder) -> None:
    """Remove what a killed process left half-written; the lock is ours and stays."""
    for path in folder.path.iterdir():
        if path.name == LOCK or not _LEFTOVER.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
