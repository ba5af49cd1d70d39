"""The layers of an adapter by kind: how many, of which shape, how far from where they began.

Owns what a configuration promises of each layer (rank, scale, target) and the comparison with its
tensors.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from loralab.workflows.inspect_tensors import StoredTensor, product_norm

# The value that a part has before the first step; all of it there means: never trained.
UNTRAINED = {
    "lora_B": 0.0,
    "lora_embedding_A": 0.0,
    "lora_E": 0.0,
    "hada_w2_b": 0.0,
    "lokr_w1": 0.0,
    "lokr_w1_a": 0.0,
    "vera_lambda_b": 0.0,
    "ia3_l": 1.0,
}
# What a variant's tensors are called; the rest of a file belongs to layers saved whole and new tokens.
_OWN_PARTS = {
    "LORA": "lora_",
    "ADALORA": "lora_",
    "LOHA": "hada_",
    "LOKR": "lokr_",
    "IA3": "ia3_",
    "VERA": "vera_",
    "TRAINABLE_TOKENS": "trainable_tokens_",
}
# Starts of B other than zero: a norm of zero is then no sign, and one above it neither.
_OTHER_STARTS = ("pissa", "olora", "corda", "loftq", "orthogonal", "lora_ga")
# Layers that PEFT saves whole by itself where tokens were added to the vocabulary.
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out")
# Shared by all layers and never trained.
_SHARED = ("vera_A", "vera_B")

Config = Mapping[str, Any]


def variant_of(config: Config) -> str:
    """Return the name of the variant that an adapter's configuration describes."""
    kind = str(config.get("peft_type") or "unknown").upper()
    if kind != "LORA":
        return kind.lower()
    names = [name for key, name in (("use_dora", "dora"), ("use_rslora", "rslora")) if config.get(key)]
    start = config.get("init_lora_weights")
    names += [start] if isinstance(start, str) and start != "gaussian" else []
    return " + ".join(names) or "lora"


def rank_and_scale(config: Config, module: str) -> tuple[int | None, float | None]:
    """Return the rank and the factor of B A that a configuration gives a layer, or None where it has none."""
    rank = _of_pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", config.get("alpha")))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        return (rank if isinstance(rank, int) else None), None
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(pattern: object, module: str, otherwise: Any) -> Any:
    if not isinstance(pattern, Mapping):
        return otherwise
    return next((value for key, value in pattern.items() if _matches(rf"(.*\.)?({key})$", module)), otherwise)


def _matches(expression: str, module: str) -> bool:
    try:
        return re.match(expression, module) is not None
    except re.error:
        return False


def misfit(config: Config, tensor: StoredTensor) -> str | None:
    """Return why a tensor matches nothing in the configuration, or None where it does."""
    last = tensor.module.rpartition(".")[2]
    if tensor.whole:
        listed = [*names_in(config.get("modules_to_save")), *_EMBEDDINGS]
        return None if any(_ends(tensor.module, name) for name in listed) else "it is not in modules_to_save"
    kind = str(config.get("peft_type") or "").upper()
    own = _OWN_PARTS.get(kind)
    if tensor.part.startswith("trainable_tokens_"):
        wanted = kind == "TRAINABLE_TOKENS" or config.get("trainable_token_indices")
        return None if wanted else "trainable_token_indices is not set"
    if own is not None and not tensor.part.startswith(own):
        return f"{tensor.part} is no part of {kind}"
    if tensor.part.startswith("lora_magnitude_vector") and not config.get("use_dora"):
        return "use_dora is not set"
    if tensor.part in _SHARED or _is_target(config, tensor.module):
        return _wrong_rank(config, tensor)
    return f"{last!r} is not in target_modules"


def _is_target(config: Config, module: str) -> bool:
    targets = config.get("target_modules")
    if targets is None or config.get("target_parameters"):
        return True
    if isinstance(targets, str):
        return targets == "all-linear" or _matches(rf"(?:{targets})$", module)
    return any(_ends(module, name) for name in names_in(targets))


def names_in(value: object) -> list[str]:
    """Return the names of a list in somebody's file; what is no list of names has none."""
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _wrong_rank(config: Config, tensor: StoredTensor) -> str | None:
    if tensor.part not in ("lora_A", "lora_B") or not _has_fixed_rank(config):
        return None
    rank, _ = rank_and_scale(config, tensor.module)
    stored = tensor.shape[0 if tensor.part == "lora_A" else 1] if len(tensor.shape) > 1 else None
    return None if stored == rank else f"its rank is {stored}, the configuration says {rank}"


