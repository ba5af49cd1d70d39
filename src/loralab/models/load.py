"""Loading the base model and its tokenizer.

Owns the checks before a load (folder, weights, dtype) and the wording of what fails. Weights
are safetensors only; remote code runs only when asked for.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.configuration_utils import PreTrainedConfig

from loralab.config.schema import ModelConfig
from loralab.errors import ModelError, OutOfMemoryError, excerpt
from loralab.hub.cache import is_local_only
from loralab.lookup import nearest_name
from loralab.models.allocator import returning_memory
from loralab.models.device_map import describe_spread, put_whole, spreads
from loralab.models.families import take_activation_twin
from loralab.models.precision import Resolved
from loralab.models.quantization import BITSANDBYTES, Quantization, resolve_quantization, stored_quantization
from loralab.models.quiet_loading import quiet_loading
from loralab.models.vision import auto_class, vision_family
from loralab.run import file_sha256

if BITSANDBYTES:
    from loralab.models.quantized import describe_quantization, weight_sizes
    from loralab.models.quantized_loading import adopt_layers, loading_arguments

logger = logging.getLogger(__name__)


def check_local_model(name: str, *, where: str = "key model.name") -> None:
    """Check a model named by a local path; a Hub id passes.

    Raises:
        ModelError: the path does not exist, or is no folder with a config and safetensors weights.
    """
    path = Path(name).expanduser()
    if not path.exists():
        if _looks_like_path(name):
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            near = nearest_name(path.name, siblings)
            fix = f"did you mean {str(path.parent / near)!r}?" if near else "give a folder that exists, or a Hub id"
            raise ModelError(f"no such model folder: {name!r}", where=where, fix=fix)
        return
    if not path.is_dir():
        raise ModelError(f"not a folder: {name!r}", where=where, fix="give the folder that holds config.json")
    if not (path / "config.json").is_file():
        hint = (
            "an adapter is no base model: name its base"
            if (path / "adapter_config.json").is_file()
            else ("give a folder in the Hugging Face layout")
        )
        raise ModelError(f"no config.json in {name!r}", where=where, fix=hint)
    if not any(path.glob("*.safetensors")):
        others = sorted(p.name for p in path.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".gguf", ".ckpt"})
        got = f"; found {', '.join(others)}" if others else ""
        raise ModelError(
            f"model folder without safetensors weights: {name!r}{got}",
            where=where,
            fix="put model.safetensors there (other formats are pickles that may run code: convert them first)",
        )


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or Path(name).parent.name in {"..", "."}
    )


def model_source(name: str) -> str:
    """Return the absolute path of a local model folder, or the Hub id as it is."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name


def _explain(error: Exception, model: ModelConfig, what: str, *, folder: Path | None = None) -> ModelError:
    said = excerpt(error)
    if folder is not None:
        return ModelError(
            f"cannot load the {what} in {str(folder)!r}: {said}", where=str(folder), fix="restore the files there"
        )
    if "trust_remote_code" in str(error):
        fix = "set model.trust_remote_code: true if you trust the code that comes with it"
    elif spreads(model) and "offload" in said:
        fix = "the GPUs have no room for it: set model.quantization: nf4, or take a smaller base"
    elif Path(model.name).expanduser().is_dir():
        fix = "check that folder: loralab needs config.json, *.safetensors and the tokenizer's files"
    else:
        fix = (
            "check the spelling, the network, and for gated models `hf auth login` or HF_TOKEN; or give a local folder"
        )
    return ModelError(f"cannot load the {what} of {model.name!r}: {said}", where="key model.name", fix=fix)


def load_tokenizer(model: ModelConfig, *, folder: Path | None = None) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer, or the one saved in an adapter's `folder`.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder) if folder is not None else model_source(model.name),
            revision=None if folder is not None else model.revision,
            trust_remote_code=model.trust_remote_code,
            local_files_only=folder is None and is_local_only(model),
        )
    except Exception as error:  # libraries read these files as code of theirs: what fails there is any of its kinds
        raise _explain(error, model, "tokenizer", folder=folder) from error
    return tokenizer


