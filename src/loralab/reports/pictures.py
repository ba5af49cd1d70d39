"""Pictures on pages: which of them are shown, and how a page holds each of them once.

Owns their bound and their words. The small copies lie in the run folder; the workflows write them.
"""

import base64
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from loralab.reports.paths import path_name
from loralab.run import Json, RunFolder

# A page with more pictures takes long to open.
MOST_PICTURES = 24
# Longest side on a page, in pixels.
_SHOWN_PIXELS = 256
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TYPES = {"png": "image/png", "jpeg": "image/jpeg"}

Address = Callable[[str], str | None]


def pictures_folder(folder: RunFolder) -> Path:
    """Return the folder of a run's small copies of pictures."""
    return folder.path / "pictures"


def no_pictures(sha256: str) -> None:
    """Give no picture, where a page has no folder to take any from."""


def images_in(record: Mapping[str, Any]) -> list[Json]:
    """Return what a record says of its pictures, as far as it can be used."""
    images = record.get("images")
    return [image for image in images if _is_image(image)] if isinstance(images, list) else []


def _is_image(image: Any) -> bool:
    return (
        isinstance(image, dict)
        and isinstance(image.get("path"), str)
        and isinstance(image.get("sha256"), str)
        and _SHA256.fullmatch(image["sha256"]) is not None
        and all(isinstance(image.get(side), int) and image[side] > 0 for side in ("width", "height"))
    )


def shown_images(records: Iterable[Mapping[str, Any]]) -> list[Json]:
    """Return the pictures of records that a page shows, each once, in their order."""
    found: dict[str, Json] = {}
    for record in records:
        for image in images_in(record):
            if len(found) < MOST_PICTURES:
                found.setdefault(image["sha256"], image)
    return list(found.values())


def find_thumbnail(folder: Path, sha256: str) -> Path | None:
    """Return the small copy of a picture in a folder, or None where there is none."""
    if _SHA256.fullmatch(sha256) is None:
        return None
    paths = (folder / f"{sha256}.{suffix}" for suffix in _TYPES)
    return next((path for path in paths if path.is_file()), None)


def thumbnails_in(folder: Path) -> Address:
    """Return what gives the data URI of a picture's small copy in a folder, by the hash of its file."""

    def address(sha256: str) -> str | None:
        path = find_thumbnail(folder, sha256)
        if path is None:
            return None
        kind = _TYPES[path.suffix[1:]]
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"

    return address


class PictureBook:
    """The pictures of one page: each is held once, however often it is shown.

    Args:
        address: gives the data URI of a picture by the hash of its file, or None.
        images: those that may be shown, at most `MOST_PICTURES`.
    """

    def __init__(self, address: Address, images: Iterable[Mapping[str, Any]]) -> None:
        self._sizes: dict[str, tuple[int, int]] = {}
        self.held: list[Json] = []
        for image in images:
            found = address(image["sha256"])
            if found is not None and image["sha256"] not in self._sizes:
                width, height = self._sizes[image["sha256"]] = _size(image["width"], image["height"])
                self.held.append({"id": image["sha256"][:16], "address": found, "width": width, "height": height})

    def show(self, images: Iterable[Mapping[str, Any]]) -> list[Json]:
        """Return pictures as the templates' `picture` macro takes them."""
        return [self._shown(image) for image in images]

    def _shown(self, image: Mapping[str, Any]) -> Json:
        size = self._sizes.get(image["sha256"])
        width, height = size or (0, 0)
        words = f"{path_name(image['path'])}, {image['width']} \u00d7 {image['height']}"
        return {"id": image["sha256"][:16] if size else None, "words": words, "width": width, "height": height}


def _size(width: int, height: int) -> tuple[int, int]:
    """Return the size of a picture on the page; small ones are shown larger, in whole steps, to be seen at all."""
    longest = max(width, height)
    if longest > _SHOWN_PIXELS:
        return max(round(width * _SHOWN_PIXELS / longest), 1), max(round(height * _SHOWN_PIXELS / longest), 1)
    step = max(_SHOWN_PIXELS // 2 // longest, 1)
    return width * step, height * step
