"""What a model's processor makes of a picture: the tokens that stand for it, and its pixels.

Owns the bounds on pixels and the count of tokens. A picture's tokens are a function of its size alone, so
they are asked of the processor with a blank picture: nothing is decoded until a batch needs it.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from loralab.data.example import Branch, ImageFile, PlacedImage
from loralab.data.images.files import decode
from loralab.errors import ConfigError, ModelError, TemplateError

# Sizes whose tokens are remembered.
_REMEMBERED = 65_536
_BOUNDS = ("shortest_edge", "longest_edge")
# What of a processor decides on the number of tokens, where it has it.
_DECIDING = ("patch_size", "image_seq_len", "num_additional_image_tokens", "vision_feature_select_strategy")
# Width and height of the pictures that a model is probed with.
_PROBED = ((64, 64), (112, 56))
# Sizes whose tokens an adapter's contract promises.
_PROMISED = ((64, 64), (640, 480), (1920, 1080))
# Of pixels as (row, pictures, channels, height, width).
_PIXEL_AXES_OF_ROWS = 5


@dataclass(frozen=True, slots=True)
class Expansion:
    """The tokens that stand for pictures of one size.

    Attributes:
        ids: token ids.
        rows: rows of features, where positions go by rows and columns; else 0.
        columns: columns of features, likewise.
    """

    ids: tuple[int, ...]
    rows: int = 0
    columns: int = 0


@dataclass(frozen=True, slots=True)
class PictureProbe:
    """Two small pictures of unlike shape in a prompt, for a look at what a model makes of them.

    Attributes:
        branch: prompt with the pictures' tokens, and one token behind it.
        tensors: what the vision tower takes of both.
        own: what the processor itself makes of text and pictures, for the model's own forward.
    """

    branch: Branch
    tensors: dict[str, Tensor]
    own: dict[str, Tensor]


@dataclass(slots=True)
class PictureProcessor:
    """A model's processor, asked about pictures.

    Args:
        processor: with image processor and tokenizer.
        min_pixels: smaller pictures are enlarged to so many, or None for the processor's own bound.
        max_pixels: larger pictures are shrunk to so many, or None for the processor's own bound.

    Attributes:
        marker: text of the token that stands for a picture in a rendered prompt.
        token: its id; each such token of an expansion takes one feature.

    Raises:
        ModelError: the processor has no token for pictures.
        ConfigError: a bound on pixels that it does not know.
    """

    processor: ProcessorMixin
    min_pixels: int | None = None
    max_pixels: int | None = None
    marker: str = field(init=False)
    token: int = field(init=False)
    _known: dict[tuple[int, int], Expansion] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        marker = getattr(self.processor, "image_token", None)
        if not isinstance(marker, str):
            raise ModelError(
                f"{type(self.processor).__name__} has no token for pictures",
                where="key model.name",
                fix="take a model of the kind qwen2_vl, qwen2_5_vl, llava, idefics3 or smolvlm",
            )
        self.marker = marker
        self.token = int(self._tokenizer.convert_tokens_to_ids(marker))
        self._set_bounds()

    @property
    def _tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer")  # noqa: B009 - set by the processor's class, unknown to its base

    @property
    def _images(self) -> Any:
        return getattr(self.processor, "image_processor")  # noqa: B009 - likewise

    def _set_bounds(self) -> None:
        """Give the processor the bounds on pixels, so that it is saved with them."""
        given = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        chosen = [name for name, value in given.items() if value is not None]
        size = {name: value for name, value in dict(self._images.size or {}).items() if value is not None}
        if not chosen:
            return
        if not set(size) >= set(_BOUNDS):
            raise ConfigError(
                f"data.image.{chosen[0]} has no meaning for {type(self._images).__name__}, which makes every picture "
                f"{', '.join(f'{k} {v}' for k, v in size.items())}",
                where=f"key data.image.{chosen[0]}",
                fix="remove it",
            )
        low, high = self.min_pixels or int(size[_BOUNDS[0]]), self.max_pixels or int(size[_BOUNDS[1]])
        if low > high:
            raise ConfigError(
                f"pictures of at least {low} and at most {high} pixels: there are none",
                where="keys data.image.min_pixels, data.image.max_pixels",
                fix="raise max_pixels, or lower min_pixels",
            )
        self._images.size = dict(zip(_BOUNDS, (low, high), strict=True))

    def save(self, folder: Path) -> None:
        """Write the processor's files, bounds on pixels included, so that others load it from there."""
        self.processor.save_pretrained(str(folder))

    def promise(self) -> dict[str, Any]:
        """Return what an adapter's contract says of pictures: the marker, and how many tokens some sizes become."""
        sizes = {f"{width}x{height}": len(self.expand(width, height).ids) for width, height in _PROMISED}
        version = importlib.metadata.version("transformers")
        return {
            "marker": self.marker,
            "token": self.token,
            "tokens": sizes,
            "transformers": version,
            "sha256": self.fingerprint,
        }

    def expand(self, width: int, height: int) -> Expansion:
        """Return the tokens that stand for a picture of this size.

        Raises:
            TemplateError: the processor refuses pictures of this size.
        """
        found = self._known.get((width, height))
        if found is None:
            found = self._ask(width, height)
            if len(self._known) < _REMEMBERED:
                self._known[width, height] = found
        return found

    def _ask(self, width: int, height: int) -> Expansion:
        blank = Image.new("RGB", (width, height))
        try:
            made: Any = self.processor(
                text=[self.marker],
                images=[[blank]],
                add_special_tokens=False,
                return_tensors="pt",
            )
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
            raise TemplateError(
                f"the processor refuses a picture of {width} x {height} pixels: {' '.join(str(error).split())[:160]}",
                where=f"picture of {width} x {height} pixels",
                fix="leave it out, or make it another size",
            ) from error
        ids = tuple(int(token) for token in made["input_ids"][0].tolist())
        grid = made.get("image_grid_thw")
        if grid is None:
            return Expansion(ids)
        merge = int(self._images.merge_size)
        _, rows, columns = (int(number) for number in grid[0].tolist())
        return Expansion(ids, rows // merge, columns // merge)

    def place(self, ids: Sequence[int], files: Sequence[ImageFile]) -> tuple[list[int], tuple[PlacedImage, ...]]:
        """Return a prompt with the tokens of its pictures in the place of their markers.

        Args:
            ids: of the rendered prompt, one marker for each picture.
            files: the pictures, in order.

        Raises:
            TemplateError: markers and pictures do not go one to one.
        """
        markers = [index for index, token in enumerate(ids) if token == self.token]
        if len(markers) != len(files):
            raise TemplateError(
                f"{len(files)} pictures, but {len(markers)} times {self.marker} in the rendered prompt",
                where="key data.template",
                fix=f"choose a template that writes {self.marker} once for each picture (the model's own: tokenizer), "
                "and keep that token out of the text",
            )
        whole: list[int] = []
        placed: list[PlacedImage] = []
        last = 0
        for index, file in zip(markers, files, strict=True):
            expansion = self.expand(file.width, file.height)
            whole += ids[last:index]
            placed.append(PlacedImage(file, len(whole), len(expansion.ids), expansion.rows, expansion.columns))
            whole += expansion.ids
            last = index + 1
        whole += ids[last:]
        return whole, tuple(placed)

    def probe(self, number: int) -> PictureProbe:
        """Return two noisy pictures in a prompt.

        Args:
            number: other pictures for each number; their sizes, and so all tokens, are the same.
        """
        noise = np.random.default_rng(number)
        shown = [
            Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8)) for width, height in _PROBED
        ]
        text = f"a b {self.marker} c {self.marker} d e"
        own: Any = self.processor(text=[text], images=[shown], add_special_tokens=False, return_tensors="pt")
        files = [ImageFile("", f"{place:064x}", *size, 0, 0) for place, size in enumerate(_PROBED)]
        ids, placed = self.place(self._tokenizer(text, add_special_tokens=False)["input_ids"], files)
        branch = Branch(np.asarray(ids, dtype=np.int32), np.asarray(ids[:1], dtype=np.int32), placed)
        return PictureProbe(branch, self.join([self._pixels(each) for each in shown]), dict(own))

    def feature_count(self, file: ImageFile) -> int:
        """Return how many features a picture has."""
        return self.expand(file.width, file.height).ids.count(self.token)

    def read(self, files: Sequence[ImageFile]) -> dict[str, Tensor]:
        """Decode pictures and return the tensors that the model's vision tower takes of all of them.

        Each picture goes through the processor alone, so that what is made of it depends on no other.

        Args:
            files: at least one.

        Raises:
            DataError: a file is not what it was, or cannot be decoded.
        """
        return self.join([self._pixels(decode(file)) for file in files])

    def join(self, made: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the tensors of several pictures, or groups of them, as those of all, in order.

        Args:
            made: at least one, each as `read` returns it.
        """
        # Some families have an axis for the row before the one of pictures.
        axis = 1 if made[0]["pixel_values"].dim() == _PIXEL_AXES_OF_ROWS else 0
        return {name: torch.cat([each[name] for each in made], dim=axis) for name in made[0]}

    def _pixels(self, picture: Image.Image) -> dict[str, Tensor]:
        found = self._images(images=[[picture]], return_tensors="pt")
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides on tokens and pixels."""
        held = json.loads(self._images.to_json_string())
        own = [getattr(self.processor, name, None) for name in _DECIDING]
        whole = [type(self.processor).__name__, held, self.marker, self.token, own]
        return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()
