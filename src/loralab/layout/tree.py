"""Token trees: where each token lies, what it sees, and which labels it predicts.

Owns the label shift, here and nowhere else: the logits at a position predict the token that
follows it. A row is a depth-first walk of a forest of token segments; token `q` sees token `k`
exactly when `k <= q < subtree_end[k]`. Which leaves go into one row is the planner's choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loralab.data.example import Branch, ImageFile, PlacedImage, TokenizedExample
from loralab.layout.paths import GOLDEN, Int64Array, mixed, token_keys, token_positions


@dataclass(frozen=True, slots=True)
class Leaf:
    """One branch of one example as a path from the root, with the labels along it.

    The answer's last token predicts nothing and is predicted from the one before, so it is a
    label but not on the path.

    Attributes:
        ids: token ids of the path (L).
        labels: token ids to predict, by the last N tokens of the path (N).
        example: index of the example within the step.
        branch: index of the branch within its example.
        keys: what tells its tokens apart: ids, and other numbers inside pictures (L).
        images: pictures among its tokens, in order.
    """

    ids: Int64Array
    labels: Int64Array
    example: int
    branch: int
    keys: Int64Array
    images: Sequence[PlacedImage] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def prefixes(self) -> Int64Array:
        """A hash of the path up to each of its tokens, the same wherever the same tokens lead (L)."""
        place = np.arange(1, len(self.keys) + 1, dtype=np.uint64)
        terms = mixed(mixed(self.keys.astype(np.uint64)) + place * GOLDEN)
        sums: Int64Array = np.cumsum(terms, dtype=np.uint64).view(np.int64)
        return sums

    @property
    def sort_key(self) -> bytes:
        """Bytes that order leaves by their tokens, first token first."""
        return self.keys.astype(">u8").tobytes()


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One row of L tokens with N supervised labels.

    Attributes:
        input_ids: token ids (L).
        depth: tokens from the root (L).
        position_ids: what the model's position embedding wants (A, L); A = 1 for text.
        subtree_end: index just past the last token below this token's segment (L).
        token_prefixes: a hash of all token ids from the root to each token, its own included (L).
        label_positions: positions whose logits predict a label (N); one may occur repeatedly.
        labels: token ids to predict (N).
        label_examples: index of each label's example within the step (N).
        label_branches: index of each label's branch within its example (N).
        pictures: pictures in the row, one entry for each place where one stands.
    """

    input_ids: Int64Array
    depth: Int64Array
    position_ids: Int64Array
    subtree_end: Int64Array
    token_prefixes: Int64Array
    label_positions: Int64Array
    labels: Int64Array
    label_examples: Int64Array
    label_branches: Int64Array
    pictures: Sequence["ShownPicture"] = ()

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class ShownPicture:
    """A picture at a place in a row.

    Attributes:
        file: the picture.
        positions: where in the row its features go, in order (M).
    """

    file: ImageFile
    positions: Int64Array


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of a tree that follow each other without a branch between them.

    Attributes:
        start: index of its first token in the row.
        end: index past its last token.
        above: start and end of the ranges of tokens that lie between the root and it, in order.
    """

    start: int
    end: int
    above: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Root:
    """One tree of a row.

    Attributes:
        start: index of its first token.
        end: index past its last one.
        branching: whether it is more than one chain of tokens.
        segments: its parts between branches, in order.
    """

    start: int
    end: int
    branching: bool
    segments: tuple[Segment, ...] = ()


def build_leaves(examples: Sequence[TokenizedExample]) -> list[Leaf]:
    """Return the branches of a step's examples as paths, in the step's order; those without a label are left out."""
    leaves = (
        _leaf(branch, example=position, branch_number=number)
        for position, example in enumerate(examples)
        for number, branch in enumerate(example.branches)
    )
    return [leaf for leaf in leaves if len(leaf.labels)]


def _leaf(branch: Branch, *, example: int, branch_number: int) -> Leaf:
    path = np.concatenate([branch.prompt_ids, branch.answer_ids]).astype(np.int64)
    # With an empty prompt nothing stands before the answer's first token: it is read, not predicted.
    first = max(len(branch.prompt_ids), 1)
    ids = path[:-1]
    return Leaf(ids, path[first:], example, branch_number, token_keys(ids, branch.images), branch.images)


def shared_length(first: Leaf, second: Leaf) -> int:
    """Return how many leading tokens two paths have in common."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(first.keys[:length] != second.keys[:length])
    return int(differing[0]) if len(differing) else length


@dataclass(slots=True)
class Tree:
    """Leaves that are laid out as one tree.

    Attributes:
        leaves: in depth-first order.
        shared: for each leaf, the leading tokens that it has in common with the leaf before.
    """

    leaves: list[Leaf]
    shared: list[int]

    @property
    def tokens(self) -> int:
        """Tokens that the tree lays out."""
        return sum(map(len, self.leaves)) - sum(self.shared)

    @property
    def is_chain(self) -> bool:
        """Whether each leaf extends the one before, so that nothing branches."""
        return all(s == len(before) for s, before in zip(self.shared[1:], self.leaves, strict=False))


