"""Packed rows to tensors: `MicroBatch` and `StepBatch`.

Owns padding. Padded positions are hidden by position, never by token id.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from loralab.data.example import ImageFile, TokenizedExample
from loralab.layout.paths import Int64Array
from loralab.layout.tree import PackedRow, Root, find_roots


class PictureReader(Protocol):
    """What gives a planner the pictures of a micro-batch; `data.images.reader.PictureReader` is one."""

    @property
    def token(self) -> int:
        """Id of the token that takes a feature of a picture."""

    @property
    def axes(self) -> int:
        """A, of the model's positions."""

    def read(self, files: Sequence[ImageFile]) -> Mapping[str, Tensor]:
        """Return what the model needs of pictures: pixels, or `features` (M, D) that are known already."""


@dataclass(frozen=True, slots=True)
class PictureBatch:
    """The pictures of a micro-batch, each once, however often it stands there.

    Attributes:
        tensors: what the vision tower takes of all of them, by name; or `features` (M, D).
        counts: features of each picture.
        keys: a number drawn from each picture's bytes; dropout is keyed by it.
        positions: index into the R x L flattened positions of every feature that is put in (P).
        features: index into the features of all pictures, one behind the other, of each (P).
    """

    tensors: Mapping[str, Tensor]
    counts: tuple[int, ...]
    keys: tuple[int, ...]
    positions: Tensor
    features: Tensor

    def to(self, device: torch.device) -> "PictureBatch":
        """Return the same batch on `device`."""
        tensors = {name: value.to(device, non_blocking=True) for name, value in self.tensors.items()}
        return PictureBatch(tensors, self.counts, self.keys, self.positions.to(device), self.features.to(device))


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
        pictures: its pictures, or None where there are none.
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
    pictures: PictureBatch | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the same batch on `device`."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = value.to(device, non_blocking=True)
            elif isinstance(value, PictureBatch):
                values[name] = value.to(device)
        return MicroBatch(**values)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """All micro-batches of one optimizer step of this rank.

    Attributes:
        micro_batches: in order; their sums make the step.
        supervised_tokens: labels in all micro-batches.
        examples: what was laid out, so that it can be laid out again when memory runs out.
        token_budget: most tokens of a micro-batch that it was laid out under.
    """

    micro_batches: tuple[MicroBatch, ...]
    supervised_tokens: int
    examples: tuple[TokenizedExample, ...]
    token_budget: int

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


def collate_rows(rows: Sequence[PackedRow], *, trees: bool, reader: PictureReader | None = None) -> MicroBatch:
    """Pad `rows` on the right to the longest and join their labels.

    Args:
        rows: rows of one micro-batch; one where they are trees.
        trees: whether visibility is that of trees, not that of plain chains.
        reader: gives the pictures, or None where none are read.
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
        pictures=None if reader is None else _collate_pictures(rows, length, reader),
    )


def _collate_pictures(rows: Sequence[PackedRow], length: int, reader: PictureReader) -> PictureBatch | None:
    shown = [(picture, index * length) for index, row in enumerate(rows) for picture in row.pictures]
    if not shown:
        return None
    counts: dict[ImageFile, int] = {picture.file: len(picture.positions) for picture, _ in shown}
    starts = dict(zip(counts, np.cumsum([0, *counts.values()]).tolist(), strict=False))
    places = [picture.positions + offset for picture, offset in shown]
    features = [starts[picture.file] + np.arange(len(picture.positions)) for picture, _ in shown]
    return PictureBatch(
        tensors=reader.read(list(counts)),
        counts=tuple(counts.values()),
        keys=tuple(int(file.sha256[:15], 16) for file in counts),
        positions=torch.from_numpy(np.concatenate(places)),
        features=torch.from_numpy(np.concatenate(features)),
    )


def _padded(arrays: Sequence[Int64Array], length: int) -> Tensor:
    out = np.zeros((len(arrays), length), dtype=np.int64)
    for index, array in enumerate(arrays):
        out[index, : len(array)] = array
    return torch.from_numpy(out)
