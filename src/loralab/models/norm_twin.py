"""Root-mean-square normalization as one operation of torch on an accelerator.

Owns the swap. Models spell the norm out in eight operations, each of which is a launch and most of which keep a
float32 tensor; torch has the same function in one. On a CPU torch spells it out too, so nothing is changed there.
"""

import copy
import inspect
from typing import Any

import torch
from torch import nn

from loralab.models.precision import Resolved
from loralab.models.probing import fixed_numbers, largest_difference, pull_back

# By how much of its spread an output or gradient may differ, by type: float32 tells functions apart, half precision
# is rounded once by torch and twice by models.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}
_PROBE_ROWS = 4


def join_norms(model: nn.Module, *, device: torch.device, dtype: torch.dtype) -> dict[str, Resolved[str]]:
    """Let the norms of a model be one operation each, where that is faster and computes the same.

    Nothing is swapped on a blueprint, whose memory is that of the model's own norms: a little more.

    Args:
        model: the base, on its device.
        device: where it computes.
        dtype: of its activations.

    Returns:
        How many norms were swapped under `normalization`, or nothing where none was.
    """
    swapped = swap_norms(model, dtype) if device.type == "cuda" else 0
    if not swapped:
        return {}
    return {"normalization": Resolved(f"{swapped} layers", "the same function in one operation of torch, probed here")}


def swap_norms(model: nn.Module, dtype: torch.dtype) -> int:
    """Put torch's norm in the place of every module that computes the same function.

    The weight stays the same parameter under the same name.

    Args:
        model: the base.
        dtype: of its activations; norms whose weights have another type stay.

    Returns:
        How many were swapped.
    """
    equal: dict[Any, bool] = {}
    found = {name: twin for name, module in model.named_modules() if (twin := _twin(module, dtype, equal)) is not None}
    for name, twin in found.items():
        model.set_submodule(name, twin)
    return len(found)


def _twin(module: Any, dtype: torch.dtype, equal: dict[Any, bool]) -> nn.RMSNorm | None:
    """Return torch's norm with a module's weight, or None where the module is no such norm."""
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if isinstance(module, nn.RMSNorm) or not isinstance(weight, nn.Parameter) or not isinstance(epsilon, float):
        return None
    if weight.ndim != 1 or weight.dtype != dtype or dtype not in _TOLERANCES or not _is_bare(module):
        return None
    kind = type(module), len(weight), epsilon
    twin = nn.RMSNorm(len(weight), eps=epsilon, device="meta", dtype=dtype)
    if kind not in equal:
        probed = {torch.float32, dtype}
        equal[kind] = all(_difference(module, twin, each) <= _TOLERANCES[each] for each in probed)
    if not equal[kind]:
        return None
    twin.weight = weight
    return twin.train(module.training)


def _is_bare(module: nn.Module) -> bool:
    """Return whether a module is a function of one input and its weight, and nothing hangs on it."""
    hooks = any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks))
    hooks |= "forward" in vars(module)  # of a base that is spread: it takes its input to its device
    alone = len(list(module.parameters())) == 1 and not list(module.buffers()) and not hooks
    return alone and len(inspect.signature(module.forward).parameters) == 1  # gated norms take a second input


def _difference(module: nn.Module, twin: nn.Module, dtype: torch.dtype) -> float:
    """Return the largest difference of output and gradients between copies with one weight, of their spread."""
    weight: Any = module.weight
    numbers = fixed_numbers(weight.shape, weight.device).to(dtype)
    inputs = fixed_numbers((1, _PROBE_ROWS, len(weight)), weight.device).to(dtype).requires_grad_()
    found = []
    for each in (module, twin):
        probe: Any = copy.deepcopy(each).to_empty(device=weight.device).to(dtype).requires_grad_(True)
        probe.load_state_dict({"weight": numbers})
        with torch.enable_grad():
            out = probe(inputs)
            found.append([out, *pull_back(out, [inputs, probe.weight])])
    if found[0][0].dtype != found[1][0].dtype:
        return float("inf")
    return largest_difference(*found)
