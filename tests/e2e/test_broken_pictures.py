"""200 broken pictures and rows of ten kinds: each is named, none is fatal under drop, each is an error under error."""

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.tiny import write_rows
from support.tiny_vision import save_vision_base

OF_EACH = 20
KINDS = ("missing", "jpeg", "png", "empty", "text", "bomb", "animated", "zero", "outside", "null")


def header(width: int, height: int) -> bytes:
    """Return a PNG that claims a size, with little in it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def noise(kind: str, draw: np.random.Generator) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(stream, kind)
    return stream.getvalue()


def animation() -> bytes:
    stream = io.BytesIO()
    first, *others = (Image.new("L", (8, 8), shade) for shade in (0, 90, 180))
    first.save(stream, "GIF", save_all=True, append_images=others)
    return stream.getvalue()


def broken_rows(folder: Path) -> list[dict]:
    draw = np.random.default_rng(0)
    rows = []
    for number in range(OF_EACH):
        contents = {
            "jpeg": noise("JPEG", draw)[:400],
            "png": noise("PNG", draw)[:-200],
            "empty": b"",
            "text": b"no picture",
            "bomb": header(60_000, 60_000),
            "animated": animation(),
            "zero": header(0, 10),
        }
        for kind in KINDS:
            name = f"{kind}{number}.png"
            if kind in contents:
                (folder / name).write_bytes(contents[kind])
            image = {"outside": f"../outside{number}.png", "null": None}.get(kind, name)
            rows.append({"image": image, "question": "what?", "answer": "a cat", "kind": kind})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("broken")
    save_vision_base(path / "base")
    Image.new("RGB", (32, 32)).save(path / "good.png")
    good = {"image": "good.png", "question": "what?", "answer": "a dog", "kind": "good"}
    write_rows(path / "rows.json", [good, *broken_rows(path)])
    (path / "c.yaml").write_text(
        f"model: {{name: {path / 'base'}}}\n"
        f"data: {{train: {path / 'rows.json'}, format: vqa, cache_dir: {path / 'cache/tokens'}, "
        "max_dropped_fraction: 1.0}\n"
    )
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loralab.cli", *arguments], capture_output=True, text=True, check=False, timeout=300
    )


def test_every_broken_row_is_dropped_and_named(folder: Path) -> None:
    done = run("preview", str(folder / "c.yaml"), "data.on_bad_row=drop", "--json")
    assert done.returncode == 0, done.stderr
    train = json.loads(done.stdout)["report"]["splits"]["train"]
    rows = json.loads((folder / "rows.json").read_text())
    assert (train["rows_kept"], train["dropped"]) == (1, {"bad_row": OF_EACH * len(KINDS)})
    words = {
        "missing": "no such file",
        "jpeg": "truncated or damaged",
        "png": "truncated or damaged",
        "empty": "an empty file",
        "text": "known kinds are",
        "bomb": "too large to decode",
        "animated": "animated",
        "zero": "without pixels",
        "outside": "outside the folder",
        "null": "null or empty",
    }
    for entry in train["dropped_rows"]:
        row = rows[entry["row"] - 1]
        assert words[row["kind"]] in entry["why"]
        assert row["image"] is None or row["image"] in entry["why"]
    assert f"row 2: {train['dropped_rows'][0]['why']}" in done.stderr


def test_under_error_the_first_one_stops_with_row_path_and_fix(folder: Path) -> None:
    done = run("preview", str(folder / "c.yaml"))
    assert done.returncode == 2
    assert "picture 'missing0.png': no such file" in done.stderr
    assert "row 2" in done.stderr
    assert "data.on_bad_row: drop" in done.stderr
