"""The folder that a merge or an export makes: nothing in its way, nothing half-written, nothing left behind.

Owns the work beside its place, the move into place, and what earlier work that was killed has left there.
"""

import contextlib
import errno
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from safetensors import SafetensorError

from loralab.errors import ConfigError, RunFolderError, StoppedBySignal, StorageError, excerpt

_NUMBER = re.compile(r"\[Errno (\d+)\]|\(os error (\d+)\)")
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


def check_free(output: Path, reads: Sequence[Path] = ()) -> None:
    """Check that a folder can be made.

    Args:
        output: the folder; an empty one may be there.
        reads: folders that are read, in which it must not lie.

    Raises:
        RunFolderError: there is something at its place.
        ConfigError: it would lie inside a folder that is read.
    """
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise _taken(output)
    resolved = output.resolve()
    for folder in reads:
        if resolved == folder.resolve() or folder.resolve() in resolved.parents:
            raise ConfigError(
                f"the output folder {str(output)!r} lies inside {str(folder)!r}, which is read",
                where="option --output",
                fix="name a folder elsewhere",
            )


def _taken(output: Path) -> RunFolderError:
    return RunFolderError(
        f"the output is already there: {str(output)!r}",
        where="option --output",
        fix="name a folder that does not exist, or is empty; nothing is replaced",
    )


@contextlib.contextmanager
def new_folder(output: Path, *, work: str) -> Iterator[tuple[Path, Path]]:
    """Yield two folders beside `output`: the first gets its name where all goes well, the second is for scratch.

    Args:
        output: the folder that is made.
        work: what is done, as the hidden folder beside it says it.

    Raises:
        RunFolderError: another one has taken its place meanwhile.
        StoppedBySignal: SIGINT or SIGTERM came; nothing is left.
        StorageError: something cannot be written; nothing is left.
    """
    output = output.absolute()
    place = output.with_name(f".{output.name}.{work}-{os.getpid()}")
    made = [each for each in place.parents if not each.exists()]
    done = False
    try:
        _sweep(output, work)
        for folder in (place / "kept", place / "scratch"):
            folder.mkdir(parents=True)
        with _stoppable(output):
            yield place / "kept", place / "scratch"
        _move(place / "kept", output)
        done = True
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"cannot write {str(output)!r}: {_reason(error, place)}",
            where="option --output",
            fix="free space there, or name a folder that you may write to; nothing was kept",
        ) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
        for folder in () if done else made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _reason(error: OSError | SafetensorError, place: Path) -> str:
    """Return what the system said, without names of hidden files below `place`."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, OSError) and error.filename and not Path(str(error.filename)).is_relative_to(place):
        return excerpt(error)
    found = _NUMBER.search(str(error)) if number is None else None  # of one file among many, or from Rust
    if found is not None:
        number = int(found.group(1) or found.group(2))
    if number is not None:
        return os.strerror(number)
    return excerpt(error)


@contextlib.contextmanager
def _stoppable(output: Path) -> Iterator[None]:
    """Let SIGINT and SIGTERM end the work.

    An error that is raised while Python lets go of an object is dropped, an interrupt too: what came is kept, and
    asked for once more at the end.
    """
    came: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()  # others may not handle signals
    numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
        if came:
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise StoppedBySignal(
            came[-1] if came else signal.SIGINT,
            where=f"the work for {str(output)!r}",
            fix="nothing was kept; run it again",
        ) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _move(folder: Path, output: Path) -> None:
    try:
        if output.is_dir():
            output.rmdir()
        folder.rename(output)
    except OSError as error:
        if error.errno in _TAKEN:
            raise _taken(output) from error
        raise


def _sweep(output: Path, work: str) -> None:
    """Remove what work that was killed has left beside `output`; work that still goes on is left alone."""
    pattern = re.compile(re.escape(f".{output.name}.{work}-") + r"(\d+)")
    for path in output.parent.iterdir() if output.parent.is_dir() else ():
        found = pattern.fullmatch(path.name)
        if found and not _runs(int(found.group(1))):
            shutil.rmtree(path, ignore_errors=True)


def _runs(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return number != os.getpid()
