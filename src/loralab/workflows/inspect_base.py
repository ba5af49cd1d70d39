"""An adapter held against a base model: which layers it attaches to, and what matches nothing there.

Owns the comparison by names and shapes. The base is built without weights, from its configuration.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from loralab.config.schema import ModelConfig
from loralab.doctor.findings import Finding
from loralab.errors import ModelError, excerpt
from loralab.models.load import check_local_model, load_model_config
from loralab.workflows.inspect import describe
from loralab.workflows.inspect_tensors import StoredTensor

_LISTED = 3


def attach(result: dict[str, Any], tensors: Sequence[StoredTensor], base: str) -> None:
    """Add to an inspected adapter what of it fits a base model.

    Args:
        result: of `inspect_adapter`; gets `attached`, and a finding where something does not fit.
        tensors: the adapter's.
        base: local folder or Hub id.

    Raises:
        ModelError: the base cannot be read.
    """
    check_local_model(base, where="option --model")
    modules = dict(_build_skeleton(base).named_modules())
    found: dict[str, str] = {}
    wrong: list[tuple[str, str]] = []
    for tensor in tensors:
        module = modules.get(tensor.module)
        reason = "no such layer" if module is None else _misfit(tensor, module)
        if reason is not None:
            wrong.append((tensor.name, reason))
        elif module is not None:
            found[tensor.module] = type(module).__name__
    result["attached"] = {
        "base": base,
        "layers": found,
        "kinds": {kind["kind"]: _share(kind["kind"], found, modules) for kind in result["kinds"]},
        "unmatched": [{"tensor": name, "reason": reason} for name, reason in wrong],
    }
    if wrong:
        listed = "; ".join(f"{name} ({reason})" for name, reason in wrong[:_LISTED])
        more = "; ..." if len(wrong) > _LISTED else ""
        finding = Finding(
            "problem",
            f"{len(wrong)} of {len(tensors)} tensors match nothing in {base!r}: {listed}{more}",
            "the adapter was trained on another model; PEFT drops what does not match, or refuses it",
            f"name the base that it was trained on (the adapter names {result['base']['name']!r})",
        )
        result["findings"].insert(0, describe(finding))


def _build_skeleton(base: str) -> nn.Module:
    model = ModelConfig(name=base)
    config = load_model_config(model)
    try:
        with torch.device("meta"):
            skeleton: nn.Module = AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, KeyError, RuntimeError, ImportError, AttributeError) as error:
        fix = "give the base language model that the adapter was trained on"
        raise ModelError(f"cannot lay out {base!r}: {excerpt(error)}", where="option --model", fix=fix) from None
    return skeleton


def _misfit(tensor: StoredTensor, module: nn.Module) -> str | None:
    """Return why a tensor's shape does not fit a layer, or None where it does or nobody can say."""
    if tensor.whole:
        own = dict(module.named_parameters(recurse=False)).get(tensor.part)
        if own is None:
            return f"the layer has no {tensor.part}"
        return None if tuple(own.shape) == tensor.shape else f"the layer's is {_form(own.shape)}"
    sizes = _sizes(module)
    if sizes is None or len(tensor.shape) < 2:
        return None
    inputs, outputs = sizes
    if tensor.part == "lora_A" and tensor.shape[1] != inputs:
        return f"made for {tensor.shape[1]} inputs, the layer has {inputs}"
    if tensor.part == "lora_B" and tensor.shape[0] != outputs:
        return f"made for {tensor.shape[0]} outputs, the layer has {outputs}"
    return None


def _form(shape: torch.Size) -> str:
    return " x ".join(map(str, shape))


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return the inputs and outputs of a linear layer, or None for another."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None


def _share(kind: str, found: dict[str, str], modules: dict[str, nn.Module]) -> dict[str, int]:
    """Return how many of the base's layers of a kind have an adapter."""

    def named(names: Sequence[str]) -> int:
        plain = (".".join(word for word in name.split(".") if not word.isdigit()) for name in names)
        return sum(name == kind or name.endswith(f".{kind}") for name in plain)

    return {"attached": named(list(found)), "in_base": named(list(modules))}
