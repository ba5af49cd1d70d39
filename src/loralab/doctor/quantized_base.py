"""The tiny base with 4-bit weights, for the QLoRA step; needs bitsandbytes."""

from typing import Any, cast

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor
from transformers import LlamaForCausalLM

from loralab.models.quantized import QuantizedLinear4bit
from loralab.models.targets import linear_layers

_Linear4bit: Any = Linear4bit  # its constructor has no types


def place_quantized(base: LlamaForCausalLM, device: torch.device) -> dict[str, Tensor]:
    """Put the base on a device with its linear layers in NF4, and return the weights that they stand for.

    Args:
        base: on the CPU.
        device: where to.

    Returns:
        The weights of the quantized layers by name, float64, on the CPU.
    """
    stands_for = {}
    layer: Any
    for name, layer in linear_layers(base).items():
        stored: Any = _Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
        stored.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=stored)
        quantized = QuantizedLinear4bit.adopt(stored.to(device))
        base.set_submodule(name, quantized)
        stands_for[f"{name}.weight"] = quantized.dequantized(layer.weight.dtype).double().cpu()
    cast(Any, base).is_loaded_in_4bit = True  # by which PEFT knows
    base.to(device)  # type: ignore[arg-type]
    return stands_for
