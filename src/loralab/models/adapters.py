"""Adapters: building, loading, saving and hashing them.

Owns the table of variants and the choice of target layers. The on-disk form is PEFT's.
"""

import hashlib
import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, TaskType
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loralab.config.schema import LoraConfig
from loralab.errors import ConfigError, ModelError, excerpt
from loralab.lookup import look_up, nearest_name
from loralab.models.precision import Resolved
from loralab.models.supervised import SupervisedPeftModel

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
# PEFT refuses these by name: Mamba's kernels take the weights and never call the layers.
FUSED_FAMILIES = frozenset({"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"})
_FUSED_LAYERS = frozenset({"out_proj", "conv1d"})
_ATTENTION = re.compile(r"(^|\.)(self_attn|self_attention|attention|attn)(\.|$)")


def build_adapter(
    base: PreTrainedModel, lora: LoraConfig, *, seed: int
) -> tuple[SupervisedPeftModel, dict[str, Resolved[str]]]:
    """Put a fresh adapter on a frozen base; its weights are float32 masters.

    Args:
        base: the frozen base model.
        lora: the adapter section.
        seed: of the adapter's initial weights.

    Returns:
        The model with its adapter, and the automatic choices.

    Raises:
        ConfigError: a target layer that does not exist.
    """
    targets = resolve_target_modules(base, lora)
    build = look_up(VARIANTS, lora.variant, kind="adapter variant", where="key lora.variant")
    torch.manual_seed(seed)
    model = _wrap(base, build(lora, base, targets.value))
    chosen = {"target_modules": Resolved(", ".join(targets.value), targets.reason)}
    reason = model.check_head()
    path = "full logits" if reason else "gathered"
    chosen["head"] = Resolved(path, reason or "head(gathered hidden states) equals the model's own logits")
    return model, chosen


def _wrap(base: PreTrainedModel, config: PeftConfig) -> SupervisedPeftModel:
    with warnings.catch_warnings():
        # PEFT 0.21 asks for a property that transformers 5.23 has renamed; nothing that a user could mend.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return SupervisedPeftModel(base, config, autocast_adapter_dtype=True)


def _build_lora(lora: LoraConfig, base: PreTrainedModel, targets: list[str]) -> PeftLoraConfig:
    endings = tuple(f".{target}" for target in targets)
    targeted = [module for name, module in base.named_modules() if f".{name}".endswith(endings)]
    # A quantized layer holds its weight as nn.Linear does; on the unquantized base the adapter meets the original.
    conv = any(isinstance(m, Conv1D) or getattr(m, "source_cls", None) is Conv1D for m in targeted)
    return PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=conv,
        task_type=TaskType.CAUSAL_LM,
    )


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


def load_adapter(base: PreTrainedModel, folder: Path, *, where: str = "argument RUN") -> SupervisedPeftModel:
    """Put a saved adapter on its base, frozen.

    Raises:
        ModelError: no adapter there, or it does not fit this base.
    """
    config = read_adapter_config(folder, where=where)
    config.inference_mode = True
    try:
        model = _wrap(base, config)
        result = model.load_adapter(str(folder), "default", is_trainable=False)
    except (ValueError, RuntimeError, KeyError, SafetensorError, OSError) as error:
        raise ModelError(
            f"the adapter does not fit this base: {excerpt(error)}",
            where=str(folder),
            fix="name the base that it was trained on",
        ) from error
    unexpected = list(getattr(result, "unexpected_keys", []))
    missing = [key for key in getattr(result, "missing_keys", []) if "lora_" in key]
    if unexpected or missing:
        raise ModelError(
            f"the adapter does not fit this base: {len(missing)} tensors missing, {len(unexpected)} match nothing "
            f"(first: {(missing + unexpected)[0]})",
            where=str(folder),
            fix="name the base that it was trained on",
        )
    model.check_head()
    model.eval()
    return model


def read_adapter_config(folder: Path, *, where: str = "argument RUN") -> PeftConfig:
    """Read an adapter's configuration.

    Raises:
        ModelError: there is no adapter in `folder`, or no safetensors weights.
    """
    if not (folder / CONFIG_FILE).is_file():
        what = f"no {CONFIG_FILE} in {str(folder)!r}" if folder.is_dir() else f"no such folder: {str(folder)!r}"
        raise ModelError(what, where=where, fix="give a run folder, or the adapter folder inside it")
    if not (folder / WEIGHTS_FILE).is_file():
        raise ModelError(
            f"no {WEIGHTS_FILE} in {str(folder)!r}", where=where, fix="adapters are read from safetensors only"
        )
    try:
        config: PeftConfig = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, OSError, RecursionError) as error:
        raise ModelError(f"cannot read {CONFIG_FILE}: {error}", where=str(folder), fix="restore the file") from error
    return config


def adapter_sha256(folder: Path) -> str:
    """Return the SHA-256 over name, dtype, shape and bytes of the adapter's tensors, sorted by name."""
    digest = hashlib.sha256()
    with safe_open(str(folder / WEIGHTS_FILE), framework="pt") as tensors:
        for name in sorted(tensors.keys()):
            tensor = tensors.get_tensor(name).contiguous()
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _telling_parts(names: Sequence[str], layers: Mapping[str, nn.Module]) -> list[str]:
    """Return the shortest name endings that match `names` and no other layer."""
    others = [layer for layer in layers if layer not in set(names)]

    def ending(name: str) -> str:
        parts = name.split(".")
        tails = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        return next(tail for tail in tails if not any(f".{other}".endswith(f".{tail}") for other in others))

    return sorted({ending(name) for name in names})


VariantBuilder = Callable[[LoraConfig, PreTrainedModel, list[str]], PeftConfig]
VARIANTS: dict[str, VariantBuilder] = {"lora": _build_lora}
