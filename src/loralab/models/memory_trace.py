"""Which tensors a computation makes and when each goes, found without computing anything.

Owns running a model on PyTorch's meta device, where tensors have a shape and no numbers, and noting
how many bytes each would have. So an estimate follows whatever model, adapter and layout do, and
needs no table of architectures.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
_FLASH: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_MATH: Any = torch.ops.aten._scaled_dot_product_attention_math
# What reads a number out of a tensor, and what is answered where there is none.
_READINGS: dict[Any, Any] = {
    Tensor.__bool__: False,  # of a mask: there is padding, the larger case
    Tensor.__float__: 0.0,
    Tensor.__int__: 0,
    Tensor.item: 0.0,
}


@dataclass(frozen=True, slots=True)
class MemoryTrace:
    """The tensors of a computation.

    Attributes:
        events: number and bytes of each tensor that comes, number and -1 of each that goes.
        peak_bytes: most that is alive at once.
    """

    events: tuple[tuple[int, int], ...]
    peak_bytes: int


class WithoutNumbers(TorchFunctionMode):
    """Lets code that looks at numbers, or chooses kernels by device, run on the meta device."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer what has no answer on the meta device; pass on everything else."""
        given = dict(kwargs or {})
        meta = bool(args) and isinstance(args[0], Tensor) and args[0].is_meta
        if meta and func in _READINGS:
            return _READINGS[func]
        if meta and func is functional.scaled_dot_product_attention:
            return _attend(*args, **given)
        return func(*args, **given)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Take the kernel that the device would: the meta device always takes the one that keeps all scores."""
    if query.dim() == 4 and query.shape[-1] == value.shape[-1] and dropout_p == 0.0:
        mask = None if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask
        found: Tensor = _FLASH(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]
        return found
    settings = {"scale": scale, "enable_gqa": enable_gqa}
    by_hand: Tensor = _MATH(query, key, value, attn_mask, dropout_p, is_causal, None, **settings)[0]
    return by_hand


class _Watch(TorchDispatchMode):
    """Notes every storage that comes and goes."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[tuple[int, int]] = []
        self.alive = self.peak = 0
        self._numbers = {_address(tensor): -1 for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        address = _address(tensor)
        if address in self._numbers:
            return
        storage, size, number = tensor.untyped_storage(), tensor.untyped_storage().nbytes(), len(self.events)
        self._numbers[address] = number
        self.events.append((number, size))
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, address, number, size).atexit = False

    def _gone(self, address: int, number: int, size: int) -> None:
        if self._numbers.pop(address, None) is not None:
            self.events.append((number, -1))
            self.alive -= size


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def trace_memory(model: nn.Module, run: Callable[[], object]) -> MemoryTrace:
    """Return which tensors a computation makes beyond a model's own.

    Args:
        model: on the meta device.
        run: the computation.
    """
    watch = _Watch([*model.parameters(), *model.buffers()])
    modes: tuple[AbstractContextManager[object], ...] = (WithoutNumbers(), watch)
    with modes[0], modes[1]:
        run()
    return MemoryTrace(tuple(watch.events), watch.peak)
