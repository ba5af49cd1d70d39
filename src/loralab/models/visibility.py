"""What the tokens of a row may see: the question that attention kernels build their masks from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Allowed = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class TreeSegment(Protocol):
    """Tokens of a tree without a branch between them; `layout.tree.Segment` is one."""

    @property
    def start(self) -> int:
        """Index of its first token."""

    @property
    def end(self) -> int:
        """Index past its last token."""

    @property
    def above(self) -> Sequence[tuple[int, int]]:
        """Start and end of the ranges of tokens between the root and it, in order."""


class TreeRoot(Protocol):
    """One tree of a row; `layout.tree.Root` is one."""

    @property
    def start(self) -> int:
        """Index of its first token."""

    @property
    def end(self) -> int:
        """Index past its last token."""

    @property
    def branching(self) -> bool:
        """Whether it is more than one chain of tokens."""

    @property
    def segments(self) -> Sequence[TreeSegment]:
        """Its parts between branches, in order; empty where they are not known."""


Plain = Callable[[TreeRoot], bool]


@dataclass(frozen=True, slots=True)
class Visibility:
    """What the tokens of a row may see in layers of one kind.

    Attributes:
        roots: the trees of the row.
        allowed: given batch, head, query and key as index tensors, whether the query sees the key.
        plain: whether a root is a causal chain and nothing else.
        device: where the row is.
        dtype: compute type, which additive masks have.
    """

    roots: Sequence[TreeRoot]
    allowed: Allowed
    plain: Plain
    device: torch.device
    dtype: torch.dtype

    def additive(self, start: int, end: int) -> Tensor:
        """Return 0 where a token of the span sees another and -inf where not (T, T).

        Made once for all layers of a kind: of a boolean mask each layer would make and keep its own.
        """
        index = torch.arange(start, end, device=self.device)
        return self.additive_between(index, index)

    def additive_between(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return 0 where a query sees a key and -inf where not.

        Args:
            queries: indices into the row (Q).
            keys: indices into the row (K).

        Returns:
            Of the compute type (Q, K).
        """
        nothing = torch.zeros((), dtype=torch.long, device=self.device)
        seen = self.allowed(nothing, nothing, queries[:, None], keys[None, :])
        return torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen, float("-inf"))
