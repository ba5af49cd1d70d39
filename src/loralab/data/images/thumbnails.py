"""Small copies of pictures, to be looked at: decoded and encoded anew, so that nothing of the file itself is in them.

Owns their size and encoding.
"""

import io

from PIL import Image

from loralab.data.example import ImageFile
from loralab.data.images.files import decode

# Longest side, in pixels.
THUMBNAIL_PIXELS = 256
_JPEG_QUALITY = 85


def make_thumbnail(file: ImageFile) -> tuple[bytes, str]:
    """Return a picture in small, and its file's suffix: PNG or JPEG, whichever is smaller.

    Raises:
        DataError: the file is not what it was, or cannot be decoded.
    """
    picture = decode(file)
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    plain = Image.new("RGB", picture.size)
    plain.paste(picture)  # without what the file says of itself
    made = {suffix: _encode(plain, suffix) for suffix in ("png", "jpeg")}
    suffix = min(made, key=lambda name: len(made[name]))
    return made[suffix], suffix


def _encode(picture: Image.Image, suffix: str) -> bytes:
    stream = io.BytesIO()
    if suffix == "png":
        picture.save(stream, "PNG", optimize=True)
    else:
        picture.save(stream, "JPEG", quality=_JPEG_QUALITY)
    return stream.getvalue()
