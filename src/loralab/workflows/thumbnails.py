"""Small pictures for pages: made while a run's own pictures are there, and kept in its folder.

Owns where they are kept, and what a record says of a picture. No torch.
"""

import base64
import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.data.example import ImageFile, PlacedImage
from loralab.data.images.thumbnails import make_thumbnail
from loralab.errors import DataError
from loralab.reports.pictures import MOST_PICTURES, find_thumbnail


def image_facts(file: ImageFile) -> dict[str, Any]:
    """Return what a record says of a picture: path, size as seen, and the hash of its file."""
    return {"path": file.path, "sha256": file.sha256, "width": file.width, "height": file.height}


def images_of(images: Sequence[PlacedImage]) -> dict[str, Any]:
    """Return what a record has of its prompt's pictures; nothing where there are none."""
    return {"images": [image_facts(image.file) for image in images]} if images else {}


def keep_thumbnails(folder: Path, images: Iterable[Mapping[str, Any]]) -> None:
    """Write small copies of pictures that are not there yet; of a file that is gone or has changed there is none.

    Args:
        folder: for the copies; made where it is needed.
        images: what records say of them.

    Raises:
        OSError: the folder cannot be written.
    """
    for image in images:
        if find_thumbnail(folder, str(image["sha256"])) is not None:
            continue
        made = _make(image)
        if made is None:
            continue
        data, suffix = made
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{image['sha256']}.{suffix}"
        beside = path.with_suffix(".tmp")
        beside.write_bytes(data)
        beside.replace(path)


def remove_thumbnails(folder: Path) -> None:
    """Remove small copies of pictures, and nothing else that may lie in their folder."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if find_thumbnail(folder, path.stem) == path:
            path.unlink()
    with contextlib.suppress(OSError):  # something else lies there
        folder.rmdir()


def preview_pictures(result: Mapping[str, Any]) -> dict[str, str]:
    """Return the first pictures of a preview's rows as data URIs, by the hash of their files."""
    found: dict[str, str] = {}
    for row in result["rows"]:
        for turn in row.get("turns", []):
            for image in (token["picture"] for token in turn["tokens"] if "picture" in token):
                if image["sha256"] in found or len(found) >= MOST_PICTURES:
                    continue
                made = _make(image)
                if made is not None:
                    address = base64.b64encode(made[0]).decode("ascii")
                    found[image["sha256"]] = f"data:image/{made[1]};base64,{address}"
    return found


def _make(image: Mapping[str, Any]) -> tuple[bytes, str] | None:
    """Return the small copy of a picture; None where its file is gone or has changed, which the page then says."""
    path, sha256, width, height = (image[name] for name in ("path", "sha256", "width", "height"))
    if not Path(path).is_file():  # nor a pipe, which would be waited for
        return None
    try:
        return make_thumbnail(ImageFile(path, sha256, width, height, 0, 0))
    except DataError:
        return None
