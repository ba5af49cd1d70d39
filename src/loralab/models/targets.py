"""Which layers get an adapter.

Owns the choice of target layers by name, and why some can take none; and `placement`, which puts
all settings of where an adapter sits into the words of PEFT's configuration.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loralab.config.schema import LoraConfig
from loralab.errors import ConfigError
from loralab.lookup import nearest_name
from loralab.models.layer_stack import find_layer_stack, resolve_layers
from loralab.models.precision import Resolved
from loralab.models.trainable_tokens import resolve_trainable_tokens
from loralab.models.trained_modules import resolve_trained_modules, trained_names
from loralab.models.vision import is_projector_layer, is_unread_layer, is_vision_layer, vision_family

# Mamba's kernels take the weights and never call the layers; PEFT refuses them by name, but for dt_proj.
FUSED_FAMILIES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
_FUSED_LAYERS = frozenset({"out_proj", "conv1d", "dt_proj"})
_ATTENTION = re.compile(r"(^|\.)(self_attn|self_attention|attention|attn)(\.|$)")
_PATTERN_SIGNS = re.compile(r"[\\^$*+?{}\[\]|()]")
_WHERE = "key lora.target_modules"


def linear_layers(base: PreTrainedModel) -> dict[str, nn.Module]:
    """Return every linear layer but the output head, by full name."""
    head = base.get_output_embeddings()
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    }


def _layers_in_reach(base: PreTrainedModel, lora: LoraConfig) -> dict[str, nn.Module]:
    """Return the linear layers that an adapter may sit on: of those that read pictures, what `lora.vision` says.

    Raises:
        ConfigError: the model reads no pictures, and `lora.vision` asks for layers that do.
    """
    layers, family = linear_layers(base), vision_family(base.config)
    if family is None:
        if lora.vision != "none":
            raise ConfigError(
                f"lora.vision is {lora.vision!r}, but a model of type {base.config.model_type!r} has no layers for "
                "pictures",
                where="key lora.vision",
                fix="remove it",
            )
        return layers
    layers = {name: m for name, m in layers.items() if not is_unread_layer(name, base.config, family)}
    if lora.vision == "all":
        return layers
    projector = lora.vision == "projector"
    return {
        name: module
        for name, module in layers.items()
        if not is_vision_layer(name, family) or (projector and is_projector_layer(name, family))
    }


def placement(lora: LoraConfig, base: PreTrainedModel, targets: Sequence[str]) -> dict[str, Any]:
    """Return where the adapter sits, as keyword arguments of a PEFT configuration.

    Only what was asked for is in it, so that configurations without, say, `rank_pattern` take it too.

    Args:
        lora: the adapter section, tokens by their ids.
        base: the base model, without an adapter.
        targets: names of target layers, as `resolve_target_modules` gives them.

    Raises:
        ConfigError: a setting that does not fit this model; what exists is named.
    """
    layers = adapted_layers(lora, base, targets)
    # PEFT takes a name that is a module's whole name past `layers_to_transform`: only what is meant is listed.
    meant = [target for target in targets if any(f".{layer}".endswith(f".{target}") for layer in layers)]
    arguments: dict[str, Any] = {"target_modules": meant}
    if lora.layers_to_transform is not None:
        stack = find_layer_stack(base, linear_layers(base))
        arguments["layers_to_transform"] = resolve_layers(lora.layers_to_transform, stack)
        arguments["layers_pattern"] = [stack.pattern] if stack is not None else []
    arguments |= resolve_trained_modules(base, lora) | resolve_trainable_tokens(base, lora)
    patterns: dict[str, Mapping[str, Any] | None] = {
        "rank_pattern": lora.rank_pattern,
        "alpha_pattern": lora.alpha_pattern,
    }
    for key, pattern in patterns.items():
        if pattern is not None:
            _check_pattern(key, pattern, layers)
            arguments[key] = dict(pattern)
    return arguments


def adapted_layers(lora: LoraConfig, base: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """Return the full names of the layers that get an adapter, in the model's order.

    Args:
        lora: the adapter section.
        base: the base model, without an adapter.
        targets: names of target layers, as `resolve_target_modules` gives them.

    Raises:
        ConfigError: a target has no layer left.
    """
    layers = linear_layers(base)
    left = list(layers)
    if lora.layers_to_transform is not None:
        stack = find_layer_stack(base, layers)
        numbers = set(resolve_layers(lora.layers_to_transform, stack))
        left = [name for name in left if stack is not None and stack.number_of(name) in numbers]
    whole = trained_names(base, resolve_trained_modules(base, lora).get("modules_to_save", ()))
    left = [name for name in left if name not in whole]
    chosen = [name for name in left if any(f".{name}".endswith(f".{target}") for target in targets)]
    empty = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in chosen)]
    # A name that the user gave must act; of those that auto found, some may lie outside the numbered layers.
    given = {lora.target_modules} if isinstance(lora.target_modules, str) else set(lora.target_modules)
    if not chosen or given & set(empty):
        causes = [key for key in ("layers_to_transform", "modules_to_save") if getattr(lora, key) is not None]
        raise ConfigError(
            f"no layer is left for {', '.join(map(repr, empty or targets))}",
            where=", ".join(f"key lora.{key}" for key in ("target_modules", *causes)),
            fix=f"layers that are left: {', '.join(_last_parts(left)) or '(none)'}",
        )
    _check_vision_acts(lora, base, chosen)
    return chosen


def _check_vision_acts(lora: LoraConfig, base: PreTrainedModel, chosen: Sequence[str]) -> None:
    """Check that an adapter sits on layers that read pictures, where `lora.vision` asks for it.

    Raises:
        ConfigError: other settings leave none of them.
    """
    family = vision_family(base.config)
    if lora.vision == "none" or family is None or any(is_vision_layer(name, family) for name in chosen):
        return
    causes = [key for key in ("target_modules", "layers_to_transform", "modules_to_save") if lora.chosen(key)]
    raise ConfigError(
        f"lora.vision is {lora.vision!r}, but {', '.join(f'lora.{key}' for key in causes)} leaves no layer that reads "
        "pictures",
        where=", ".join(f"key lora.{key}" for key in ("vision", *causes)),
        fix="remove lora.vision, or the other keys",
    )


def _check_pattern(key: str, pattern: Mapping[str, Any], layers: Sequence[str]) -> None:
    """Check that each entry of a pattern acts.

    Raises:
        ConfigError: an entry is no regular expression, or matches no adapted layer, or only such as an earlier one has.
    """
    where, names = f"key lora.{key}", ", ".join(_last_parts(layers))
    left = list(layers)
    for entry in pattern:
        # PEFT's own rule: the whole name, or its end behind a dot.
        expression = _compiled(entry, rf"(.*\.)?({entry})$", where)
        if not any(expression.match(name) for name in layers):
            near = nearest_name(entry, _last_parts(layers))
            hint = f"did you mean {near!r}? " if near else ""
            raise ConfigError(
                f"no adapted layer is named {entry!r}", where=where, fix=f"{hint}layers with an adapter: {names}"
            )
        if not any(expression.match(name) for name in left):
            raise ConfigError(
                f"{entry!r} comes too late: all its layers match an entry before it",
                where=where,
                fix="put it first, or remove it",
            )
        left = [name for name in left if not expression.match(name)]


def _compiled(shown: str, expression: str, where: str) -> "re.Pattern[str]":
    try:
        re.compile(shown)
        return re.compile(expression)
    except re.error as error:
        place = "" if error.pos is None else f" at character {error.pos + 1}"
        raise ConfigError(
            f"not a regular expression: {shown!r} ({error.msg}{place})", where=where, fix="mend it, or list names"
        ) from error


def resolve_target_modules(base: PreTrainedModel, lora: LoraConfig) -> Resolved[list[str]]:
    """Choose the layers that get an adapter, by the last parts of their names.

    Raises:
        ConfigError: a name that matches no linear layer; the names that exist are listed.
    """
    layers = _layers_in_reach(base, lora)
    setting = lora.target_modules
    fused = _fused_names(base)
    if setting in ("auto", "all-linear"):
        left_out = f" and {', '.join(sorted(fused))}, which its fused kernels read past an adapter" if fused else ""
        names = _telling_parts([name for name in layers if name.rpartition(".")[2] not in fused], base)
        return Resolved(names, f"all linear layers but the head{left_out}{_of_pictures(base, lora)}")
    if setting == "attention":
        inside = [name for name in layers if _ATTENTION.search(name.rpartition(".")[0])]
        if inside:
            return Resolved(_telling_parts(inside, base), "the linear layers inside attention")
        raise ConfigError(
            "no attention layer was recognised by name",
            where=_WHERE,
            fix=f"list names: {', '.join(name for name in _last_parts(layers) if name not in fused)}",
        )
    if isinstance(setting, str) and _PATTERN_SIGNS.search(setting):
        return _match_layers(base, setting, layers)
    names = [setting] if isinstance(setting, str) else setting
    _check_named(base, names, fused)
    known = _last_parts(layers)
    missing = [name for name in names if not any(layer == name or layer.endswith(f".{name}") for layer in layers)]
    if missing or not names:
        near = nearest_name(missing[0], [*known, "attention", "all-linear"]) if missing else None
        hint = f"did you mean {near!r}? " if near else ""
        raise ConfigError(
            f"no linear layer is named {', '.join(map(repr, missing)) or '(nothing)'}",
            where=_WHERE,
            fix=f"{hint}layers of this model: {', '.join(known)}",
        )
    if len(layers) < len(linear_layers(base)):  # the same names may stand in the vision tower too
        meant = [layer for layer in layers if any(f".{layer}".endswith(f".{name}") for name in names)]
        return Resolved(_telling_parts(meant, base), f"set in lora.target_modules{_of_pictures(base, lora)}")
    return Resolved(list(names), "set in lora.target_modules")


def _of_pictures(base: PreTrainedModel, lora: LoraConfig) -> str:
    """Return what to say of the layers that read pictures; nothing of a model that reads none."""
    if vision_family(base.config) is None:
        return ""
    said = {"none": "none of the vision tower's", "projector": "the projector's of the vision tower's", "all": "all"}
    return f"; of those that read pictures {said[lora.vision]} (lora.vision: {lora.vision})"


def _match_layers(base: PreTrainedModel, pattern: str, layers: Mapping[str, nn.Module]) -> Resolved[list[str]]:
    """Return the layers whose whole names a regular expression matches."""
    expression = _compiled(pattern, pattern, _WHERE)
    found = [name for name in layers if expression.fullmatch(name)]
    head = base.get_output_embeddings()
    refused = [n for n, module in base.named_modules() if isinstance(module, nn.Embedding) or module is head]
    _check_named(base, [*found, *filter(expression.fullmatch, refused)], _fused_names(base))
    if not found:
        shown = ", ".join([*layers][:4])
        raise ConfigError(
            f"no linear layer's whole name matches {pattern!r}",
            where=_WHERE,
            fix=f"names look like {shown}; they end in {', '.join(_last_parts(layers))}",
        )
    names = _telling_parts(found, base)
    return Resolved(names, f"the {len(found)} layers that match {pattern!r} in lora.target_modules")


def _fused_names(base: PreTrainedModel) -> frozenset[str]:
    """Return the layers whose weights a model's kernels read by themselves, so that an adapter has no effect."""
    return _FUSED_LAYERS if base.config.model_type in FUSED_FAMILIES else frozenset()


