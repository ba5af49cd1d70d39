"""A model's processor, asked about pictures: their tokens, their pixels, and who is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from loralab.data.example import ImageFile
from loralab.data.images.files import ImageFolder
from loralab.data.images.processor import PictureProcessor
from loralab.data.images.reader import PictureReader
from loralab.errors import ConfigError, DataError, ModelError, TemplateError
from loralab.models.vision import load_processor
from support.tiny_vision import VISION_FAMILIES, build_vision_model, draw_picture

SIZES = ((48, 32), (32, 32), (64, 48), (17, 90), (1, 1))


@pytest.fixture(scope="module")
def processors() -> dict[str, Any]:
    return {family: build_vision_model(family)[1] for family in VISION_FAMILIES}


def look(folder: Path, number: int, size: tuple[int, int]) -> ImageFile:
    draw_picture(folder / f"{number}.png", number, size=size)
    return ImageFolder(folder, False, folder / "kept").open(f"{number}.png")


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_a_prompt_is_what_the_processor_itself_makes_of_it(
    processors: dict[str, Any], family: str, tmp_path: Path
) -> None:
    """Told from sizes alone, of any content."""
    processor = processors[family]
    pictures = PictureProcessor(processor)
    files = [look(tmp_path, n, size) for n, size in enumerate(SIZES)]
    text = f"a {pictures.marker} b {pictures.marker} {pictures.marker} c {pictures.marker} d {pictures.marker}"
    shown = [Image.open(file.path).convert("RGB") for file in files]
    own = processor(text=[text], images=[shown], add_special_tokens=False, return_tensors="pt")
    ids, placed = pictures.place(processor.tokenizer(text, add_special_tokens=False)["input_ids"], files)
    assert ids == own["input_ids"][0].tolist()
    assert [image.file for image in placed] == files
    marker = pictures.token
    for image in placed:
        assert marker in ids[image.start : image.end]
        assert pictures.feature_count(image.file) == ids[image.start : image.end].count(marker)
    inside = {n for image in placed for n in range(image.start, image.end)}
    assert all(token != marker for n, token in enumerate(ids) if n not in inside)
    read = pictures.read(files)
    assert read.keys() <= own.keys()
    assert torch.equal(read["pixel_values"], own["pixel_values"]) or family == "idefics3"
    if "image_grid_thw" in own:
        assert torch.equal(read["image_grid_thw"], own["image_grid_thw"])
        grids = own["image_grid_thw"].tolist()
        assert [(1, 2 * image.rows, 2 * image.columns) for image in placed] == [tuple(grid) for grid in grids]


@pytest.mark.parametrize("markers", [0, 1, 3])
def test_markers_and_pictures_go_one_to_one(processors: dict[str, Any], markers: int, tmp_path: Path) -> None:
    pictures = PictureProcessor(processors["qwen2_vl"])
    files = [look(tmp_path, n, (32, 32)) for n in range(2)]
    with pytest.raises(TemplateError) as caught:
        pictures.place([5, *[pictures.token] * markers, 6], files)
    (problem,) = caught.value.problems
    assert problem.what == f"2 pictures, but {markers} times <|image_pad|> in the rendered prompt"


def test_text_without_pictures_stays_as_it_is(processors: dict[str, Any]) -> None:
    pictures = PictureProcessor(processors["qwen2_vl"])
    assert pictures.place([1, 2, 3], []) == ([1, 2, 3], ())
    with pytest.raises(TemplateError, match="0 pictures, but 1 times"):
        pictures.place([1, pictures.token], [])


@pytest.mark.parametrize("size", [(300, 1), (1, 300)])
def test_a_size_that_the_processor_refuses_is_named(processors: dict[str, Any], size: tuple[int, int]) -> None:
    with pytest.raises(DataError, match=f"refuses a picture of {size[0]} x {size[1]} pixels: .*ratio"):
        PictureProcessor(processors["qwen2_vl"]).expand(*size)


def test_bounds_decide_on_tokens_and_pixels(tmp_path: Path) -> None:
    file = look(tmp_path, 0, (64, 64))
    bounds = ((None, None), (None, 1024), (4096, 9999))
    own, small, large = (PictureProcessor(build_vision_model("qwen2_vl")[1], *each) for each in bounds)
    assert [p.feature_count(file) for p in (own, small, large)] == [16, 4, 16]
    tiny_one = look(tmp_path, 1, (16, 16))
    assert [p.feature_count(tiny_one) for p in (own, small, large)] == [1, 1, 16]
    # Four patches a feature.
    assert [len(p.read([file])["pixel_values"]) for p in (own, small, large)] == [64, 16, 64]
    assert len({p.fingerprint for p in (own, small, large)}) == 3
    assert PictureProcessor(build_vision_model("qwen2_vl")[1]).fingerprint == own.fingerprint
    small.save(tmp_path / "saved")  # with its bounds
    saved = PictureProcessor(load_processor(str(tmp_path / "saved"), revision=None, trust_remote_code=False))
    assert (saved.feature_count(file), saved.fingerprint) == (4, small.fingerprint)


@pytest.mark.parametrize(
    ("family", "low", "high", "key"),
    [
        ("llava", None, 1024, "data.image.max_pixels"),
        ("llava", 64, None, "data.image.min_pixels"),
        ("idefics3", None, 1024, "data.image.max_pixels"),
        ("qwen2_vl", 2048, 1024, "data.image.min_pixels, data.image.max_pixels"),
        ("qwen2_vl", 5000, None, "data.image.min_pixels, data.image.max_pixels"),
    ],
)
def test_bounds_without_meaning_are_refused(
    processors: dict[str, Any], family: str, low: Any, high: Any, key: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        PictureProcessor(processors[family], low, high)
    assert key in caught.value.problems[0].where


def test_a_processor_without_a_token_for_pictures_is_refused(processors: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="has no token for pictures"):
        PictureProcessor(processors["qwen2_vl"].tokenizer)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_what_is_made_of_a_picture_depends_on_no_other(processors: dict[str, Any], family: str, tmp_path: Path) -> None:
    pictures = PictureProcessor(processors[family])
    files = [look(tmp_path, n, (48, 32)) for n in range(3)]
    together = pictures.read(files)
    alone = pictures.join([pictures.read([file]) for file in files])
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[name], alone[name]) for name in together)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_a_probe_has_the_same_tokens_and_other_pictures(processors: dict[str, Any], family: str) -> None:
    pictures = PictureProcessor(processors[family])
    one, same, other = (pictures.probe(number) for number in (0, 0, 1))
    assert one.branch.prompt_ids.tolist() == other.branch.prompt_ids.tolist() == one.own["input_ids"][0].tolist()
    assert torch.equal(one.tensors["pixel_values"], same.tensors["pixel_values"])
    assert not torch.equal(one.tensors["pixel_values"], other.tensors["pixel_values"])
    assert len(one.branch.images) == 2


class Known:
    """Features that are known, one row of D = 2 for each byte of the picture's number."""

    def load(self, file: ImageFile) -> torch.Tensor:
        return torch.full((file.width // 16, 2), float(file.modified_ns))


def test_a_reader_gives_pixels_or_known_features(processors: dict[str, Any], tmp_path: Path) -> None:
    pictures = PictureProcessor(processors["qwen2_vl"])
    reader = PictureReader(pictures, 3)
    assert (reader.token, reader.axes) == (pictures.token, 3)
    file = look(tmp_path, 0, (48, 32))
    assert torch.equal(reader.read([file])["pixel_values"], pictures.read([file])["pixel_values"])
    files = [ImageFile("/gone", f"{n:064x}", 16 * n, 16, 1, n) for n in (2, 1)]
    features = reader.knowing(Known()).read(files)
    assert features.keys() == {"features"}
    np.testing.assert_array_equal(features["features"].numpy(), [[2, 2], [2, 2], [1, 1]])
    assert reader.knowing(Known()).knowing(None) == reader
