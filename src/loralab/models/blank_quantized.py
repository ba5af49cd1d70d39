"""Quantized layers without numbers, for a base on the meta device.

Owns standing in for `quantized.py`'s layers: the same classes to PEFT, the same memory. Needs
bitsandbytes, as those do.
"""

from typing import Any

import torch
from bitsandbytes.nn.modules import Int8Params, Params4bit
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationMethod

from loralab.models.memory_trace import META
from loralab.models.quantization import Quantization
from loralab.models.quantized import QuantizedLinear, QuantizedLinear4bit, QuantizedLinear8bit

_BLOCK = 64  # weights that share a scale
_SCALES_BLOCK = 256  # scales that share one of theirs


class _Blank4bit(QuantizedLinear4bit):
    """A layer in 4 bits without numbers."""

    scale_bytes: int = 0

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return a tensor of the weights' shape."""
        return torch.empty((self.out_features, self.in_features), dtype=dtype, device=META)

    def stored_bytes(self) -> int:
        """Return the bytes of the weights and their scales."""
        return int(self.weight.numel()) + self.scale_bytes


class _Blank8bit(QuantizedLinear8bit):
    """A layer in 8 bits without numbers."""

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return a tensor of the weights' shape, made by way of float32."""
        return torch.empty((self.out_features, self.in_features), dtype=torch.float32, device=META).to(dtype)

    def stored_bytes(self) -> int:
        """Return the bytes of the weights and of a float32 scale for each row."""
        return self.in_features * self.out_features + 4 * self.out_features


def quantize_blank(base: PreTrainedModel, chosen: Quantization) -> None:
    """Put blank quantized layers into a base on the meta device, where loading would put quantized ones.

    Args:
        base: the base; it is changed.
        chosen: the quantization.
    """
    kept = get_keys_to_not_convert(base)
    for name, module in list(base.named_modules()):
        plain = type(module) is nn.Linear or isinstance(module, Conv1D)
        if plain and should_convert_module(name, kept):
            base.set_submodule(name, _blank(module, chosen))
    # As a loaded base says it: PEFT chooses its layers by these.
    base.quantization_method = QuantizationMethod.BITS_AND_BYTES  # type: ignore[assignment]
    setattr(base, "is_loaded_in_8bit" if chosen.kind == "int8" else "is_loaded_in_4bit", True)


def _blank(module: Any, chosen: Quantization) -> QuantizedLinear:
    conv = isinstance(module, Conv1D)
    inside, out = module.weight.shape if conv else reversed(module.weight.shape)
    own: QuantizedLinear
    if chosen.kind == "int8":
        own = _Blank8bit(inside, out, module.bias is not None, has_fp16_weights=False, device="meta")
        data = torch.empty((out, inside), dtype=torch.int8, device=META)
        own.weight = Int8Params(data, requires_grad=False, has_fp16_weights=False)
    else:
        own = _Blank4bit(  # type: ignore[no-untyped-call]
            inside,
            out,
            module.bias is not None,
            compress_statistics=chosen.double,
            quant_type=chosen.kind,
            device="meta",
        )
        own.weight = Params4bit(
            torch.empty(((inside * out + 1) // 2, 1), dtype=torch.uint8, device=META),
            requires_grad=False,
            compress_statistics=chosen.double,
            quant_type=chosen.kind,
            bnb_quantized=True,
        )
        scales = -(-inside * out // _BLOCK)
        own.scale_bytes = scales + 4 * -(-scales // _SCALES_BLOCK) if chosen.double else 4 * scales
    own.bias = module.bias
    own.source_cls = type(module)
    return own