def _check_named(base: PreTrainedModel, names: Sequence[str], fused: frozenset[str]) -> None:
    """Check that layers chosen by name can take an adapter.

    Raises:
        ConfigError: one is the head, the embedding, or read past an adapter; it is named.
    """
    endings = _Endings(base)
    for name in names:
        found = endings.modules(name)
        if name.rpartition(".")[2] in fused:
            reason = "is read by the model's fused kernels, which would pass an adapter by"
        elif any(module is base.get_output_embeddings() for module in found):
            reason = "is the output head, which takes no adapter in this version"
        elif any(isinstance(module, nn.Embedding) for module in found):
            reason = "is an embedding, which takes no adapter in this version"
        elif len({isinstance(module, (nn.Linear, Conv1D)) for module in found}) > 1:
            reason = f"is also the name of a {_first_other(found)}: a longer name would tell them apart"
        else:
            continue
        others = ", ".join(part for part in _last_parts(linear_layers(base)) if part not in fused)
        whole = "" if "version" not in reason else "; lora.modules_to_save trains a layer whole"
        raise ConfigError(f"layer {name!r} {reason}", where=_WHERE, fix=f"layers of this model: {others}{whole}")


def _first_other(modules: Sequence[nn.Module]) -> str:
    return next(type(module).__name__ for module in modules if not isinstance(module, (nn.Linear, Conv1D)))


def _last_parts(names: "Mapping[str, nn.Module] | Sequence[str]") -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _tails(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]


class _Endings:
    """Modules by every ending of their names."""

    def __init__(self, base: PreTrainedModel) -> None:
        self._found: dict[str, list[nn.Module]] = {}
        for full, module in base.named_modules():
            for tail in _tails(full):
                self._found.setdefault(tail, []).append(module)

    def modules(self, name: str) -> list[nn.Module]:
        return self._found.get(name, [])


def _telling_parts(names: Sequence[str], base: PreTrainedModel) -> list[str]:
    """Return the shortest name endings that match `names` and no other module.

    Experts and parts of a sequence are numbered, so that `0` alone would be a decoder layer, too.
    """
    chosen = set(names)
    others = Counter(tail for module, _ in base.named_modules() if module not in chosen for tail in _tails(module))
    return sorted({next(tail for tail in _tails(name) if not others[tail]) for name in names})
