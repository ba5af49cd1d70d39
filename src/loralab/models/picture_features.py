"""Pictures on their way into the decoder: encoded once each, and put in where their tokens stand.

Owns what a forward does with a micro-batch's pictures. Which families can be read so is `vision.py`'s.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from loralab.models.vision import position_axes, vision_family, vision_modules

# Features that are known already stand under this name, in the place of pixels.
FEATURES = "features"


class Pictures(Protocol):
    """The pictures of a micro-batch; `layout.collate.PictureBatch` is one."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What the vision tower takes of all of them, by name; or `features` (M, D)."""

    @property
    def counts(self) -> Sequence[int]:
        """Features of each picture."""

    @property
    def keys(self) -> Sequence[int]:
        """A number drawn from each picture's bytes."""

    @property
    def positions(self) -> Tensor:
        """Index into the R x L flattened positions of every feature that is put in (P)."""

    @property
    def features(self) -> Tensor:
        """Index into the features of all pictures of each (P)."""


def on_axes(position_ids: Tensor, config: PreTrainedConfig) -> Tensor:
    """Return positions in the form that a model takes: (R, L), or (A, R, L) where it has several axes.

    Args:
        position_ids: (R, L), which is then the same on all axes, or (A, R, L).
        config: the model's.
    """
    axes = position_axes(config)
    if position_ids.dim() == 3:
        return position_ids if axes > 1 else position_ids[0]
    return position_ids.expand(axes, *position_ids.shape) if axes > 1 else position_ids


def trains_vision(model: PreTrainedModel) -> bool:
    """Return whether a trained weight lies in the vision tower or its projector."""
    family = vision_family(model.config)
    if family is None:
        return False
    return any(p.requires_grad for part in vision_modules(model, family) for p in part.parameters())


def nothing_of_vision(model: nn.Module) -> Tensor:
    """Return a zero that depends on every trained weight of a vision tower, for rows that show no picture.

    Args:
        model: base with adapter.
    """
    base = cast(Any, model).language_model
    family = vision_family(base.config)
    parts = [] if family is None else vision_modules(base, family)
    weights = {id(p): p for part in parts for p in part.parameters() if p.requires_grad}
    place = cast(Any, model).embedding.weight.device  # of a base that is spread, parts of a tower may be elsewhere
    return torch.stack([weight.sum().to(place) for weight in weights.values()]).sum() * 0.0


def encode_pictures(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the features of pictures, one picture behind the other (M, D).

    Args:
        model: the base model, an adapter's layers in place.
        tensors: what its vision tower takes, by name; or `features`, which are returned as they are.
    """
    if FEATURES in tensors:
        return tensors[FEATURES]
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains_vision(model)):
        found = cast(Any, model).get_image_features(**tensors, return_dict=True).pooler_output
    return torch.cat(list(found)) if isinstance(found, (list, tuple)) else found.flatten(0, -2)


def blank_features(model: PreTrainedModel, pictures: Pictures) -> Tensor:
    """Return features without numbers, in a plan: a tower's forward reads sizes that are numbers themselves.

    Args:
        model: the base model on the meta device.
        pictures: of a micro-batch.
    """
    weight = cast(Any, model.get_input_embeddings()).weight
    shape = sum(pictures.counts), weight.shape[-1]
    return torch.empty(shape, dtype=weight.dtype, device=weight.device, requires_grad=trains_vision(model))


def put_in(embeddings: Tensor, features: Tensor, pictures: Pictures) -> Tensor:
    """Return embeddings (R, L, D) with the features of pictures in the place of their tokens.

    Args:
        embeddings: of the token ids (R, L, D).
        features: of all pictures (M, D).
        pictures: where they go.
    """
    chosen = features[pictures.features.to(features.device)].to(embeddings)
    places = pictures.positions.to(embeddings.device)
    return embeddings.flatten(0, 1).index_copy(0, places, chosen).view_as(embeddings)
