"""Pictures of rows as files: found below one folder, looked at, and decoded again when they are needed.

Owns the rules for paths, and the folder that keeps pictures which rows hold as bytes. What bytes are
a picture, and how they become RGB, is `pictures.py`'s; how a model takes them, `processor.py`'s.
"""

import contextlib
import errno
import functools
import hashlib
import os
import re
import secrets
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

from loralab.data.example import Conversation, Example, ImageFile, ImagePart, Message
from loralab.data.formats.fields import RowError
from loralab.data.images.pictures import MAX_DECODED_PIXELS, PictureError, decode_rgb, look_at
from loralab.errors import DataError, StorageError, excerpt

MAX_FILE_BYTES = 256 * 2**20  # a picture is read whole, in every worker process
_FILE_URL = re.compile(r"file:/{2}", re.IGNORECASE)
_SHOWN_CHARACTERS = 160
# Rows on one picture stand together as a rule: it is looked at once.
_REMEMBERED_FILES = 1024
# What makes one row bad. Any other error of the system may be gone on the next try, so it drops no row.
_ROW_ERRORS = {
    errno.ENOENT: "no such file",
    errno.ENOTDIR: "no such file",
    errno.EACCES: "no permission to read it",
    errno.EPERM: "no permission to read it",
    errno.ENAMETOOLONG: "too long for a path; base64 text needs data:image/png;base64, in front of it",
    errno.ELOOP: "a symbolic link that leads to itself",
    errno.EINVAL: "no path that the system takes",
}


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """Where the pictures of a source lie, and which of them may be read.

    Attributes:
        root: folder that relative paths start from, and that pictures must lie in.
        allow_outside: whether pictures may lie elsewhere too.
        kept: folder for pictures that rows hold as bytes.
        max_decoded_pixels: most pixels of one picture.
    """

    root: Path
    allow_outside: bool
    kept: Path
    max_decoded_pixels: int = MAX_DECODED_PIXELS

    def open(self, source: str | bytes) -> ImageFile:
        """Look at a picture, to its last byte, and return what it is.

        Whatever is wrong with it is found here, except that somebody changes the file later.

        Args:
            source: a path, absolute or from `root`, also as a `file:` URL; or the bytes of a file,
                which are kept under their hash.

        Raises:
            RowError: it is not there, may not be read, or is no picture that `look_at` takes.
            DataError: the system cannot read a file that is there, or has no memory to decode it.
            StorageError: a picture cannot be kept.
        """
        name = _show(source)
        try:
            return self._keep(source) if isinstance(source, bytes) else self._open_path(source)
        except PictureError as error:
            raise RowError(f"picture {name}: {error}") from None
        except MemoryError:
            raise DataError(
                "not enough memory to decode a picture", where=name, fix="lower data.num_workers, or shrink the picture"
            ) from None

    def open_all(self, example: Example) -> Example:
        """Return a conversation with the files of its pictures; any other example as it is.

        Raises:
            RowError: one of them cannot be used; see `open`.
            DataError: likewise.
            StorageError: likewise.
        """
        if not isinstance(example, Conversation) or not any(message.parts for message in example.messages):
            return example
        return replace(example, messages=tuple(self._open_parts(message) for message in example.messages))

    def _open_parts(self, message: Message) -> Message:
        if not message.parts:
            return message
        parts = [
            replace(part, file=self.open(part.source)) if isinstance(part, ImagePart) else part
            for part in message.parts
        ]
        return replace(message, parts=tuple(parts))

    def _open_path(self, source: str) -> ImageFile:
        root, path = os.path.realpath(self.root), self._resolve(source)
        if not self.allow_outside and not Path(path).is_relative_to(root):
            raise PictureError(
                f"it leads to {path}, outside the folder {root}: set data.image.folder, or "
                "data.image.allow_outside: true where that is meant"
            )
        try:
            found = os.stat(path)  # noqa: PTH116 - a path with odd characters must stay as it is
            if stat.S_ISDIR(found.st_mode):
                raise PictureError("a folder, not a file")
            if not stat.S_ISREG(found.st_mode):
                raise PictureError("no regular file")
            return _look_at_file(path, _state(found), self.max_decoded_pixels)
        except OSError as error:
            reason = _ROW_ERRORS.get(error.errno or 0)
            if reason is None:
                raise DataError(
                    f"cannot read a picture: {error.strerror or error}",
                    where=path,
                    fix="check the disk, then try again",
                ) from error
            where = f"; paths start from {root} (data.image.folder)" if reason == "no such file" else ""
            raise PictureError(f"{reason}{where}") from None

    def _resolve(self, source: str) -> str:
        """Return the absolute path that a source leads to, symbolic links followed."""
        path = _FILE_URL.sub("", source, count=1) if _FILE_URL.match(source) else source
        if not path.strip():
            raise PictureError("an empty path")
        try:
            found = os.path.realpath(self.root / Path(path).expanduser())
            if path != source and "%" in path and not Path(found).exists():
                found = os.path.realpath(self.root / Path(unquote(path)).expanduser())
        except (ValueError, RuntimeError) as error:  # a null character; a user who does not exist
            raise PictureError(f"no path: {excerpt(error)}") from None
        return found

    def _keep(self, data: bytes) -> ImageFile:
        """Return the file that holds `data`, written where there is none yet."""
        if len(data) > MAX_FILE_BYTES:
            raise _huge(len(data))
        digest = hashlib.sha256(data).hexdigest()
        folder = self.kept / digest[:2]
        try:
            # A size or content that differs is what a crash of the machine left: it is written again.
            for path in folder.glob(f"{digest}.*"):
                with contextlib.suppress(PictureError):
                    file = self._open_kept(path)
                    if file.sha256 == digest:
                        return file
            return self._open_kept(self._write(folder, digest, data))
        except OSError as error:
            raise StorageError(
                f"cannot keep a picture: {error.strerror or error}",
                where=str(folder),
                fix="free space there, or make the folder writable",
            ) from error

    def _open_kept(self, path: Path) -> ImageFile:
        return _look_at_file(os.path.realpath(path), _state(path.stat()), self.max_decoded_pixels)

    def _write(self, folder: Path, digest: str, data: bytes) -> Path:
        look = look_at(data, max_pixels=self.max_decoded_pixels)
        path = folder / f"{digest}.{look.suffix}"
        folder.mkdir(parents=True, exist_ok=True)
        # Under a name of its own first: another process may write the same picture, and a reader sees all of it.
        beside = folder / f".{digest}.{os.getpid()}-{secrets.token_hex(4)}"
        try:
            beside.write_bytes(data)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        return path