def lay_out(trees: Sequence[Tree], *, axes: int = 1, picture_token: int | None = None) -> PackedRow:
    """Lay out trees one behind the other as one row.

    Args:
        trees: in order.
        axes: A, of positions.
        picture_token: id of the token that takes a feature of a picture, or None where none are shown.
    """
    total = sum(tree.tokens for tree in trees)
    input_ids, depth, subtree_end, prefixes = (np.zeros(total, dtype=np.int64) for _ in range(4))
    position_ids = np.zeros((axes, total), dtype=np.int64)
    pictures: list[ShownPicture] = []
    positions: list[Int64Array] = []
    leaves: list[Leaf] = []
    end = 0
    for tree in trees:
        path = np.zeros(0, dtype=np.int64)  # where the tokens of the newest leaf lie
        for leaf, shared in zip(tree.leaves, tree.shared, strict=True):
            subtree_end[path[shared:]] = end  # nothing more will come below these
            start, end = end, end + len(leaf) - shared
            input_ids[start:end] = leaf.ids[shared:]
            depth[start:end] = np.arange(shared, len(leaf))
            position_ids[:, start:end] = token_positions(len(leaf), leaf.images, axes=axes)[:, shared:]
            pictures += _shown(leaf, shared, start, picture_token)
            prefixes[start:end] = leaf.prefixes[shared:]
            path = np.concatenate([path[:shared], np.arange(start, end)])
            positions.append(path[len(leaf) - len(leaf.labels) :])
            leaves.append(leaf)
        subtree_end[path] = end
    counts = [len(leaf.labels) for leaf in leaves]
    return PackedRow(
        input_ids=input_ids,
        depth=depth,
        position_ids=position_ids,
        subtree_end=subtree_end,
        token_prefixes=prefixes,
        label_positions=np.concatenate(positions),
        labels=np.concatenate([leaf.labels for leaf in leaves]),
        label_examples=np.repeat(np.array([leaf.example for leaf in leaves], dtype=np.int64), counts),
        label_branches=np.repeat(np.array([leaf.branch for leaf in leaves], dtype=np.int64), counts),
        pictures=tuple(pictures),
    )


def _shown(leaf: Leaf, shared: int, start: int, token: int | None) -> list[ShownPicture]:
    """Return the pictures of a leaf that are not in what it shares, with their places in the row."""
    if token is None:
        return []
    return [
        ShownPicture(
            image.file, np.flatnonzero(leaf.ids[image.start : image.end] == token) + image.start - shared + start
        )
        for image in leaf.images
        if image.start >= shared
    ]


def find_roots(row: PackedRow) -> tuple[Root, ...]:
    """Return the trees of a row, from its depths and subtree ends alone."""
    starts = np.flatnonzero(row.depth == 0)
    ends = [*starts[1:].tolist(), len(row)]
    return tuple(
        Root(
            start,
            end,
            branching=bool((row.subtree_end[start:end] != end).any()),
            segments=_find_segments(row, start, end),
        )
        for start, end in zip(starts.tolist(), ends, strict=True)
    )


def _find_segments(row: PackedRow, start: int, end: int) -> tuple[Segment, ...]:
    depth, below = row.depth[start:end], row.subtree_end[start:end]
    borders = np.flatnonzero((np.diff(depth) != 1) | (np.diff(below) != 0)) + start + 1
    starts = [start, *borders.tolist()]
    found: list[Segment] = []
    path: list[Segment] = []  # from the root down to the newest segment
    for first, last in zip(starts, [*starts[1:], end], strict=True):
        while path and int(row.subtree_end[path[-1].start]) <= first:
            path.pop()
        above: list[tuple[int, int]] = []
        for segment in path:  # those that touch are one range
            if above and above[-1][1] == segment.start:
                above[-1] = (above[-1][0], segment.end)
            else:
                above.append((segment.start, segment.end))
        found.append(Segment(first, last, tuple(above)))
        path.append(found[-1])
    return tuple(found)


def take_apart(row: PackedRow) -> dict[tuple[int, int], Branch]:
    """Return the branches that a row was laid out from: the inverse of `lay_out`.

    Works from visibility alone, so it proves what the model is shown.

    Returns:
        For each (example, branch) its prompt and answer. A prompt that was empty comes back
        holding the answer's first token, which is all that such a prompt can mean.
    """
    found: dict[tuple[int, int], Branch] = {}
    owners = np.stack([row.label_examples, row.label_branches], axis=1)
    for example, branch in np.unique(owners, axis=0).tolist():
        mine = np.flatnonzero((owners == (example, branch)).all(axis=1))
        last = int(row.label_positions[mine[-1]])
        path = np.flatnonzero(row.subtree_end[: last + 1] > last)
        whole = np.append(row.input_ids[path], row.labels[mine[-1]]).astype(np.int32)
        border = len(whole) - len(mine)
        found[example, branch] = Branch(prompt_ids=whole[:border], answer_ids=whole[border:])
    return found
