"""The forward of a plain LoRA layer as one autograd function.

Owns that function, where it takes the place of PEFT's forward, and the check that both compute the same.
It is the one place where a library's method is replaced, and only on single layers of exactly PEFT's own
classes (`norm_twin.py` puts modules of torch in the place of others): PEFT's forward casts a half-precision input
to float32, keeps the copy for the backward sweep, and adds the update in float32 to a product that it then rounds
again. Here the update is added in place to the base's product, in the input's type; what is kept is the input
itself (that layers which read the same activations share) and its image under A. Gradients arrive in the masters'
own float32.

Whatever is not that plain case (merged, disabled, several adapters, a variant) goes PEFT's own way, call by call.
"""

from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from loralab.models.dropout import DropMask, KeyedDropout
from loralab.models.precision import Resolved
from loralab.models.probing import fixed_numbers, largest_difference, pull_back
from loralab.models.quantization import BITSANDBYTES

if BITSANDBYTES:
    from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
    from peft.tuners.lora.bnb import Linear8bitLt as LoraLinear8bit

    from loralab.models.quantized import QuantizedLinear

# The classes whose forward may be replaced; those below them are other variants.
_FUSED: tuple[type[nn.Module], ...] = (LoraLinear, LoraLinear4bit, LoraLinear8bit) if BITSANDBYTES else (LoraLinear,)
# By how much of its spread an output or gradient may differ from PEFT's, by type of the input.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
_PROBE_ROWS = 5


class _FusedLora(torch.autograd.Function):
    """base(x) + scale (x . keep) A^T B^T for a frozen base and float32 masters A (r, in), B (out, r)."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, a: Tensor, b: Tensor, base: nn.Module, scale: float, mask: DropMask | None
    ) -> Tensor:
        rows = inputs.flatten(0, -2)
        low_a, low_b = a.to(rows.dtype), b.to(rows.dtype)
        image = _kept(rows, mask) @ low_a.T
        out = _product(base, rows).addmm_(image, low_b.T, alpha=scale)
        ctx.base, ctx.scale, ctx.mask = base, scale, mask
        ctx.save_for_backward(rows, low_a, low_b, image)
        return out.view(*inputs.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, low_a, low_b, image = ctx.saved_tensors
        (gradient,) = gradients
        above = gradient.flatten(0, -2)
        pulled = above @ low_b  # (n, r)
        of_a = of_b = of_inputs = None
        if ctx.needs_input_grad[1]:
            of_a = _scaled_product(pulled.T, _kept(rows, ctx.mask), ctx.scale)
        if ctx.needs_input_grad[2]:
            of_b = _scaled_product(above.T, image, ctx.scale)
        if ctx.needs_input_grad[0]:
            of_inputs = _pull(ctx.base, above)
            if ctx.mask is None:
                of_inputs.addmm_(pulled, low_a, alpha=ctx.scale)
            else:
                of_inputs.add_(_kept(pulled @ low_a, ctx.mask), alpha=ctx.scale)
            of_inputs = of_inputs.view(*gradient.shape[:-1], rows.shape[-1])
        return of_inputs, of_a, of_b, None, None, None


def _kept(rows: Tensor, mask: DropMask | None) -> Tensor:
    return rows if mask is None else mask.apply(rows)


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return scale (left . right) in float32, as a tensor of its own."""
    if left.is_cuda and torch.version.hip is None and left.dtype in (torch.bfloat16, torch.float16):
        # One launch instead of three, and no rounding to half precision; CPUs and AMD's GPUs have no such product.
        unread = left.new_empty((1, 1), dtype=torch.float32)  # beta is 0
        return torch.addmm(unread, left, right, out_dtype=torch.float32, beta=0, alpha=scale)
    return (left @ right).float().mul_(scale)


def _product(base: Any, rows: Tensor) -> Tensor:
    """Return a frozen layer's output for rows (n, in), as a tensor of its own."""
    bias = None if base.bias is None else base.bias.to(rows.dtype)
    if isinstance(base, Conv1D):
        return torch.addmm(bias, rows, base.weight)  # type: ignore[arg-type]
    return functional.linear(rows, _weight(base, rows.dtype), bias)


def _pull(base: Any, above: Tensor) -> Tensor:
    """Return the gradient of a frozen layer's inputs (n, in), as a tensor of its own."""
    return above @ (base.weight.T if isinstance(base, Conv1D) else _weight(base, above.dtype))


def _weight(base: Any, dtype: torch.dtype) -> Tensor:
    """Return a linear layer's weight (out, in); a quantized one is dequantized for this use and not kept."""
    if BITSANDBYTES and isinstance(base, QuantizedLinear):
        return base.dequantized(dtype)
    weight: Tensor = base.weight
    return weight


