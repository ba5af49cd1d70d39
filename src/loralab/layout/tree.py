"""Packed rows: where each token lies, what it sees, and which labels it predicts.

Owns the label shift, here and nowhere else: the logits at a position predict the token that
follows it. A row is a depth-first walk of a forest of token segments; token `q` sees token `k`
exactly when `k <= q < subtree_end[k]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loralab.data.example import Branch, TokenizedExample

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One row of L tokens with N supervised labels.

    Attributes:
        input_ids: token ids (L).
        depth: tokens from the root (L).
        position_ids: what the model's position embedding wants (A, L); A = 1 for text.
        subtree_end: index just past the last token below this token's segment (L).
        label_positions: positions whose logits predict a label (N); one may occur repeatedly.
        labels: token ids to predict (N).
        label_examples: index of each label's example within the step (N).
    """

    input_ids: Int64Array
    depth: Int64Array
    position_ids: Int64Array
    subtree_end: Int64Array
    label_positions: Int64Array
    labels: Int64Array
    label_examples: Int64Array

    def __len__(self) -> int:
        return len(self.input_ids)


def build_rows(examples: Sequence[TokenizedExample]) -> list[list[PackedRow]]:
    """Lay out each example of a step on its own: one tree per chain of branches.

    Branches that extend each other (the turns of a conversation) share one row.

    Returns:
        For each example its rows.
    """
    return [[_chain_row(chain, index) for chain in _chains(example.branches)] for index, example in enumerate(examples)]


def _chains(branches: Sequence[Branch]) -> list[list[Branch]]:
    chains: list[list[Branch]] = []
    for branch in branches:
        if chains and _extends(branch, chains[-1][-1]):
            chains[-1].append(branch)
        else:
            chains.append([branch])
    return chains


def _extends(branch: Branch, earlier: Branch) -> bool:
    path = np.concatenate([earlier.prompt_ids, earlier.answer_ids])
    whole = np.concatenate([branch.prompt_ids, branch.answer_ids])
    return len(whole) >= len(path) and bool(np.array_equal(whole[: len(path)], path))


def _chain_row(chain: Sequence[Branch], example: int) -> PackedRow:
    last = chain[-1]
    input_ids = np.concatenate([last.prompt_ids, last.answer_ids]).astype(np.int64)
    # The last answer token predicts nothing and is predicted from the one before: it need not be read.
    input_ids = input_ids[:-1]
    length = len(input_ids)
    positions = [len(b.prompt_ids) - 1 + np.arange(len(b.answer_ids), dtype=np.int64) for b in chain]
    labels = np.concatenate([b.answer_ids for b in chain]).astype(np.int64)
    depth = np.arange(length, dtype=np.int64)
    return PackedRow(
        input_ids=input_ids,
        depth=depth,
        position_ids=depth[None, :],
        subtree_end=np.full(length, length, dtype=np.int64),
        label_positions=np.concatenate(positions),
        labels=labels,
        label_examples=np.full(len(labels), example, dtype=np.int64),
    )