def load_model_config(model: ModelConfig) -> PreTrainedConfig:
    """Load the base model's configuration, without weights.

    Raises:
        ModelError: there is none, it cannot be read, or its weights are stored in a format that is not trained on.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            model_source(model.name),
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            local_files_only=is_local_only(model),
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise _explain(error, model, "configuration") from error
    stored_quantization(config, model.name)
    return config


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return how many tokens the model has positions for, or None where that is unlimited."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def check_length(config: PreTrainedConfig, max_length: int) -> None:
    """Check that `max_length` tokens have positions in the model.

    Raises:
        ModelError: the model has fewer positions.
    """
    limit = max_positions(config)
    if limit is not None and max_length > limit:
        raise ModelError(
            f"max_length {max_length} is more than the model's {limit} positions",
            where="key data.max_length",
            fix=f"set data.max_length: {limit} or less",
        )


def check_vocabulary(base: PreTrainedModel, largest_id: int) -> None:
    """Check that the model has an embedding for every token id of the data.

    Raises:
        ModelError: it has fewer.
    """
    size = cast(nn.Embedding, base.get_input_embeddings()).num_embeddings
    if largest_id >= size:
        raise ModelError(
            f"token id {largest_id} in the data, but the model has embeddings for {size} tokens",
            where="keys model.name, data.train",
            fix="use the tokenizer that belongs to the model, or rows tokenized with it",
        )


def load_base_model(
    model: ModelConfig, *, dtype: torch.dtype, device: torch.device, residual_rank: int | None = None
) -> tuple[PreTrainedModel, dict[str, Resolved[str]]]:
    """Load the base model, frozen, in `dtype` on `device`.

    Args:
        model: the model section.
        dtype: type of the weights that are not quantized.
        device: where it goes.
        residual_rank: how many directions of what quantization changes are kept per layer, or None.

    Returns:
        The model, and the automatic choices that were made.

    Raises:
        ModelError: it cannot be loaded.
    """
    config, settled = settle_base(model, device)
    attention, quantization = settled.attention, settled.quantization
    quantized = quantization.value is not None
    placing: dict[str, Any] = {}
    if quantization.value is not None:
        placing = loading_arguments(quantization.value, device, residual_rank=residual_rank)
    if device.type == "cuda" and spreads(model):
        placing["device_map"] = model.device_map
    if is_local_only(model):
        placing |= {"local_files_only": True, "adapter_kwargs": {"local_files_only": True}}
    try:
        with returning_memory(), quiet_loading():
            loaded: Any = auto_class(config).from_pretrained(
                model_source(model.name),
                config=config,
                revision=model.revision,
                dtype=dtype,
                attn_implementation=attention.value,
                use_safetensors=True,
                trust_remote_code=model.trust_remote_code,
                output_loading_info=True,
                **placing,
            )
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"the base model does not fit into the memory of {device}",
            where="key model.name",
            fix="set model.quantization: nf4, or take a smaller base; loralab plan says what a run needs",
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        raise _explain(error, model, "weights") from error
    base: PreTrainedModel
    base, info = loaded
    _check_complete(base, info, model)
    spread = describe_spread(base, model)
    if quantized:
        adopt_layers(base, model.name)
    # What a base recommends for sampling (penalties, beams) is no part of a comparison.
    base.generation_config = GenerationConfig()
    base.requires_grad_(False)
    put_whole(base, device)
    base.config.use_cache = False
    held = Resolved(str(quantization.value or "none"), quantization.reason + _quantized_share(base))
    choices = {"attn_implementation": attention, "quantization": held, **settled.others, **spread}
    return base, choices


@dataclass(frozen=True, slots=True)
class SettledBase:
    """What is chosen of a base before its weights are read.

    Attributes:
        attention: its own attention, for rows that are no token trees.
        quantization: how its linear layers are held.
        others: what was changed in its configuration, by name.
    """

    attention: Resolved[str]
    quantization: Resolved[Quantization | None]
    others: dict[str, Resolved[str]]


def settle_base(model: ModelConfig, device: torch.device) -> tuple[PreTrainedConfig, SettledBase]:
    """Load a base model's configuration and choose what its weights are read for.

    Returns:
        The configuration as it is trained under, and the choices.

    Raises:
        ModelError: the configuration cannot be loaded, or the quantization is none for this base or device.
    """
    config = load_model_config(model)
    others = {"base_dropout": _set_dropout(config, model), **_drop_router_loss(config), **_join_activation(config)}
    return config, SettledBase(resolve_attention(model, config), resolve_quantization(model, config, device), others)


def _quantized_share(base: PreTrainedModel) -> str:
    facts = describe_quantization(base) if BITSANDBYTES else None
    if facts is None:
        return ""
    share = facts["weights"] / (facts["weights"] + facts["weights_not_quantized"])
    error = facts["error"]
    changed = f", changed by {error['relative']:.1%} of their size" if error else ""
    seen = "" if vision_family(base.config) is None else " (those that read pictures included)"
    return f": {facts['layers']} layers{seen} with {share:.0%} of the weights{changed}; products of dequantized weights"


def _check_complete(base: PreTrainedModel, info: Mapping[str, Any], model: ModelConfig) -> None:
    missing = sorted(map(str, info.get("missing_keys") or ()))
    if missing:
        raise ModelError(
            f"{len(missing)} weights of {type(base).__name__} are not in {model.name!r} (first: {missing[0]})",
            where="key model.name",
            fix="give complete weights; the missing ones would be random numbers",
        )


def resolve_attention(model: ModelConfig, config: PreTrainedConfig) -> Resolved[str]:
    """Choose the attention implementation."""
    if model.attn_implementation != "auto":
        return Resolved(model.attn_implementation, "set in model.attn_implementation")
    architecture = auto_class(config)._model_mapping.get(type(config), None)
    if architecture is not None and getattr(architecture, "_supports_sdpa", False):
        return Resolved("sdpa", "the model supports it")
    return Resolved("eager", "the model has no sdpa attention")


def _set_dropout(config: PreTrainedConfig, model: ModelConfig) -> Resolved[str]:
    parts = [config, *(part for key in config.sub_configs if (part := getattr(config, key, None)) is not None)]
    found = [(part, n) for part in parts for n, v in vars(part).items() if _is_dropout(n) and _positive(v)]
    names = list(dict.fromkeys(name for _, name in found))
    if model.base_dropout == "as_configured":
        listed = ", ".join(f"{name} {getattr(part, name)}" for part, name in found) or "the model has none"
        return Resolved("as_configured", f"set in model.base_dropout ({listed})")
    for part, name in found:
        setattr(part, name, 0.0)
    why = "noise in frozen layers slows training and regularises nothing that is trained"
    return Resolved("off", f"{why} (turned off: {', '.join(names) or 'nothing, the model has none'})")


def _drop_router_loss(config: PreTrainedConfig) -> dict[str, Resolved[str]]:
    """Switch off the load-balancing loss of experts: a product of means over whatever lies in a batch."""
    text = config.get_text_config()
    if not getattr(text, "output_router_logits", False):
        return {}
    text.output_router_logits = False
    why = "it is no sum over tokens: it would depend on how a step lies in memory, and the routers are frozen"
    return {"router_loss": Resolved("off", f"{why} (output_router_logits was true)")}


def _join_activation(config: PreTrainedConfig) -> dict[str, Resolved[str]]:
    """Let the activation be one operation, where it is the same function."""
    twin = take_activation_twin(config)
    if twin is None:
        return {}
    return {"activation": Resolved(twin[1], f"the same function as {twin[0]}, in one operation that keeps one tensor")}


def _positive(value: object) -> bool:
    return isinstance(value, float) and value > 0


def _is_dropout(name: str) -> bool:
    return "dropout" in name or name.endswith(("_pdrop", "layerdrop"))


def model_sha256(name: str) -> str | None:
    """Return a hash over a local model's weights and configuration, or None for a Hub id (its revision counts)."""
    path = Path(name).expanduser()
    files = sorted([*path.glob("*.safetensors"), *path.glob("config.json")]) if path.is_dir() else []
    if not files:
        return None
    return hashlib.sha256("".join(file_sha256(file) for file in files).encode()).hexdigest()


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Return the number of all parameters and of trainable ones."""
    plain = ((p.numel(), p.requires_grad) for p in module.parameters())
    sizes = list(weight_sizes(module) if BITSANDBYTES else plain)
    return sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)


def describe_model(model: ModelConfig, base: PreTrainedModel) -> dict[str, Any]:
    """Return what the record of a run says of the base model."""
    revision = model.revision or getattr(base.config, "_commit_hash", None)
    facts = {
        "name": model.name,
        "revision": revision,
        "architecture": type(base).__name__,
        "sha256": model_sha256(model.name),
    }
    quantized = describe_quantization(base) if BITSANDBYTES else None
    return facts if quantized is None else facts | {"quantization": quantized}