def fuse_lora(model: nn.Module, *, dtype: torch.dtype) -> Resolved[str]:
    """Give the plain LoRA layers of a model the fused forward, where it computes what PEFT's does.

    Args:
        model: base with adapter, on its device; on the meta device nothing can be compared, and nothing is.
        dtype: of the model's activations.

    Returns:
        How many layers have it, and why the others have not.
    """
    layers = {name: module for name, module in model.named_modules() if _is_plain(module, dtype)}
    if not layers:
        return Resolved("off", "no plain LoRA layer; every other kind has PEFT's own forward")
    found: dict[Any, float] = {}
    for name, layer in layers.items():
        kind = _kind(layer)
        if kind not in found:
            found[kind] = _difference(layer, dtype)
        if not found[kind] <= _TOLERANCES[dtype]:
            return Resolved("off", f"{name} differs from PEFT's own forward by {found[kind]:.1e} of its spread")
    for layer in layers.values():
        # On this one object: its class, and with it every other model, keeps PEFT's forward.
        layer.forward = MethodType(_forward, layer)
    return Resolved(
        f"{len(layers)} layers", f"outputs and gradients equal PEFT's within {max(found.values()):.1e} of their spread"
    )


def _is_plain(module: Any, dtype: torch.dtype) -> bool:
    """Return whether a module is a LoRA layer of exactly PEFT's own classes whose forward has no more to it."""
    if type(module) not in _FUSED or len(module.lora_A) != 1 or module.lora_variant:
        return False
    (name,) = module.lora_A
    base = module.get_base_layer()
    quantized = BITSANDBYTES and isinstance(base, QuantizedLinear)
    known = quantized or (type(base) in (nn.Linear, Conv1D) and base.weight.dtype == dtype)
    frozen = not any(weight.requires_grad for weight in base.parameters())
    exact = all(type(part) is nn.Linear and part.bias is None for part in (module.lora_A[name], module.lora_B[name]))
    drops = isinstance(module.lora_dropout[name], (KeyedDropout, nn.Identity))
    return bool(exact and known and frozen and drops and dtype in _TOLERANCES)


def _kind(layer: Any) -> tuple[Any, ...]:
    """Return what decides on how a layer computes."""
    base = layer.get_base_layer()
    (name,) = layer.lora_A
    return type(base), layer.in_features, layer.out_features, base.bias is None, layer.r[name], layer.scaling[name]


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Return the output of a plain LoRA layer; anything else goes PEFT's own way."""
    (name,) = layer.lora_A if len(layer.lora_A) == 1 else ("",)
    usual = not (args or kwargs or layer.disable_adapters or layer.merged) and list(layer.active_adapters) == [name]
    if not usual:
        return type(layer).forward(layer, x, *args, **kwargs)
    dropout, scale = layer.lora_dropout[name], float(layer.scaling[name])
    mask = dropout.draw(x) if isinstance(dropout, KeyedDropout) else None
    if mask is not None:
        scale /= 1.0 - dropout.p
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return _FusedLora.apply(x, a, b, layer.get_base_layer(), scale, mask)


def _difference(layer: Any, dtype: torch.dtype) -> float:
    """Return the largest difference of outputs and gradients from PEFT's forward, as a share of their spread.

    A fresh B is zero, which would hide the update: it is filled for the comparison, and put back as it was.
    """
    (name,) = layer.lora_A
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    if b.is_meta:
        return 0.0
    dropout = layer.lora_dropout[name]
    before = b.detach().clone()
    with torch.no_grad():
        b.copy_(fixed_numbers(b.shape, b.device) / max(layer.in_features, 1) ** 0.5)
    keyed = dropout.keys.numbered(_PROBE_ROWS, b.device) if isinstance(dropout, KeyedDropout) else nullcontext()
    try:
        with keyed:
            ours, theirs = (_probe(layer, forward, (a, b), dtype) for forward in (_forward, type(layer).forward))
        return largest_difference(ours, theirs)
    finally:
        with torch.no_grad():
            b.copy_(before)


def _probe(layer: Any, forward: Any, factors: tuple[Tensor, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return output and gradients of a few fixed rows."""
    inputs = fixed_numbers((_PROBE_ROWS, layer.in_features), factors[0].device).to(dtype).requires_grad_()
    with torch.enable_grad():
        out = forward(layer, inputs)
        return [out, *pull_back(out, [inputs, *(factor for factor in factors if factor.requires_grad)])]
