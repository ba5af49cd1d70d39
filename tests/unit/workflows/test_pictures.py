"""The check of a loaded model's pictures: right where they are, and loud where anything about them is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loralab.config.load import load_config
from loralab.config.schema import LoraConfig
from loralab.data.images.processor import PictureProcessor
from loralab.data.images.reader import PictureReader
from loralab.errors import ConfigError, ModelError
from loralab.layout import tree
from loralab.layout.planner import Planner
from loralab.models import picture_features, supervised
from loralab.models.adapters import build_adapter
from loralab.workflows.pictures import check_pictures, open_pictures, reading_pictures
from support import tiny
from support.tiny_vision import VISION_FAMILIES, build_vision_model, save_vision_base


def build(family: Any) -> Any:
    base, processor = build_vision_model(family)
    base.requires_grad_(False)
    return build_adapter(base, LoraConfig(r=2), seed=0)[0], PictureProcessor(processor)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_a_known_family_passes(family: str) -> None:
    model, pictures = build(family)
    model.train()
    found = check_pictures(model, pictures)
    assert found.value == "features first"
    assert "two probe pictures" in found.reason
    assert model.training


def as_depths(length: int, _images: Any, *, axes: int) -> Any:
    return np.broadcast_to(np.arange(length, dtype=np.int64), (axes, length))


def columns_first(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda length, images, *, axes: original(length, images, axes=axes)[[0, 2, 1]]


def one_further(original: Callable[..., Any]) -> Callable[..., Any]:
    """Put each picture's features in with the first one last."""
    return lambda model, tensors: original(model, tensors).roll(1, dims=0)


def scaled(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda embeddings, features, pictures: original(embeddings, features * 1.01, pictures)


def left_out(_original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda embeddings, features, pictures: embeddings


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [
        (tree, "token_positions", lambda original: as_depths),
        (tree, "token_positions", columns_first),
        (supervised, "encode_pictures", one_further),
        (supervised, "put_in", scaled),
        (supervised, "put_in", left_out),
    ],
    ids=["depths", "columns first", "features moved", "features scaled", "features left out"],
)
def test_whatever_is_wrong_fails(module: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pictures = build("qwen2_vl")
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    with pytest.raises(ModelError, match="reads pictures in another way than is known here"):
        check_pictures(model, pictures)


def test_a_model_blind_to_its_pictures_is_not_waved_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a number is no small difference."""
    model, pictures = build("llava")
    original = picture_features.encode_pictures
    monkeypatch.setattr(supervised, "encode_pictures", lambda m, t: original(m, t) * float("nan"))
    with pytest.raises(ModelError):
        check_pictures(model, pictures)


def config_of(folder: Path, *overrides: str) -> Any:
    return load_config(tiny.run_config(folder, folder / "rows.json", folder / "run"), overrides).config


def test_pictures_are_opened_with_the_bounds_of_the_configuration(tmp_path: Path) -> None:
    folder = save_vision_base(tmp_path / "base")
    own, smaller = open_pictures(config_of(folder)), open_pictures(config_of(folder, "data.image.max_pixels=1024"))
    assert own is not None
    assert smaller is not None
    assert (len(own.expand(64, 64).ids), len(smaller.expand(64, 64).ids)) == (16, 4)
    # An adapter's own processor goes before the base's.
    smaller.save(tmp_path / "adapter")
    again = open_pictures(config_of(folder), folder=tmp_path / "adapter")
    assert again is not None
    assert len(again.expand(64, 64).ids) == 4


def test_keys_of_pictures_are_refused_where_none_are_read(tmp_path: Path) -> None:
    folder = tiny.save_base(tmp_path / "base")
    assert open_pictures(config_of(folder)) is None
    with pytest.raises(ConfigError) as caught:
        open_pictures(config_of(folder, "data.image.max_pixels=1024"))
    (problem,) = caught.value.problems
    assert "data.image.max_pixels has no effect" in problem.what
    assert problem.where == "key data.image.max_pixels"


def test_a_planner_reads_pictures_where_its_model_does() -> None:
    model, pictures = build("qwen2_vl")

    class Prompting:
        def __init__(self, held: PictureProcessor | None) -> None:
            self.pictures = held

    planner = Planner(100)
    assert reading_pictures(planner, Prompting(None), model) is planner  # type: ignore[arg-type]
    found = reading_pictures(planner, Prompting(pictures), model)  # type: ignore[arg-type]
    assert found.pictures == PictureReader(pictures, 3)
