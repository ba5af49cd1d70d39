"""Linear layers with 4-bit and 8-bit weights, for training and evaluation alike.

Owns their product and the record of what quantization did. Needs bitsandbytes, for the storage
format and its conversion. Does not own which quantization there is (`quantization.py`), nor how
the layers get into a base (`quantized_loading.py`).

The product is always the one of dequantized weights in the type of the input. bitsandbytes' own
forward is never taken: in evaluation on a CPU with AVX512-BF16 it lays the weights out anew for
a kernel without gradients, and training after that goes on with wrong ones. LLM.int8's products
of rounded activations are not taken either: int8 here means the weights alone.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from bitsandbytes import functional as bnb_functional
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from loralab.models.factors import Factors


@dataclass(frozen=True, slots=True)
class WeightError:
    """What quantization did to weights, as sums that add up over layers.

    Attributes:
        squared: sum of squared differences to the original weights.
        reference: sum of squares of the original weights.
        count: number of weights.
    """

    squared: float
    reference: float
    count: int

    def __add__(self, other: "WeightError") -> "WeightError":
        return WeightError(self.squared + other.squared, self.reference + other.reference, self.count + other.count)


def dequantize(weight: Any) -> Tensor:
    """Return what a quantized weight stands for (out, in); 4 bits in the type that was quantized, 8 in float32.

    Args:
        weight: a parameter of the library's, `Params4bit` or `Int8Params`.
    """
    if isinstance(weight, Int8Params):
        return cast(Tensor, bnb_functional.int8_vectorwise_dequant(weight.data, weight.SCB.to(weight.device)))
    return _dequantize_4bit(weight.data, weight.quant_state)


def _dequantize_4bit(packed: Tensor, state: bnb_functional.QuantState) -> Tensor:
    """Dequantize in blocks, whatever the shape.

    Row by row, the library's CPU kernel returns wrong numbers for rows of an odd multiple of 32
    (0.50), and for rows of odd length it compiles code while the model runs.
    """
    count = packed.numel() * packed.element_size() * 2  # one more than there are where that is odd
    block = int(state.blocksize)
    scales = state.absmax
    if state.nested:
        scales = bnb_functional.dequantize_blockwise(scales, state.state2) + state.offset
    flat = bnb_functional.QuantState(  # type: ignore[no-untyped-call]
        absmax=scales.float(),
        shape=torch.Size((count // block, block) if count % block == 0 else (1, count)),
        dtype=state.dtype,
        blocksize=block,
        quant_type=state.quant_type,
    )
    found: Tensor = bnb_functional.dequantize_4bit(packed, flat)
    return found.flatten()[: state.shape.numel()].view(state.shape)


class _DequantizedProduct(torch.autograd.Function):
    """inputs @ weight.T + bias for a frozen quantized weight; both sweeps dequantize it, neither keeps it."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, bias: Tensor | None, layer: "QuantizedLinear") -> Tensor:
        ctx.layer = layer
        return functional.linear(inputs, layer.dequantized(inputs.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        inputs = gradient @ ctx.layer.dequantized(gradient.dtype) if ctx.needs_input_grad[0] else None
        bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return inputs, bias, None


class QuantizedLinear(nn.Linear):
    """What both kinds of quantized layers share.

    Attributes:
        source_cls: class of the layer that was replaced.
        weight_error: what quantization did to this layer; None where the original was never seen.
        residual: low-rank factors of it, until an adapter has taken them; None where none were asked for.
    """

    weight: Any  # the library's parameter, which carries its scales
    source_cls: type[nn.Module] = nn.Linear
    weight_error: WeightError | None = None
    residual: Factors | None = None

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the weights that the layer stands for (out, in), in `dtype`."""
        return dequantize(self.weight).to(dtype)

    def stored_bytes(self) -> int:
        """Return the bytes of the weights and their scales."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs @ weight.T + bias, in the type of the inputs."""
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return cast(Tensor, _DequantizedProduct.apply(inputs, bias, self))


# The library's classes come second: theirs is the storage, and PEFT knows its layers by them.
class QuantizedLinear4bit(QuantizedLinear, Linear4bit):
    """A linear layer in NF4 or FP4."""

    @classmethod
    def adopt(cls, layer: Linear4bit) -> "QuantizedLinear4bit":
        """Return a layer that holds the parameters of the library's layer."""
        weight: Any = layer.weight
        own = cls(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            compress_statistics=weight.compress_statistics,
            quant_type=weight.quant_type,
            quant_storage=weight.quant_storage,
            device="meta",
        )
        own.weight, own.bias = weight, layer.bias
        own.quant_state, weight.module = weight.quant_state, own
        return own

    def stored_bytes(self) -> int:
        """Return the bytes of the weights and their scales."""
        state = self.weight.quant_state
        scales = [state.absmax, *([state.state2.absmax] if state.nested else [])]
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.weight.data, *scales))


class QuantizedLinear8bit(QuantizedLinear, Linear8bitLt):
    """A linear layer whose rows are 8-bit integers times a scale."""

    @classmethod
    def adopt(cls, layer: Linear8bitLt) -> "QuantizedLinear8bit":
        """Return a layer that holds the parameters of the library's layer."""
        own = cls(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            has_fp16_weights=layer.state.has_fp16_weights,
            threshold=layer.state.threshold,
            device="meta",
        )
        own.weight, own.bias = layer.weight, layer.bias
        return own

    def stored_bytes(self) -> int:
        """Return the bytes of the weights and their scales."""
        scales = self.weight.SCB
        return int(self.weight.numel() + scales.numel() * scales.element_size())


def describe_quantization(base: PreTrainedModel) -> dict[str, Any] | None:
    """Return what was quantized and what that did to the weights, or None for an unquantized base.

    Args:
        base: the frozen base; an adapter on it counts for nothing.
    """
    layers = dict(quantized_layers(base))
    if not layers:
        return None
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    stored = sum(layer.stored_bytes() for layer in layers.values())
    packed = {id(layer.weight) for layer in layers.values()}
    others = sum(w.numel() for w in base.parameters() if id(w) not in packed and not w.requires_grad)
    kinds: dict[str, list[WeightError | None]] = defaultdict(list)
    for name, layer in layers.items():
        kinds[name.removesuffix(".base_layer").rpartition(".")[2]].append(layer.weight_error)
    return {
        "layers": len(layers),
        "weights": weights,
        "weights_not_quantized": others,
        "bytes": stored,
        "bits_per_weight": round(8 * stored / weights, 3),
        "error": _error([layer.weight_error for layer in layers.values()]),
        "error_by_layer": {kind: _error(errors) for kind, errors in sorted(kinds.items())},
    }


def quantized_layers(base: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Return every quantized layer of a model, with its full name."""
    return ((name, module) for name, module in base.named_modules() if isinstance(module, QuantizedLinear))


def _error(errors: list[WeightError | None]) -> dict[str, float] | None:
    known = [error for error in errors if error is not None]
    if not known or len(known) < len(errors):
        return None
    total = sum(known[1:], known[0])
    relative = math.sqrt(total.squared / total.reference) if total.reference else 0.0
    return {"mean_squared": total.squared / total.count, "relative": relative}


def weight_sizes(module: nn.Module) -> Iterator[tuple[int, bool]]:
    """Yield, for each parameter, how many numbers it stands for, and whether it is trained."""
    unpacked = {id(layer.weight): layer.in_features * layer.out_features for _, layer in quantized_layers(module)}
    for parameter in module.parameters():
        yield unpacked.get(id(parameter), parameter.numel()), parameter.requires_grad
