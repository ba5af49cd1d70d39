"""Which quantization a base gets: what is set, what its weights are stored in, what is refused.

Owns the choice and its reason. Does not own the layers and their products: `quantized.py`.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig

from loralab.config.schema import ModelConfig
from loralab.errors import ModelError
from loralab.models.precision import Resolved
from loralab.models.targets import FUSED_FAMILIES

BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
_DEVICES = ("cuda", "cpu")


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the linear layers of a base are held.

    Attributes:
        kind: nf4, fp4 or int8.
        double: whether the scales of 4-bit weights are quantized too.
        stored: whether the weights come quantized; their originals are not there then.
    """

    kind: str
    double: bool
    stored: bool = False

    def __str__(self) -> str:
        """Return the words of log and record."""
        return f"{self.kind}, double" if self.double else self.kind


def resolve_quantization(
    model: ModelConfig, config: PreTrainedConfig, device: torch.device
) -> Resolved[Quantization | None]:
    """Choose how the linear layers of the base are held.

    Args:
        model: the model section.
        config: the base model's.
        device: where to compute.

    Raises:
        ModelError: the stored weights and the setting differ, or this base, device or installation cannot.
    """
    stored = stored_quantization(config, model.name)
    if stored is None and model.quantization == "none":
        if model.chosen("double_quantization"):
            raise ModelError(
                "double_quantization false with quantization none",
                where="key model.double_quantization",
                fix="remove it, or set model.quantization: nf4 or fp4",
            )
        return Resolved(None, "set in model.quantization or by default")
    if stored is not None:
        _check_stored(model, stored)
    chosen = stored or Quantization(model.quantization, model.double_quantization and model.quantization != "int8")
    _check_possible(chosen, config, device)
    return Resolved(chosen, "the weights are stored so" if stored else "set in model.quantization")


def stored_quantization(config: PreTrainedConfig, name: str) -> Quantization | None:
    """Return the quantization that a model's weights are stored in, or None.

    Args:
        config: the model's.
        name: for the message.

    Raises:
        ModelError: it is another one than bitsandbytes', which is named.
    """
    found = getattr(config, "quantization_config", None)
    found = found or getattr(config.get_text_config(), "quantization_config", None)
    if not found:
        return None
    facts: Mapping[str, Any] = found if isinstance(found, Mapping) else found.to_dict()
    eight, four = facts.get("load_in_8bit"), facts.get("load_in_4bit")
    method = str(facts.get("quant_method") or ("bitsandbytes" if eight or four else "an unnamed method"))
    if method.rpartition(".")[2].lower() not in ("bitsandbytes", "bits_and_bytes"):
        raise ModelError(
            f"the weights of {name!r} are stored quantized by {method.upper() if len(method) < 6 else method}; "
            "of stored quantizations only bitsandbytes' is trained on",
            where="key model.name",
            fix="name the unquantized model that it was made from; model.quantization: nf4 holds that in 4 bits",
        )
    if eight:
        return Quantization("int8", double=False, stored=True)
    kind, double = str(facts.get("bnb_4bit_quant_type") or "fp4"), bool(facts.get("bnb_4bit_use_double_quant"))
    return Quantization(kind, double=double, stored=True)


def _check_stored(model: ModelConfig, stored: Quantization) -> None:
    """Check that nothing else than the stored quantization was asked for.

    Raises:
        ModelError: something else was.
    """
    if model.quantization not in ("none", stored.kind):
        raise ModelError(
            f"quantization {model.quantization} of {model.name!r}, whose weights are stored in {stored.kind}",
            where="key model.quantization",
            fix=f"set model.quantization: {stored.kind}, or name the unquantized model",
        )
    if stored.double and not model.double_quantization:
        raise ModelError(
            f"double_quantization false, but the weights of {model.name!r} are stored with it",
            where="key model.double_quantization",
            fix="remove it, or name the unquantized model",
        )


def _check_possible(chosen: Quantization, config: PreTrainedConfig, device: torch.device) -> None:
    """Check that this base, device and installation can hold quantized layers.

    Raises:
        ModelError: one cannot.
    """
    if not BITSANDBYTES:
        raise ModelError(
            f"quantization {chosen.kind} needs the package bitsandbytes, which is not installed",
            where="key model.quantization",
            fix="install it (pip install bitsandbytes), or set model.quantization: none",
        )
    if device.type not in _DEVICES:
        raise ModelError(
            f"quantization {chosen.kind} on {device.type}: it is offered on {' and '.join(_DEVICES)}",
            where="keys model.quantization, model.device",
            fix="set model.device: cpu, or model.quantization: none",
        )
    if config.get_text_config().model_type in FUSED_FAMILIES:
        raise ModelError(
            f"quantization {chosen.kind} of a {config.model_type} model, whose kernels read weights past their layers",
            where="key model.quantization",
            fix="set model.quantization: none",
        )
