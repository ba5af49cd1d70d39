"""Every row of the real sets of pictures builds, with the picture and the text that the file has."""

import json
from pathlib import Path
from typing import Any

import pytest

from loralab.data.example import Conversation
from loralab.data.formats.fields import RowError
from loralab.data.formats.table import build_example, resolve_format
from loralab.data.images.files import ImageFolder, decode
from loralab.data.reading.sources import resolve_sources

pytestmark = pytest.mark.slow

# File, the folder below which its paths lie, its format and number of rows.
SETS = [
    ("easy_vqa/train.jsonl", "easy_vqa", "vqa", 4712),
    ("easy_vqa/test.jsonl", "easy_vqa", "vqa", 962),
    ("llamafactory_mllm/mllm_demo.json", "llamafactory_mllm", "messages", 6),
    ("qwen_vl_demo/single_images.json", "qwen_vl_demo", "sharegpt", 3),
]
V1 = "llamafactory_mllm/v1_multimodal_demo.jsonl"


@pytest.fixture
def folder(data_folder: Path) -> Path:
    return data_folder / "vqa"


def rows_of(path: Path) -> list[dict[str, Any]]:
    (source,) = resolve_sources(str(path), where="test")
    return [dict(row.fields) for row in source.rows()]


def asked_and_shown(row: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the text of a row, markers and what sets them apart taken out, and its pictures, in order."""
    if "question" in row:
        return row["question"] + row["answer"], [row["image"]]
    turns = [turn.get("value") or turn["content"] for turn in row.get("messages") or row["conversations"]]
    text = "".join(turn.replace("\n<image>", "").replace("<image>", "") for turn in turns)
    return text, row.get("images") or [row["image"]]


@pytest.mark.parametrize(("name", "root", "form", "count"), SETS)
def test_every_row_builds(name: str, root: str, form: str, count: int, folder: Path, tmp_path: Path) -> None:
    rows = rows_of(folder / name)
    assert len(rows) == count
    assert resolve_format("auto", {}, first=rows[0], where=name)[0] == form
    pictures = ImageFolder(folder / root, allow_outside=False, kept=tmp_path / "kept")
    decoded = set()
    for row in rows:
        built = pictures.open_all(build_example(form, row, {}))
        assert isinstance(built, Conversation)
        text, paths = asked_and_shown(row)
        assert "".join(message.content for message in built.messages) == text
        files = [part.file for message in built.messages for part in message.images]
        assert [file and file.path for file in files] == [str((folder / root / path).resolve()) for path in paths]
        for file in files:
            assert file is not None
            if file.path not in decoded:
                decoded.add(file.path)
                assert decode(file).size == (file.width, file.height)
    assert not (tmp_path / "kept").exists()


def test_markers_keep_their_place(folder: Path) -> None:
    (first, *_) = rows_of(folder / "llamafactory_mllm/mllm_demo.json")
    built = build_example("messages", first, {})
    assert isinstance(built, Conversation)
    shown = [["picture" if not isinstance(part, str) else part for part in turn.parts] for turn in built.messages]
    assert shown == [["picture", "Who are they?"], [], ["What are they doing?", "picture"], []]


def test_parts_of_messages_build(folder: Path, tmp_path: Path) -> None:
    """The paths begin with a folder that is not here, which `data.image.folder` can give."""
    rows = rows_of(folder / V1)
    (tmp_path / "data").symlink_to(folder / "llamafactory_mllm")
    there = ImageFolder(tmp_path, allow_outside=True, kept=tmp_path / "kept")
    here = ImageFolder(folder / "llamafactory_mllm", allow_outside=False, kept=tmp_path / "kept")
    for row in rows:
        example = build_example("messages", row, {})
        built = there.open_all(example)
        assert isinstance(built, Conversation)
        assert sum(len(message.images) for message in built.messages) == json.dumps(row).count('"image_url"') > 0
        with pytest.raises(RowError, match=r"picture 'data/mllm_demo_data/\d.jpg': no such file; paths start from"):
            here.open_all(example)
