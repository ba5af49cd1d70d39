"""What the bytes of a picture are: their kind, their size as seen, and the pixels in RGB.

Owns the kinds that are read, every reason to refuse a picture, and the one way from a file's pixels
to RGB. Knows no paths and no rows; Pillow decodes, with only the kinds named here.
"""

import contextlib
import io
import logging
import re
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from loralab.errors import excerpt

logger = logging.getLogger(__name__)

# Pillow's own bound against pictures that are small as files and huge as pixels: about 0.5 GB as RGB.
MAX_DECODED_PIXELS = 178_956_970
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"}
# MPO is what the JPEG decoder calls a photograph with further pictures behind it (depth, a gain map, a second eye).
_KINDS = tuple(kind for kind in _SUFFIXES if kind != "MPO")
_JPEGS = ("JPEG", "MPO")
_KNOWN = "known kinds are JPEG, PNG, WebP, BMP, GIF and TIFF"
# Modes whose brightness has a known range. Numbers of 32 bits and floats (I, F) have none, LAB needs a colour profile.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_MODES_16 = ("I;16", "I;16L", "I;16B")
_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPPED = (5, 6, 7, 8)
_HEAD_BYTES = 1024
_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
_STRANGERS = {
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip file",
    b"\x00\x00\x01\x00": "an icon (ICO)",
    b"8BPS": "a Photoshop document",
    b"\xff\x0a": "a JPEG XL picture",
}


class PictureError(Exception):
    """A picture that cannot be used; the message says why, without its name."""


@dataclass(frozen=True, slots=True)
class Look:
    """What looking at a picture's bytes gave.

    Attributes:
        width: in pixels, as it is seen: behind the rotation that its EXIF orientation asks for.
        height: in pixels, as it is seen.
        suffix: that its kind of file has, without the dot.
    """

    width: int
    height: int
    suffix: str


def look_at(data: bytes, *, max_pixels: int) -> Look:
    """Check that a picture can be decoded to its end, and return its size.

    Everything is decoded once, since a file that is cut opens without complaint; a JPEG at an eighth
    of its size, which reads all of its data too (1,024 x 1,024: 2 to 6 ms; a PNG of 64 x 64: 0.04 ms).
    What the decoder itself takes for a picture is one: bytes that changed amid a JPEG may only show
    as wrong colours. Of an MPO file the first picture counts, which is the photograph.

    Args:
        data: the bytes of a file.
        max_pixels: most pixels that may be decoded; checked on the header, before any decoding.

    Raises:
        PictureError: it is no picture of a known kind, is damaged, has no pixels or too many, moves,
            has several pages, or has values whose range nobody knows.
        MemoryError: there is not enough to decode it.
    """
    with _noting_warnings():
        image = _open(data, max_pixels)
        width, height = image.size
        image.draft(None, (1, 1))
        _load(image)
        if image.format not in _JPEGS:  # a TIFF is turned upright while it is loaded
            width, height = image.size
        if _orientation(image) in _SWAPPED:
            width, height = height, width
    return Look(width, height, _SUFFIXES[str(image.format)])


def decode_rgb(data: bytes, *, max_pixels: int) -> Image.Image:
    """Return a picture in RGB, turned as its EXIF orientation says.

    What is transparent is laid on white; 16 bits of grey become 8, scaled; a palette is looked up.

    Args:
        data: the bytes of a file.
        max_pixels: most pixels that may be decoded.

    Raises:
        PictureError: as `look_at`.
        MemoryError: there is not enough to decode it.
    """
    with _noting_warnings():
        image = _open(data, max_pixels)
        _load(image)
        turn = _TURNS.get(_orientation(image))
        try:
            rgb = _to_rgb(image)
        except ValueError as error:
            raise PictureError(f"cannot be converted to RGB: {excerpt(error)}") from None
    return rgb if turn is None else rgb.transpose(turn)


