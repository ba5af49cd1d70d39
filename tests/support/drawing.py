"""Pictures for tests, drawn in memory: plain ones, and files that are broken in one way each."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Return a picture as the bytes of a file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """Return a picture of random pixels, which no encoder makes small."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def with_orientation(image: Image.Image, orientation: int, kind: str = "JPEG", **options: Any) -> bytes:
    """Return a file whose EXIF asks for this orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, kind, exif=exif.tobytes(), **options)


def png_claiming(width: int, height: int) -> bytes:
    """Return a small PNG whose header claims this size."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in (
            (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress(b"\0" * 1000)),
            (b"IEND", b""),
        )
    )


def animated(kind: str, *, frames: int = 3, seed: int = 0) -> bytes:
    """Return a moving picture, or a file of several pages where the kind is TIFF."""
    first, *rest = [noise(8, 8, seed=seed + frame) for frame in range(frames)]
    return encoded(first, kind, save_all=True, append_images=rest)