def decode(file: ImageFile) -> Image.Image:
    """Return a picture in RGB, as it is seen; `decode_rgb` says how.

    Raises:
        DataError: the file is gone, is no longer what was looked at, or cannot be decoded.
    """
    try:
        with open(file.path, "rb") as stream:  # noqa: PTH123 - a path with odd characters must stay as it is
            data = stream.read(MAX_FILE_BYTES + 1)
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise _changed(file, "it is no longer the file that was looked at")
        # Its pixels were counted when it was looked at, under the bound of that time.
        return decode_rgb(data, max_pixels=max(MAX_DECODED_PIXELS, file.width * file.height))
    except OSError as error:
        raise _changed(file, error.strerror or str(error)) from error
    except PictureError as error:
        raise _changed(file, str(error)) from None
    except MemoryError:
        raise _changed(file, "not enough memory") from None


def _changed(file: ImageFile, reason: str) -> DataError:
    return DataError(
        f"cannot decode a picture of {file.width} x {file.height}: {reason}",
        where=file.path,
        fix="put back the file that was there, or start the run again, which looks at every changed picture anew",
    )


@functools.lru_cache(maxsize=_REMEMBERED_FILES)
def _look_at_file(path: str, state: tuple[int, ...], max_pixels: int) -> ImageFile:
    """Look at a file, of which `state` says whether it is still what was looked at before."""
    if state[2] > MAX_FILE_BYTES:
        raise _huge(state[2])
    with open(path, "rb") as stream:  # noqa: PTH123 - a path with odd characters must stay as it is
        found = os.fstat(stream.fileno())
        data = stream.read(MAX_FILE_BYTES + 1)
    if len(data) != found.st_size:
        raise PictureError("it is being written: its size changed while it was read")
    look = look_at(data, max_pixels=max_pixels)
    digest = hashlib.sha256(data).hexdigest()
    return ImageFile(path, digest, look.width, look.height, found.st_size, found.st_mtime_ns)


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _huge(size: int) -> PictureError:
    return PictureError(f"a huge file of {size:,} bytes: at most {MAX_FILE_BYTES:,} are read")


def _show(source: str | bytes) -> str:
    """Return a picture's name for a message; of a long one its end, where the file's name stands."""
    if isinstance(source, bytes):
        return f"of {len(source):,} bytes in the row"
    text = repr(source)
    return text if len(text) <= _SHOWN_CHARACTERS else f"'...{text[-_SHOWN_CHARACTERS:]}"
