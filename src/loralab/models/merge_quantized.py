"""Weights of a quantized base, one layer at a time, as the loaded base holds them.

Owns quantizing and dequantizing one weight as loading does, and unpacking stored ones. Needs bitsandbytes.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
from bitsandbytes import functional as bnb_functional
from bitsandbytes.nn.modules import Int8Params, Params4bit
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from loralab.models.quantization import Quantization
from loralab.models.quantized import dequantize


def quantized_names(base: PreTrainedModel) -> set[str]:
    """Return the full names of the layers that loading quantizes.

    Args:
        base: the unquantized model, on any device.
    """
    kept = get_keys_to_not_convert(base)
    return {
        name
        for name, module in base.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    }


def requantize(
    weight: Tensor, chosen: Quantization, *, dtype: torch.dtype, device: torch.device, turned: bool = False
) -> Tensor:
    """Return what a weight is after quantization, in its own shape, float32.

    Args:
        weight: as stored.
        chosen: the quantization.
        dtype: type that the base is loaded in.
        device: where the base is quantized.
        turned: whether the layer is a Conv1D, which holds its weight the other way round.
    """
    value = weight.to(device=device, dtype=dtype)
    value = value.T if turned else value
    packed: Any
    if chosen.kind == "int8":
        packed = cast(Any, Int8Params)(value.to("cpu"), requires_grad=False, has_fp16_weights=False).to(device)
    else:
        packed = cast(Any, Params4bit)(
            value, requires_grad=False, compress_statistics=chosen.double, quant_type=chosen.kind
        ).to(device)
    found = dequantize(packed).to(dtype).float().cpu()
    return found.T.contiguous() if turned else found


def unpack(parts: Mapping[str, Tensor], *, dtype: torch.dtype, device: torch.device, turned: bool = False) -> Tensor:
    """Return what a weight stands for that is stored quantized, in the layer's own shape, float32.

    Args:
        parts: `weight` and the tensors beside it, by what follows the layer's name.
        dtype: type that the base is loaded in.
        device: where the base is dequantized.
        turned: whether the layer is a Conv1D.
    """
    if "SCB" in parts:
        found = bnb_functional.int8_vectorwise_dequant(parts["weight"], parts["SCB"])
    else:
        beside = {name: value for name, value in parts.items() if name not in ("weight", "bias")}
        packed = Params4bit.from_prequantized(
            data=parts["weight"], quantized_stats=beside, requires_grad=False, device=device
        )
        found = dequantize(packed)
    plain: Tensor = found.to(dtype).float().cpu()
    return plain.T.contiguous() if turned else plain