@contextlib.contextmanager
def _noting_warnings() -> Iterator[None]:
    """Send what Pillow warns of, odd metadata as a rule, to the log: pictures are checked here, once."""
    with warnings.catch_warnings(record=True, action="always") as said:
        yield
    for warning in said:
        logger.debug("Pillow on a picture: %s", warning.message)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Return the picture, not decoded yet, after every check that the header allows."""
    if not data:
        raise PictureError("an empty file")
    claimed = _claimed_size(data)
    if claimed is not None:
        _check_size(claimed, max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=_KINDS)
        _check_size(image.size, max_pixels)
        moves = image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except (PictureError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise PictureError(_describe_stranger(data)) from None
    except Image.DecompressionBombError as error:
        found = re.search(r"\d+", str(error))
        raise _bomb(f"{int(found[0]):,}" if found else "far too many", MAX_DECODED_PIXELS) from None
    except Exception as error:  # decoders raise whatever they meet in damaged files
        raise PictureError(f"truncated or damaged, its header cannot be read: {excerpt(error)}") from error
    if moves:
        what = "several pages" if image.format == "TIFF" else "animated, with more than one frame"
        raise PictureError(f"{what}: save the one that is meant as a file of its own")
    if image.mode not in (*_MODES, *_MODES_16):
        raise PictureError(f"its pixels are of mode {image.mode}, which has no plain way to RGB: save it with 8 bits")
    return image


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they meet in damaged files
        raise PictureError(f"truncated or damaged: {excerpt(error)}") from error


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width <= 0 or height <= 0:
        raise PictureError(f"without pixels: its header says {width} x {height}")
    if width * height > max_pixels:
        raise _bomb(f"{width:,} x {height:,} = {width * height:,}", max_pixels)


def _bomb(claim: str, bound: int) -> PictureError:
    return PictureError(f"too large to decode (a decompression bomb?): it claims {claim} pixels, at most {bound:,} are")


def _claimed_size(data: bytes) -> tuple[int, int] | None:
    """Return the width and height in a header, where their place is fixed: Pillow names no reason for some."""
    if data.startswith(b"\x89PNG\r\n\x1a\n") and data[12:16] == b"IHDR" and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return width, height
    if data.startswith(b"GIF8") and len(data) >= 10:
        width, height = struct.unpack("<HH", data[6:10])
        return width, height
    if data.startswith(b"BM") and len(data) >= 26 and struct.unpack("<I", data[14:18])[0] >= 40:
        width, height = struct.unpack("<ii", data[18:26])
        return width, abs(height)  # negative where rows go from the top
    return None


def _describe_stranger(data: bytes) -> str:
    """Return what bytes are that no decoder takes."""
    kind = next((kind for magic, kind in _SIGNATURES.items() if data.startswith(magic)), None)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        kind = "WebP"
    if kind is not None:
        return f"a {kind} file that is truncated or damaged: its header cannot be read"
    found = next((name for magic, name in _STRANGERS.items() if data.startswith(magic)), None)
    if data[4:8] == b"ftyp":
        pictures = {b"avif": "an AVIF picture", b"heic": "a HEIC picture", b"heix": "a HEIC picture"}
        found = {**pictures, b"mif1": "a HEIC picture"}.get(data[8:12], "a video")
    return f"{found or _describe_text(data) or 'no picture'}: {_KNOWN}"


def _describe_text(data: bytes) -> str | None:
    head = data[:_HEAD_BYTES]
    try:
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # A character that is cut at the end is no sign against text.
        if len(data) <= _HEAD_BYTES or error.start < _HEAD_BYTES - 3:
            return None
        text = head[: error.start].decode("utf-8-sig")
    if not all(character.isprintable() or character.isspace() for character in text):
        return None
    text = text.lower()
    if text.startswith("version https://git-lfs"):
        return "a pointer of Git LFS, not the picture itself (git lfs pull)"
    if "<svg" in text:
        return "an SVG drawing"
    if "<html" in text or "<!doctype html" in text:
        return "an HTML page"
    return "text"


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a loaded picture; 1, as it lies, where it has none that can be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - broken metadata is no reason to lose a picture
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _MODES_16:
        return _from_16_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        values = np.where(values == clear, 0xFFFF, values)
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
