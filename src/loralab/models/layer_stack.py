"""The numbered decoder layers of a model, which of them a setting means, and whether they are computed again.

Owns where a model keeps its layers; families name the list differently (`h`, `layers`, `blocks`).
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from loralab.errors import ConfigError

_FIRST_NUMBER = re.compile(r"(.*?[^.]+)\.\d+\.")
_WHERE = "key lora.layers_to_transform"


@dataclass(frozen=True, slots=True)
class LayerStack:
    """The list of decoder layers.

    Attributes:
        pattern: last part of the list's name, which is PEFT's `layers_pattern`.
        count: how many layers it holds.
    """

    pattern: str
    count: int

    def number_of(self, name: str) -> int | None:
        """Return the number of the decoder layer that the module `name` lies in, or None where it lies in none."""
        # The first number counts, as in PEFT: a later one is an expert's.
        found = re.match(rf"(?:^|.*?\.){re.escape(self.pattern)}\.(\d+)\.", name)
        return int(found.group(1)) if found else None


def find_layer_stack(base: PreTrainedModel, names: Iterable[str]) -> LayerStack | None:
    """Return the list of decoder layers, or None where no module of `names` lies in a numbered one.

    Args:
        base: the base model.
        names: full names of its linear layers.
    """
    holders = Counter(found.group(1) for name in names if (found := _FIRST_NUMBER.match(name)))
    lists = {holder: base.get_submodule(holder) for holder in holders}
    counts = {holder: len(held) for holder, held in lists.items() if isinstance(held, nn.ModuleList)}
    if not counts:
        return None
    wanted = getattr(base.config.get_text_config(), "num_hidden_layers", None)
    # A model with a vision tower has two lists: the one as long as its configuration says is the decoder's.
    holder = max(counts, key=lambda name: (counts[name] == wanted, holders[name]))
    return LayerStack(holder.rpartition(".")[2], counts[holder])


def resolve_layers(setting: Sequence[int], stack: LayerStack | None) -> list[int]:
    """Return the decoder layers that `lora.layers_to_transform` means, in order.

    Args:
        setting: numbers from 0, or negative ones from the end.
        stack: the model's layers.

    Raises:
        ConfigError: there is no such layer, or the list is empty.
    """
    if stack is None:
        raise ConfigError(
            f"layers_to_transform {list(setting)}: this model has no numbered layers", where=_WHERE, fix="remove it"
        )
    fix = f"give numbers from 0 to {stack.count - 1}, or from -{stack.count} to -1, counted from the end"
    if not setting:
        raise ConfigError("layers_to_transform names no layer: []", where=_WHERE, fix=fix)
    outside = [number for number in setting if not -stack.count <= number < stack.count]
    if outside:
        raise ConfigError(f"no layer {outside[0]}: the model has {stack.count} layers", where=_WHERE, fix=fix)
    return sorted({number % stack.count for number in setting})


def enable_recomputation(base: PreTrainedModel, **further: Any) -> None:
    """Let a base model recompute its layers' activations in the backward sweep.

    Args:
        base: without adapter.
        **further: for `torch.utils.checkpoint.checkpoint`.
    """
    enable: Any = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": False, **further})
