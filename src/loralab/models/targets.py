"""Which layers get an adapter.

Owns the choice of target layers by name, and why some can take none.
"""

import re
from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loralab.config.schema import LoraConfig
from loralab.errors import ConfigError
from loralab.lookup import nearest_name
from loralab.models.precision import Resolved

# PEFT refuses these by name: Mamba's kernels take the weights and never call the layers.
FUSED_FAMILIES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
_FUSED_LAYERS = frozenset({"out_proj", "conv1d"})
_ATTENTION = re.compile(r"(^|\.)(self_attn|self_attention|attention|attn)(\.|$)")


def linear_layers(base: PreTrainedModel) -> dict[str, nn.Module]:
    """Return every linear layer but the output head, by full name."""
    head = base.get_output_embeddings()
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def resolve_target_modules(base: PreTrainedModel, lora: LoraConfig) -> Resolved[list[str]]:
    """Choose the layers that get an adapter, by the last part of their names.

    Raises:
        ConfigError: a name that matches no linear layer; the names that exist are listed.
    """
    layers = linear_layers(base)
    setting = lora.target_modules
    fused = _fused_names(base)
    if setting == "auto":
        left_out = f" and {', '.join(sorted(fused))}, which its fused kernels read past an adapter" if fused else ""
        names = [name for name in _last_parts(layers) if name not in fused]
        return Resolved(names, f"all linear layers but the head{left_out}")
    if setting == "attention":
        inside = [name for name in layers if _ATTENTION.search(name.rpartition(".")[0])]
        if inside:
            return Resolved(_telling_parts(inside, layers), "the linear layers inside attention")
        raise ConfigError(
            "no attention layer was recognised by name",
            where="key lora.target_modules",
            fix=f"list names: {', '.join(name for name in _last_parts(layers) if name not in fused)}",
        )
    names = [setting] if isinstance(setting, str) else setting
    _check_named(base, names, fused)
    known = _last_parts(layers)
    missing = [name for name in names if not any(layer == name or layer.endswith(f".{name}") for layer in layers)]
    if missing or not names:
        near = nearest_name(missing[0], known) if missing else None
        hint = f"did you mean {near!r}? " if near else ""
        raise ConfigError(
            f"no linear layer is named {', '.join(map(repr, missing)) or '(nothing)'}",
            where="key lora.target_modules",
            fix=f"{hint}layers of this model: {', '.join(known)}",
        )
    return Resolved(list(names), "set in lora.target_modules")


def _fused_names(base: PreTrainedModel) -> frozenset[str]:
    """Return the layers whose weights a model's kernels read by themselves, so that an adapter has no effect."""
    return _FUSED_LAYERS if base.config.model_type in FUSED_FAMILIES else frozenset()


def _check_named(base: PreTrainedModel, names: Sequence[str], fused: frozenset[str]) -> None:
    """Check that layers chosen by name can take an adapter.

    Raises:
        ConfigError: one is the head, the embedding, or read past an adapter; it is named.
    """
    modules = dict(base.named_modules())
    for name in names:
        found = [module for full, module in modules.items() if full == name or full.endswith(f".{name}")]
        if name.rpartition(".")[2] in fused:
            reason = "is read by the model's fused kernels, which would pass an adapter by"
        elif any(module is base.get_output_embeddings() for module in found):
            reason = "is the output head, which takes no adapter in this version"
        elif any(isinstance(module, nn.Embedding) for module in found):
            reason = "is an embedding, which takes no adapter in this version"
        else:
            continue
        others = ", ".join(part for part in _last_parts(linear_layers(base)) if part not in fused)
        raise ConfigError(
            f"layer {name!r} {reason}", where="key lora.target_modules", fix=f"layers of this model: {others}"
        )


def _last_parts(names: "dict[str, nn.Module] | list[str]") -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _telling_parts(names: Sequence[str], layers: Mapping[str, nn.Module]) -> list[str]:
    """Return the shortest name endings that match `names` and no other layer."""
    others = [layer for layer in layers if layer not in set(names)]

    def ending(name: str) -> str:
        parts = name.split(".")
        tails = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        return next(tail for tail in tails if not any(f".{other}".endswith(f".{tail}") for other in others))

    return sorted({ending(name) for name in names})
