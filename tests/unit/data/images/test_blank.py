"""Grey pictures: of the same tokens and shapes, alike whatever was shown, and never all zero."""

from pathlib import Path

import pytest
import torch

from loralab.data.images.blank import blanked
from loralab.data.images.processor import PictureProcessor
from loralab.workflows.given_pictures import look_at_given
from support.tiny_vision import VISION_FAMILIES, build_vision_model, draw_picture


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_blank_pictures_have_the_shapes_of_those_they_stand_for(family, tmp_path: Path) -> None:
    sizes = [(48, 32), (64, 48), (48, 32)]
    paths = [str(draw_picture(tmp_path / f"{number}.png", number, size=size)) for number, size in enumerate(sizes)]
    files = look_at_given(paths, where="x")
    pictures = PictureProcessor(build_vision_model(family)[1])
    blank = blanked(pictures)
    seen, grey = pictures.read(files), blank.read(files)
    assert {name: value.shape for name, value in seen.items()} == {name: value.shape for name, value in grey.items()}
    assert not torch.equal(seen["pixel_values"], grey["pixel_values"])
    first, third = blank.read(files[:1]), blank.read(files[2:])
    assert torch.equal(first["pixel_values"], third["pixel_values"])
    # Idefics takes a picture of zeros for padding.
    pixels = first["pixel_values"]
    assert pixels.abs().flatten(-min(3, pixels.dim() - 1)).sum(-1).min() > 0
    assert blank.place([pictures.token], files[:1]) == pictures.place([pictures.token], files[:1])
