"""What of a frozen base one process holds: all of it, or its part where the processes of a run share the layers.

Owns the counting on a model without numbers; cutting is `sharding.py`'s.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from loralab.config.schema import Config
from loralab.models.blueprint import Blueprint, describe_weights
from loralab.models.stored_weights import is_mapped
from loralab.training.distributed import ALONE, Processes
from loralab.training.sharding import decoder_layers

_CUTTING = ("fsdp2", "zero3")
# The layer that computes is whole, and so is the next one, which is gathered meanwhile.
_WHOLE_LAYERS = 2


@dataclass(frozen=True, slots=True)
class HeldBase:
    """The frozen weights of one process, in bytes.

    Attributes:
        own: memory of the process.
        mapped: pages of the weights' files, which can be dropped and read again.
    """

    own: int
    mapped: int


def held_base(config: Config, blueprint: Blueprint, processes: Processes = ALONE) -> HeldBase:
    """Return what one process holds of the base while it trains.

    Args:
        config: the configuration.
        blueprint: the model without numbers.
        processes: those that share the run.

    Raises:
        ConfigError: the layers are to be cut, and the base has no list of them.
    """
    weights = describe_weights(blueprint.model)
    packed = int((weights["quantized"] or {}).get("bytes", 0))
    frozen, grown = int(weights["frozen_bytes"]), int(weights["grown_bytes"])
    if config.training.distributed in _CUTTING and processes.count > 1:
        return HeldBase(frozen - _elsewhere(blueprint, processes.count) + packed, 0)
    if is_mapped(config.model, blueprint):
        return HeldBase(grown + packed, frozen - grown)
    return HeldBase(frozen + packed, 0)


def _elsewhere(blueprint: Blueprint, parts: int) -> int:
    """Return the bytes of layers that lie in other processes, at the moment when most of them are here."""
    layers = [_frozen_bytes(layer) for layer in decoder_layers(blueprint.model)]
    cut = sum(sorted(layers)[:-_WHOLE_LAYERS])
    return cut - -(-cut // parts)


def _frozen_bytes(module: nn.Module) -> int:
    frozen: Iterable[nn.Parameter] = (weight for weight in module.parameters() if not weight.requires_grad)
    return sum(weight.numel() * weight.element_size() for weight in frozen)
