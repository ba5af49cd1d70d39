"""Pictures behind cached rows: whoever changed or removed one gets the entry made again, and is told which."""

import os
from pathlib import Path
from typing import Any

import pytest

from loralab.config.schema import DataConfig
from loralab.data.dataset import PreparedData, prepare_data
from loralab.data.images.processor import PictureProcessor
from loralab.data.tokens import cache, pipeline
from loralab.data.tokens.changed_pictures import find_changed_picture
from loralab.errors import DataError, LoralabError
from loralab.progress import Reporter
from support import tiny
from support.tiny_vision import build_vision_model, draw_picture, vqa_rows


class Notes(Reporter):
    """Keeps what is said of the rows' tokens, and may stop at a number of rows."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.lines: list[str] = []
        self.stop_at = stop_at

    def say(self, text: str) -> None:
        if text.startswith("tokenize train: "):
            self.lines.append(text.removeprefix("tokenize train: "))

    def progress(self, label: str, done: int, total: int | None, *, detail: str = "") -> None:
        if self.stop_at is not None and done >= self.stop_at:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def pictures() -> PictureProcessor:
    return PictureProcessor(build_vision_model("qwen2_vl")[1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.write_rows(tmp_path / "rows.json", vqa_rows(tmp_path, 4, questions=2))
    return tmp_path


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "CHUNK_ROWS", 2)
    monkeypatch.setattr(cache, "COMMIT_SECONDS", 0.0)


def prepare(folder: Path, pictures: PictureProcessor | None, notes: Reporter, **chosen: Any) -> PreparedData:
    data = DataConfig(train=str(folder / "rows.json"), cache_dir=str(folder / "cache"), num_workers=0, **chosen)
    tokenizer = build_vision_model("qwen2_vl")[1].tokenizer if pictures is None else pictures.processor.tokenizer
    return prepare_data(data, tokenizer, reporter=notes, pictures=pictures)


def said(folder: Path, pictures: PictureProcessor, **chosen: Any) -> tuple[list[str], PreparedData]:
    notes = Notes()
    prepared = prepare(folder, pictures, notes, **chosen)
    return notes.lines, prepared


def shas(prepared: PreparedData) -> list[str]:
    return [image.sha256 for image in prepared.splits["train"].images()]


def test_same_pictures_are_a_hit_even_with_another_time(folder: Path, pictures: PictureProcessor) -> None:
    first = said(folder, pictures)[1]
    assert len(shas(first)) == 4
    os.utime(folder / "images/1.png", ns=(1, 1))
    lines, second = said(folder, pictures)
    assert [line[:9] for line in lines] == ["cache hit"]
    assert "picture_folder, pictures_outside, pillow, torchvision" in lines[0]
    assert shas(second) == shas(first)


@pytest.mark.parametrize("same_size", [True, False])
def test_a_changed_picture_is_named_and_its_rows_are_made_again(
    folder: Path, pictures: PictureProcessor, same_size: bool
) -> None:
    first = said(folder, pictures)[1]
    path = folder / "images/1.png"
    before = path.stat()
    draw_picture(path, 77, size=(32, 32) if same_size else (64, 32))
    if same_size:  # as bytes too, and only the time tells
        raw = path.read_bytes()
        path.write_bytes(raw + bytes(max(before.st_size - len(raw), 0)))
    lines, second = said(folder, pictures)
    assert lines[0].startswith("a picture behind the cached tokens ")
    assert lines[0].endswith(f" changed ({str(path)!r} is another one now); they are made again")
    assert lines[1].startswith("tokenized 8 rows")
    assert (shas(first)[0], shas(first)[2:]) == (shas(second)[0], shas(second)[2:])
    assert shas(first)[1] != shas(second)[1]
    assert first.fingerprint != second.fingerprint
    assert said(folder, pictures)[0][0].startswith("cache hit")


def test_a_picture_that_is_gone_is_an_error_of_its_row(folder: Path, pictures: PictureProcessor) -> None:
    said(folder, pictures)
    path = folder / "images/2.png"
    path.unlink()
    notes = Notes()
    with pytest.raises(DataError, match=r"2\.png"):
        prepare(folder, pictures, notes)
    assert notes.lines[0].endswith(f" changed ({str(path)!r}: No such file or directory); they are made again")
    draw_picture(path, 2, size=(64, 48))
    assert said(folder, pictures)[0][0].startswith("cache hit")  # it is the same picture again


def test_rows_of_a_picture_that_is_gone_are_dropped_where_that_is_wanted(
    folder: Path, pictures: PictureProcessor
) -> None:
    chosen = {"on_bad_row": "drop", "max_dropped_fraction": 0.5}
    assert len(said(folder, pictures, **chosen)[1].splits["train"]) == 8
    (folder / "images/2.png").unlink()
    assert len(said(folder, pictures, **chosen)[1].splits["train"]) == 6


def test_a_picture_that_changed_while_a_run_was_killed(folder: Path, pictures: PictureProcessor) -> None:
    """What a killed run had done is taken up, but not with a picture that is another one now."""
    for changed in (False, True):
        with pytest.raises(KeyboardInterrupt):
            prepare(folder, pictures, Notes(stop_at=6), max_length=128 + changed)
        if changed:
            draw_picture(folder / "images/0.png", 50)
        lines, prepared = said(folder, pictures, max_length=128 + changed)
        assert len(prepared.splits["train"]) == 8
        assert prepared.splits["train"].images()[0].path == str(folder / "images/0.png")
        assert find_changed_picture(prepared.splits["train"].image_files()) is None
        if changed:
            assert lines[1] == (
                f"a picture changed since an earlier run left off ({str(folder / 'images/0.png')!r} is another one "
                "now); starting at the first row"
            )
        else:
            assert lines[1].startswith("going on at row ")


def test_rows_of_another_picture_folder_are_another_entry(folder: Path, pictures: PictureProcessor) -> None:
    """The rows are the same, and the pictures' bytes; but stored rows hold whole paths."""
    said(folder, pictures)
    for number, size in enumerate(((48, 32), (32, 32), (64, 48), (48, 32))):
        draw_picture(folder / "copy/images" / f"{number}.png", number, size=size)
    lines, prepared = said(folder, pictures, image={"folder": str(folder / "copy")})
    assert lines[0].startswith("cache miss: ")
    assert "differs in picture_folder" in lines[0]
    assert {Path(image.path).parent for image in prepared.splits["train"].images()} == {folder / "copy/images"}
    assert said(folder, pictures, image={"folder": str(folder / "copy"), "allow_outside": True})[0][0].endswith(
        "differs in pictures_outside (False there, True here)"
    )
    # The same data by content: a run may go on where its pictures were moved.
    assert prepared.identity == said(folder, pictures)[1].identity


def test_bounds_of_pixels_are_another_entry_and_other_data(folder: Path, pictures: PictureProcessor) -> None:
    first = said(folder, pictures)[1]
    smaller = PictureProcessor(build_vision_model("qwen2_vl")[1], max_pixels=1024)
    lines, second = said(folder, smaller)
    assert "differs in pictures" in lines[0]
    assert first.fingerprint != second.fingerprint


def test_rows_with_pictures_need_a_model_that_reads_them(folder: Path) -> None:
    with pytest.raises(LoralabError):
        prepare(folder, None, Notes())


def test_a_folder_in_a_pictures_place_has_changed(folder: Path, pictures: PictureProcessor) -> None:
    file = said(folder, pictures)[1].splits["train"].image_files()[0]
    Path(file.path).unlink()
    Path(file.path).mkdir()
    assert find_changed_picture([file]) == f"{file.path!r} is another one now"
