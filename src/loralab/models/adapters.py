"""Adapters: building, loading, saving and hashing them.

Does not own which layers are adapted (`targets.py`) or what kinds there are (`variants.py`).
The on-disk form is PEFT's.
"""

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from loralab.config.schema import LoraConfig
from loralab.errors import ModelError, excerpt
from loralab.lookup import look_up
from loralab.models.adapter_hash import WEIGHTS_FILE, adapter_sha256
from loralab.models.eva import Batches, find_directions, with_ranks
from loralab.models.first_weights import Beginning, check_dora
from loralab.models.fused_lora import fuse_lora
from loralab.models.norm_twin import join_norms
from loralab.models.precision import Resolved
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.targets import adapted_layers, placement, resolve_target_modules
from loralab.models.trainable_tokens import trained_tokens
from loralab.models.trained_modules import hold_masters
from loralab.models.variants import VARIANTS, Site, check_site, needs_activations

__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "adapter_sha256",
    "build_adapter",
    "load_adapter",
    "read_adapter_config",
    "wrap_blank",
]

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
# First weights with which PEFT changes the base as well, also when it loads an adapter: the base without the
# adapter is another model then. Adapters of ours are saved as plain LoRA.
_REWRITING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def build_adapter(
    base: PreTrainedModel, lora: LoraConfig, *, seed: int, batches: Batches | None = None, saved: Path | None = None
) -> tuple[SupervisedPeftModel, dict[str, Resolved[str]]]:
    """Put a fresh adapter on a frozen base; its weights are float32 masters.

    Args:
        base: the frozen base model.
        lora: the adapter section.
        seed: of the adapter's initial weights.
        batches: training rows that variant eva looks at, padded.
        saved: folder of saved weights of the same adapter that come next: first weights are not computed.

    Returns:
        The model with its adapter, and the automatic choices.

    Raises:
        ConfigError: a target layer that does not exist, or a variant that this base cannot take.
        ModelError: first weights cannot be computed for this base.
    """
    targets = resolve_target_modules(base, lora)
    look_up(VARIANTS, lora.variant, kind="adapter variant", where="key lora.variant")
    layers = adapted_layers(lora, base, targets.value)
    site = Site(base, layers, placement(lora, base, targets.value), seed)
    check_site(lora.variant, site)
    config, beginning = _configure(lora, site, batches=batches, saved=saved)
    torch.manual_seed(seed)
    chosen = {"target_modules": Resolved(", ".join(targets.value), targets.reason)}
    chosen |= _join_norms(base)
    model = _wrap(base, config)
    start = VARIANTS[lora.variant].start
    if start is not None:
        chosen["first_weights"] = start(model, beginning)
    chosen["lora_forward"] = fuse_lora(model, dtype=model.embedding.weight.dtype)
    reason = model.check_head()
    path = "full logits" if reason else "gathered"
    chosen["head"] = Resolved(path, reason or "head(gathered hidden states) equals the model's own logits")
    return model, chosen


def _configure(
    lora: LoraConfig, site: Site, *, batches: Batches | None, saved: Path | None
) -> tuple[PeftConfig, Beginning]:
    """Return PEFT's configuration, and what first weights are made from."""
    config = VARIANTS[lora.variant].build(lora, site)
    blank = next(site.base.parameters()).is_meta  # a plan's model has no numbers to compute from
    if not needs_activations(lora):
        return config, Beginning(saved=saved is not None or blank)
    if saved is not None:  # the ranks that were dealt out are in its configuration
        config = read_adapter_config(saved, where=str(saved))
        config.inference_mode = False
        return config, Beginning(saved=True)
    directions = find_directions(site.base, config, batches or ())
    return with_ranks(config, directions), Beginning(directions=directions)


def _join_norms(base: PreTrainedModel) -> dict[str, Resolved[str]]:
    weight: Any = base.get_input_embeddings().weight
    return join_norms(base, device=weight.device, dtype=weight.dtype)


def _wrap(base: PreTrainedModel, config: PeftConfig) -> SupervisedPeftModel:
    with warnings.catch_warnings():
        # PEFT 0.21 asks for a property that transformers 5.23 has renamed; nothing that a user could mend.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        model = SupervisedPeftModel(base, config, autocast_adapter_dtype=True)
    hold_masters(model)
    return model


def wrap_blank(base: PreTrainedModel, configs: Mapping[str, PeftConfig]) -> PeftModel:
    """Put adapters on a base without any of their numbers, as PEFT's own model.

    Args:
        base: the base, on the meta device.
        configs: PEFT's configuration of each adapter by its name; at least one.
    """
    with warnings.catch_warnings():
        # What PEFT says of tied layers and of Conv1D, the proof of a merge answers with numbers.
        warnings.filterwarnings("ignore", category=UserWarning, module="peft")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        (first, config), *rest = configs.items()
        model = PeftModel(base, config, adapter_name=first, low_cpu_mem_usage=True)
        for name, other in rest:
            model.add_adapter(name, other, low_cpu_mem_usage=True)
    return model


def load_adapter(base: PreTrainedModel, folder: Path, *, where: str = "argument RUN") -> SupervisedPeftModel:
    """Put a saved adapter on its base, frozen.

    Raises:
        ModelError: no adapter there, or it does not fit this base.
    """
    config = read_adapter_config(folder, where=where)
    config.inference_mode = True
    _check_rows(base, config, folder)
    try:
        _join_norms(base)
        model = _wrap(base, config)
        result = model.load_adapter(str(folder), "default", is_trainable=False)
    except (ValueError, RuntimeError, KeyError, SafetensorError, OSError) as error:
        raise ModelError(
            f"the adapter does not fit this base: {excerpt(error)}",
            where=str(folder),
            fix="name the base that it was trained on",
        ) from error
    unexpected = list(getattr(result, "unexpected_keys", []))
    missing = list(getattr(result, "missing_keys", []))  # of the adapter alone, PEFT leaves out the base's
    if unexpected or missing:
        raise ModelError(
            f"the adapter does not fit this base: {len(missing)} tensors missing, {len(unexpected)} match nothing "
            f"(first: {(missing + unexpected)[0]})",
            where=str(folder),
            fix="name the base that it was trained on",
        )
    if getattr(config, "use_dora", False):
        check_dora(model)
    fuse_lora(model, dtype=model.embedding.weight.dtype)
    model.check_head()
    model.eval()
    return model


def _check_rows(base: PreTrainedModel, config: PeftConfig, folder: Path) -> None:
    """Check that the base has a row for every token that an adapter trained."""
    rows = int(cast(nn.Embedding, base.get_input_embeddings()).weight.shape[0])
    beyond = [token for token in sorted(trained_tokens(config)) if token >= rows]
    if beyond:
        raise ModelError(
            f"the adapter has a row for token {beyond[0]}, and the base has {rows}",
            where=str(folder),
            fix="give the adapter folder of the run, whose tokenizer has the new tokens, and the base of the run",
        )


def read_adapter_config(folder: Path, *, where: str = "argument RUN") -> PeftConfig:
    """Read an adapter's configuration.

    Raises:
        ModelError: there is no adapter in `folder`, no safetensors weights, or it stands on a rewritten base.
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
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_REWRITING):
        raise ModelError(
            f"the adapter stands on a base that PEFT's {start} rewrote, not on the base that it names",
            where=str(folder / CONFIG_FILE),
            fix="convert it in PEFT: save_pretrained(folder, path_initial_model_for_weight_conversion=...)",
        )
    return config