def _has_fixed_rank(config: Config) -> bool:
    """Return whether a layer's update is scale * B A with the configured rank; AdaLoRA's and experts' are not."""
    return str(config.get("peft_type")).upper() == "LORA" and not config.get("target_parameters")


def by_kind(config: Config, tensors: Iterable[StoredTensor]) -> list[dict[str, Any]]:
    """Return one entry per kind of layer: count, shapes, types, norms, how many were never trained.

    Args:
        config: the adapter's.
        tensors: those that are parts of an adapter.
    """
    layers: dict[str, dict[str, StoredTensor]] = {}
    for tensor in tensors:
        if not tensor.whole and tensor.part not in _SHARED:
            layers.setdefault(tensor.module, {})[tensor.part] = tensor
    kinds: dict[str, list[str]] = {}
    names = _kind_names(layers)
    for module in layers:
        kinds.setdefault(names[module], []).append(module)
    return [_describe(config, kind, {name: layers[name] for name in members}) for kind, members in kinds.items()]


def _kind_names(modules: Iterable[str]) -> dict[str, str]:
    """Return a layer's last name, with the one above where the same name stands below several (attn.c_proj)."""
    words = {module: [word for word in module.split(".") if not word.isdigit()] for module in modules}
    above: dict[str, set[str]] = {}
    for parts in words.values():
        above.setdefault(parts[-1], set()).add(parts[-2] if len(parts) > 1 else "")
    return {module: ".".join(parts[-2 if len(above[parts[-1]]) > 1 else -1 :]) for module, parts in words.items()}


def _describe(config: Config, kind: str, layers: Mapping[str, Mapping[str, StoredTensor]]) -> dict[str, Any]:
    tensors = [tensor for parts in layers.values() for tensor in parts.values()]
    first = {
        part: sorted({t.shape for t in tensors if t.part == part}) for part in dict.fromkeys(t.part for t in tensors)
    }
    found = {rank_and_scale(config, module) for module in layers}
    updates = [_update(config, module, parts) for module, parts in layers.items()]
    return {
        "kind": kind,
        "count": len(layers),
        "parameters": sum(tensor.size for tensor in tensors),
        "rank": sorted({rank for rank, _ in found if rank is not None}),
        "scale": sorted({scale for _, scale in found if scale is not None}),
        "shapes": {part: [list(shape) for shape in shapes] for part, shapes in first.items()},
        "dtypes": sorted({tensor.dtype for tensor in tensors}),
        "norms": {part: _spread([t.norm for t in tensors if t.part == part]) for part in first},
        "update_norm": _spread([norm for norm in updates if norm is not None]),
        "untrained": sorted(name for name, parts in layers.items() if is_untrained(config, parts)),
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)} if values else None


def _update(config: Config, module: str, parts: Mapping[str, StoredTensor]) -> float | None:
    """Return the norm of the change that a LoRA layer makes to its weight: scale * ||B A||."""
    rank, scale = rank_and_scale(config, module)
    first, second = parts.get("lora_A"), parts.get("lora_B")
    fixed = _has_fixed_rank(config) and scale is not None
    if first is None or second is None or not fixed or first.shape[:1] != (rank,):
        return None
    norm = product_norm(first, second)
    return None if norm is None or scale is None else scale * norm


def is_untrained(config: Config, parts: Mapping[str, StoredTensor]) -> bool:
    """Return whether a layer's adapter is as it was before the first step."""
    start = config.get("init_lora_weights", True)
    if start is False or (isinstance(start, str) and start.lower().startswith(_OTHER_STARTS)):
        return False
    names = ("lora_E",) if "lora_E" in parts else tuple(UNTRAINED)  # AdaLoRA's B does not begin at zero
    telling = [tensor for part, tensor in parts.items() if part in names and tensor.values is not None]
    if _cancels(parts):
        return True
    return bool(telling) and all(bool((t.values == UNTRAINED[t.part]).all()) for t in telling if t.values is not None)


def _cancels(parts: Mapping[str, StoredTensor]) -> bool:
    """Return whether the second half of A and B takes the first one away: what PiSSA and OLoRA begin with here."""
    first, second = (parts[name].values if name in parts else None for name in ("lora_A", "lora_B"))
    if first is None or second is None or len(first) % 2:
        return False
    half = len(first) // 2
    return bool((first[:half] == first[half:]).all() and (second[:, :half] == -second[:, half:]).all())
