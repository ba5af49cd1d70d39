"""Pictures that a user names by hand, for `generate` and `chat`.

Owns that such paths are the user's own: no rule says in which folder they lie. What is a picture, and how it is
read, is as for rows.
"""

from collections.abc import Sequence
from pathlib import Path

from loralab.data.example import ImageFile
from loralab.data.formats.fields import RowError
from loralab.data.images.files import ImageFolder
from loralab.data.prompts.prompter import Prompter
from loralab.errors import DataError, ModelError

_FIX = "name a picture file, such as PNG or JPEG"


def look_at_given(paths: Sequence[str], *, where: str) -> tuple[ImageFile, ...]:
    """Look at pictures that a user has named.

    Args:
        paths: from the current folder, or absolute.
        where: what an error names.

    Raises:
        DataError: a file is not there, or is no picture.
    """
    here = Path.cwd()
    return tuple(_look(path, ImageFolder(here, allow_outside=True, kept=here), where) for path in paths)


def check_sight(prompter: Prompter, *, where: str) -> None:
    """Check that a model reads pictures.

    Args:
        prompter: of the model.
        where: what an error names.

    Raises:
        ModelError: it does not.
    """
    if prompter.pictures is None:
        raise ModelError(
            "a picture, but this model reads none",
            where=where,
            fix="leave it out, or ask an adapter of a vision-language model",
        )


def _look(path: str, folder: ImageFolder, where: str) -> ImageFile:
    try:
        there = (folder.root / Path(path).expanduser()).exists()
    except (OSError, ValueError, RuntimeError):  # such as a null character, or a user who does not exist
        there = False
    if not there:
        raise DataError(f"no such file: {path!r}", where=where, fix=_FIX)
    try:
        return folder.open(path)
    except RowError as error:
        raise DataError(str(error), where=where, fix=_FIX) from None
