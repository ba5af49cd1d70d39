"""Loading a base so that its linear layers are quantized as they are read.

Owns what is handed to transformers and the exchange of the library's layers for `quantized.py`'s.
Weights go to their device one by one, so that a whole unquantized base never stands in memory.
transformers' public registry of quantizers is how each original weight is seen, once, for the
record of what its quantization changes.
"""

from typing import Any, cast

import torch
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.bitsandbytes import Bnb4bitQuantize, Bnb8bitQuantize
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from loralab.errors import ModelError, excerpt
from loralab.models.factors import principal_factors
from loralab.models.quantization import Quantization
from loralab.models.quantized import QuantizedLinear, QuantizedLinear4bit, QuantizedLinear8bit, WeightError, dequantize

_PROBE_TOKENS = 4
_FOUR_BIT, _EIGHT_BIT = "loralab_4bit", "loralab_8bit"


@register_quantization_config(_FOUR_BIT)
class MeasuredConfig(BitsAndBytesConfig):
    """bitsandbytes' configuration under a name whose quantizer records what each weight loses."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)  # type: ignore[no-untyped-call]
        name = _EIGHT_BIT if self.load_in_8bit else _FOUR_BIT
        self.quant_method = name  # type: ignore[assignment]
        self.residual_rank: int | None = None

    @classmethod
    def of(cls, chosen: Quantization, *, residual_rank: int | None) -> "MeasuredConfig":
        """Return the configuration of a choice.

        Args:
            chosen: the quantization.
            residual_rank: how many directions of what it changes are kept per layer, or None.
        """
        if chosen.kind == "int8":
            return cls(load_in_8bit=True)
        config = cls(load_in_4bit=True, bnb_4bit_quant_type=chosen.kind, bnb_4bit_use_double_quant=chosen.double)
        config.residual_rank = residual_rank
        return config


class _Measured4bit(Bnb4bitQuantize):
    """Quantizes a weight, and notes on its layer what that changed."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        rank = getattr(self.hf_quantizer.quantization_config, "residual_rank", None)
        return _measured(super().convert(input_dict, **kwargs), input_dict, kwargs["model"], rank)


class _Measured8bit(Bnb8bitQuantize):
    """Quantizes a weight, and notes on its layer what that changed."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        return _measured(super().convert(input_dict, **kwargs), input_dict, kwargs["model"])


@register_quantizer(_FOUR_BIT)
class _Quantizer4bit(Bnb4BitHfQuantizer):
    def get_quantize_ops(self) -> Bnb4bitQuantize:
        return _Measured4bit(self)  # type: ignore[no-untyped-call]


@register_quantizer(_EIGHT_BIT)
class _Quantizer8bit(Bnb8BitHfQuantizer):
    def get_quantize_ops(self) -> Bnb8bitQuantize:
        return _Measured8bit(self)  # type: ignore[no-untyped-call]


def _measured(
    quantized: dict[str, Tensor], originals: dict[str, Any], model: PreTrainedModel, rank: int | None = None
) -> dict[str, Tensor]:
    for name, weight in quantized.items():
        found = originals[name]
        original: Tensor = found[0] if isinstance(found, list) else found
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        # A Conv1D holds its weight the other way round.
        before = (original.T if issubclass(layer.source_cls, Conv1D) else original).float()
        changed = before.to(weight.device) - dequantize(cast(nn.Parameter, weight)).float()
        layer.weight_error = WeightError(
            float(changed.square().sum(dtype=torch.float64)),
            float(before.square().sum(dtype=torch.float64)),
            before.numel(),
        )
        if rank is not None:
            layer.residual = principal_factors(changed, min(rank, *changed.shape))
    return quantized


def loading_arguments(
    chosen: Quantization, device: torch.device, *, residual_rank: int | None = None
) -> dict[str, Any]:
    """Return what `from_pretrained` needs, so that each weight is quantized as it is read.

    Args:
        chosen: the quantization.
        device: where the model goes.
        residual_rank: how many directions of what quantization changes are kept per layer, or None.

    Raises:
        ModelError: directions are wanted of weights whose originals are not there.
    """
    place: dict[str, Any] = {"device_map": {"": device}}
    if not chosen.stored:
        return place | {"quantization_config": MeasuredConfig.of(chosen, residual_rank=residual_rank)}
    if residual_rank is not None:
        raise ModelError(
            f"variant loftq on weights that are stored in {chosen.kind}: what quantization changed is not known",
            where="keys lora.variant, model.name",
            fix=f"name the unquantized model and set model.quantization: {chosen.kind}, or set lora.variant: lora",
        )
    return place


def adopt_layers(base: PreTrainedModel, name: str) -> list[QuantizedLinear]:
    """Replace the library's quantized layers in a loaded base by those of this module.

    Args:
        base: the loaded base.
        name: of the model, for messages.

    Returns:
        The new layers.

    Raises:
        ModelError: there are none, or the model reads weights past its layers.
    """
    # Everything that asks for bitsandbytes' layers by the method's name has to find them.
    base.quantization_method = QuantizationMethod.BITS_AND_BYTES  # type: ignore[assignment]
    base.config.quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES
    adopted: list[QuantizedLinear] = []
    for path, module in list(base.named_modules()):
        if isinstance(module, (Linear4bit, Linear8bitLt)):
            own = _adopt(module)
            base.set_submodule(path, own)
            adopted.append(own)
    if not adopted:
        raise ModelError(
            f"no layer of {name!r} can be quantized: {type(base).__name__} has no plain linear layers",
            where="key model.quantization",
            fix="set model.quantization: none",
        )
    _probe(base, name)
    return adopted


def _adopt(layer: Linear4bit | Linear8bitLt) -> QuantizedLinear:
    own: QuantizedLinear
    if isinstance(layer, Linear8bitLt):
        own = QuantizedLinear8bit.adopt(layer)
    else:
        own = QuantizedLinear4bit.adopt(layer)
    own.source_cls = layer.source_cls  # type: ignore[assignment]
    own.weight_error = getattr(layer, "weight_error", None)
    own.residual = getattr(layer, "residual", None)
    return own.train(layer.training)


def _probe(base: PreTrainedModel, name: str) -> None:
    """Run a few tokens: a model that takes weights past its layers fails on packed ones."""
    ids = torch.zeros((1, _PROBE_TOKENS), dtype=torch.long, device=base.device)
    try:
        with torch.no_grad():
            base(input_ids=ids, use_cache=False)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ModelError(
            f"{name!r} does not run with quantized layers: {excerpt(error)}",
            where="key model.quantization",
            fix="set model.quantization: none",
        ) from error
