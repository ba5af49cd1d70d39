"""Two hundred broken pictures and rows, of ten kinds: each is one error that names the file and the kind."""

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loralab.data.formats.fields import RowError
from loralab.data.formats.table import build_example
from loralab.data.images.files import ImageFolder
from support.drawing import animated, encoded, noise, png_claiming

EACH = 20
MOST_BYTES = 60 * 2**20  # a picture of 60,000 x 60,000 would take 10,800 MB
Row = dict[str, Any]


def asked(name: object) -> Row:
    return {"image": name, "question": "what is it?", "answer": "noise"}


def written(root: Path, name: str, data: bytes) -> Row:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return asked(name)


def missing(_: Path, number: int) -> Row:
    return asked(f"images/missing_{number}.png")


def cut_jpeg(root: Path, number: int) -> Row:
    data = encoded(noise(64, 48, seed=number), "JPEG", progressive=number % 2 == 0)
    kept = len(data) * (number + 1) // (EACH + 1)
    return written(root, f"cut_{number}.jpg", data[: kept if number < EACH - 1 else -1])


def cut_png(root: Path, number: int) -> Row:
    data = encoded(noise(64, 48, seed=number))
    return written(root, f"cut_{number}.png", data[: len(data) * (number + 1) // (EACH + 1)])


def empty(root: Path, number: int) -> Row:
    return written(root, f"empty_{number}.png", b"")


def renamed(root: Path, number: int) -> Row:
    texts = [b"words", "Wörter".encode() * 300, b"<svg/>", b"%PDF-1.4", b"<html>404</html>", b"1,2,3\n"]
    return written(root, f"renamed_{number}.png", texts[number % len(texts)] + b" " * number)


def bomb(root: Path, number: int) -> Row:
    return written(root, f"bomb_{number}.png", png_claiming(60_000 + number, 60_000))


def moving(root: Path, number: int) -> Row:
    kind = ("GIF", "WEBP", "PNG")[number % 3]
    return written(root, f"moving_{number}.{kind.lower()}", animated(kind, frames=2 + number, seed=number))


def without_pixels(root: Path, number: int) -> Row:
    return written(root, f"flat_{number}.png", png_claiming(*((0, number + 1) if number % 2 else (number + 1, 0))))


def outside(root: Path, number: int) -> Row:
    (root.parent / f"outside_{number}.png").write_bytes(encoded(noise(4, 4)))
    if number % 2:
        return asked(f"images/../../outside_{number}.png")
    (root / f"outside_{number}.png").symlink_to(root.parent / f"outside_{number}.png")
    return asked(f"outside_{number}.png")


def miscounted(root: Path, number: int) -> Row:
    row = written(root, f"counted_{number}.png", encoded(noise(4, 4)))
    if number % 4 == 0:
        return asked(None)
    if number % 4 == 1:
        return {**row, "question": "<image>" * (number + 1)}
    turns = [{"role": "user", "content": "<image>a" * (number % 4)}, {"role": "assistant", "content": "b"}]
    pictures = [row["image"]] * (number % 4 + 1)
    return {"messages": turns, "images": pictures if number % 3 else []}


# What makes the row or file, and words of which each message has one.
KINDS: dict[str, tuple[Callable[[Path, int], Row], tuple[str, ...]]] = {
    "missing": (missing, ("no such file",)),
    "cut_jpeg": (cut_jpeg, ("truncated",)),
    "cut_png": (cut_png, ("truncated",)),
    "empty": (empty, ("an empty file",)),
    "renamed": (renamed, ("text", "an SVG drawing", "a PDF document", "an HTML page")),
    "bomb": (bomb, ("a decompression bomb",)),
    "moving": (moving, ("animated",)),
    "without_pixels": (without_pixels, ("without pixels",)),
    "outside": (outside, ("outside the folder",)),
    "miscounted": (miscounted, ("no picture", "the turns ask for")),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    return root


def error_of(root: Path, row: Row) -> str:
    folder = ImageFolder(root, allow_outside=False, kept=root.parent / "kept")
    with pytest.raises(RowError) as caught:
        folder.open_all(build_example("vqa" if "question" in row else "messages", row, {}))
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_broken_row_is_named(kind: str, root: Path) -> None:
    make, words = KINDS[kind]
    messages = set()
    for number in range(EACH):
        row = make(root, number)
        message = error_of(root, row)
        assert any(word in message for word in words), message
        names = [row["image"]] if isinstance(row.get("image"), str) and kind != "miscounted" else ["'image"]
        assert all(name in message for name in names), message
        assert "\n" not in message
        assert len(message) < 500
        messages.add(message)
    assert len(messages) == EACH or kind == "miscounted"


def test_broken_pictures_in_the_rows_themselves_are_named(root: Path) -> None:
    """The same files as bytes, as Parquet and the Hub have them."""
    for kind in ("cut_jpeg", "cut_png", "renamed", "bomb", "moving", "without_pixels"):
        make, words = KINDS[kind]
        for number in range(EACH):
            data = (root / make(root, number)["image"]).read_bytes()
            message = error_of(root, asked({"bytes": data, "path": None}))
            assert message.startswith(f"picture of {len(data):,} bytes in the row: ")
            assert any(word in message for word in words), message


def test_bombs_take_no_memory(root: Path) -> None:
    """The highest use of the process so far may rise by little; it counts what decoders take, unlike tracemalloc."""
    error_of(root, bomb(root, 0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(EACH):
        error_of(root, bomb(root, number))
        error_of(root, asked(png_claiming(60_000, 60_000 + number)))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES
