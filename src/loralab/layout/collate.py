"""Packed rows to tensors: `MicroBatch` and `StepBatch`.

Owns padding. Padded positions are hidden by position, never by token id.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from loralab.layout.tree import Int64Array, PackedRow


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """R rows of up to L tokens that go through the model together.

    Attributes:
        input_ids: token ids, zero behind a row's end (R, L).
        attention_mask: one where there is a token (R, L).
        position_ids: positions (A, R, L).
        depth: tokens from the root (R, L).
        subtree_end: end of each token's subtree (R, L); zero behind a row's end.
        label_positions: index into the R x L flattened positions (N).
        labels: token ids to predict (N).
        label_examples: index of each label's example within the step (N).
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    depth: Tensor
    subtree_end: Tensor
    label_positions: Tensor
    labels: Tensor
    label_examples: Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the same batch on `device`."""
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        return replace(self, **moved)

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return int(self.attention_mask.sum())


@dataclass(frozen=True, slots=True)
class StepBatch:
    """All micro-batches of one optimizer step of this rank.

    Attributes:
        micro_batches: in order; their sums make the step.
        supervised_tokens: labels in all micro-batches.
        rows: source and row number of each example, for messages.
    """

    micro_batches: tuple[MicroBatch, ...]
    supervised_tokens: int
    rows: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        """Number of tokens laid out, without padding."""
        return sum(batch.tokens for batch in self.micro_batches)


def collate_rows(rows: Sequence[PackedRow]) -> MicroBatch:
    """Pad `rows` on the right to the longest and join their labels."""
    length = max(len(row) for row in rows)
    label_positions = np.concatenate([row.label_positions + index * length for index, row in enumerate(rows)])
    axes = rows[0].position_ids.shape[0]
    return MicroBatch(
        input_ids=_padded([row.input_ids for row in rows], length),
        attention_mask=_padded([np.ones(len(row), dtype=np.int64) for row in rows], length),
        position_ids=torch.stack([_padded([row.position_ids[a] for row in rows], length) for a in range(axes)]),
        depth=_padded([row.depth for row in rows], length),
        subtree_end=_padded([row.subtree_end for row in rows], length),
        label_positions=torch.from_numpy(label_positions),
        labels=torch.from_numpy(np.concatenate([row.labels for row in rows])),
        label_examples=torch.from_numpy(np.concatenate([row.label_examples for row in rows])),
    )


def _padded(arrays: Sequence[Int64Array], length: int) -> Tensor:
    out = np.zeros((len(arrays), length), dtype=np.int64)
    for index, array in enumerate(arrays):
        out[index, : len(array)] = array
    return torch.from_numpy(out)
