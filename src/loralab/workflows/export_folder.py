"""The folder of an export: nothing in its way, nothing half-written, nothing left behind.

Owns that alone.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loralab.errors import RunFolderError, StorageError


def check_output(output: Path) -> None:
    """Check that nothing is in the way of an export.

    Raises:
        RunFolderError: something is.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunFolderError(
            f"the output is already there: {str(output)!r}",
            where="option --output",
            fix="name another --output, or remove that one",
        )


@contextmanager
def staging_beside(output: Path) -> Iterator[tuple[Path, Path]]:
    """Yield two new folders beside `output`, for what is kept and what is not; both are gone afterwards.

    Raises:
        StorageError: they cannot be made.
    """
    place = output.absolute().with_name(f".{output.name}.exporting-{os.getpid()}")
    made: list[Path] = [each for each in place.parents if not each.exists()]
    try:
        for folder in (place / "kept", place / "scratch"):
            folder.mkdir(parents=True)
    except OSError as error:
        shutil.rmtree(place, ignore_errors=True)
        raise StorageError(
            f"cannot write beside {str(output)!r}: {error.strerror}", where="option --output", fix="name another folder"
        ) from None
    done = False
    try:
        yield place / "kept", place / "scratch"
        done = True
    finally:
        shutil.rmtree(place, ignore_errors=True)
        for folder in made if not done else ():
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def move_into_place(staging: Path, output: Path) -> None:
    """Give a finished folder its name."""
    if output.is_dir():
        output.rmdir()
    staging.rename(output)
