"""Packed rows to tensors: `MicroBatch` and `StepBatch`.

Owns padding. Padded positions are hidden by position, never by token id.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loralab.data.example import TokenizedExample
from loralab.layout.tree import Int64Array, PackedRow, Root, find_roots


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """R rows of up to L tokens that go through the model together.

    Attributes:
        input_ids: token ids, zero behind a row's end (R, L).
        attention_mask: one where there is a token (R, L).
        position_ids: positions (A, R, L).
        depth: tokens from the root (R, L).
        subtree_end: end of each token's subtree (R, L); zero behind a row's end.
        token_prefixes: a hash of all token ids from the root to each token (R, L).
        label_positions: index into the R x L flattened positions (N).
        labels: token ids to predict (N).
        label_examples: index of each label's example within the step (N).
        tokens: number of tokens without padding.
        roots: the trees of the only row, or None where rows are plain chains.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    depth: Tensor
    subtree_end: Tensor
    token_prefixes: Tensor
    label_positions: Tensor
    labels: Tensor
    label_examples: Tensor
    tokens: int
    roots: tuple[Root, ...] | None

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the same batch on `device`."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value.to(device, non_blocking=True)
        return MicroBatch(**values)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """All micro-batches of one optimizer step of this rank.

    Attributes:
        micro_batches: in order; their sums make the step.
        supervised_tokens: labels in all micro-batches.
        examples: what was laid out, so that it can be laid out again when memory runs out.
    """

    micro_batches: tuple[MicroBatch, ...]
    supervised_tokens: int
    examples: tuple[TokenizedExample, ...]

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        """Source and row number of each example, for messages."""
        return tuple((example.source, example.row) for example in self.examples)

    @property
    def tokens(self) -> int:
        """Number of tokens laid out, without padding."""
        return sum(batch.tokens for batch in self.micro_batches)

    @property
    def example_tokens(self) -> int:
        """Number of tokens that the examples have, each branch on its own."""
        return sum(len(b.prompt_ids) + len(b.answer_ids) - 1 for e in self.examples for b in e.branches)


def collate_rows(rows: Sequence[PackedRow], *, trees: bool) -> MicroBatch:
    """Pad `rows` on the right to the longest and join their labels.

    Args:
        rows: rows of one micro-batch; one where they are trees.
        trees: whether visibility is that of trees, not that of plain chains.
    """
    length = max(len(row) for row in rows)
    label_positions = np.concatenate([row.label_positions + index * length for index, row in enumerate(rows)])
    axes = rows[0].position_ids.shape[0]
    return MicroBatch(
        input_ids=_padded([row.input_ids for row in rows], length),
        attention_mask=_padded([np.ones(len(row), dtype=np.int64) for row in rows], length),
        position_ids=torch.stack([_padded([row.position_ids[a] for row in rows], length) for a in range(axes)]),
        depth=_padded([row.depth for row in rows], length),
        subtree_end=_padded([row.subtree_end for row in rows], length),
        token_prefixes=_padded([row.token_prefixes for row in rows], length),
        label_positions=torch.from_numpy(label_positions),
        labels=torch.from_numpy(np.concatenate([row.labels for row in rows])),
        label_examples=torch.from_numpy(np.concatenate([row.label_examples for row in rows])),
        tokens=sum(map(len, rows)),
        roots=find_roots(rows[0]) if trees else None,
    )


def _padded(arrays: Sequence[Int64Array], length: int) -> Tensor:
    out = np.zeros((len(arrays), length), dtype=np.int64)
    for index, array in enumerate(arrays):
        out[index, : len(array)] = array
    return torch.from_numpy(out)
