"""From the examples of one optimizer step to its micro-batches.

Owns how a step is cut: which branches share a tree, which trees share a row, which rows a
micro-batch. Whatever it decides changes memory and time, never loss or gradients.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from loralab.data.example import TokenizedExample
from loralab.layout.collate import MicroBatch, PictureReader, StepBatch, collate_rows
from loralab.layout.tree import Leaf, PackedRow, Tree, build_leaves, lay_out, shared_length

Layout = Literal["shared", "packed", "padded"]


@dataclass(frozen=True, slots=True)
class SharingCost:
    """When computing a prefix once saves work.

    A tree of T tokens is attended to as a square of T x T; chains on their own cost half their
    squares. A shared prefix must save more than the larger square costs.

    Attributes:
        tokens_per_pair: cost of one query-key pair, in tokens through the linear layers.
        min_tokens: shorter prefixes are never shared; splitting a tree has a price of its own.
    """

    tokens_per_pair: float = 1 / 1024
    min_tokens: int = 16

    def saves(self, shared: int, tree: Tree, leaf: Leaf) -> bool:
        """Return whether adding `leaf` to `tree` is cheaper than a tree of its own."""
        if tree.is_chain and shared == len(tree.leaves[-1]):
            return True  # the chain grows longer, and stays one
        if shared < self.min_tokens:
            return False
        before = tree.tokens / 2**0.5 if tree.is_chain else tree.tokens
        pairs = (tree.tokens + len(leaf) - shared) ** 2 - before**2 - len(leaf) ** 2 / 2
        return shared > self.tokens_per_pair * pairs


@dataclass(frozen=True, slots=True)
class Planner:
    """Lays out a step under a token budget.

    Attributes:
        token_budget: most tokens, padding included, of a micro-batch; an example that is longer
            than that has one of its own.
        layout: shared (trees across examples), packed (trees of one example each) or padded
            (rows of plain chains, for models that cannot take trees).
        cost: when sharing saves work.
        position_threshold: paths up to this length and longer ones never meet in a micro-batch,
            for models whose positions depend on the longest path beside them; None for others.
        pictures: what reads pictures, or None for a model that sees none.
    """

    token_budget: int
    layout: Layout = "shared"
    cost: SharingCost = field(default_factory=SharingCost)
    position_threshold: int | None = None
    pictures: PictureReader | None = None

    def __call__(self, examples: Sequence[TokenizedExample]) -> StepBatch:
        """Lay out one step of this rank.

        Args:
            examples: in the step's order.
        """
        leaves = build_leaves(examples)
        sides = [leaves]
        if self.position_threshold is not None:
            long = [leaf for leaf in leaves if len(leaf) > self.position_threshold]
            sides = [[leaf for leaf in leaves if len(leaf) <= self.position_threshold], long]
        batches = [batch for side in sides if side for batch in self._cut(self._trees(side))]
        return StepBatch(
            micro_batches=tuple(batches),
            supervised_tokens=sum(len(leaf.labels) for leaf in leaves),
            examples=tuple(examples),
            token_budget=self.token_budget,
        )

    def with_budget(self, token_budget: int) -> "Planner":
        """Return the same planner with another budget."""
        return replace(self, token_budget=token_budget)

    def _trees(self, leaves: Sequence[Leaf]) -> list[Tree]:
        if self.layout == "shared":
            return self._grow(sorted(leaves, key=lambda leaf: leaf.sort_key), self.cost.saves)
        examples: dict[int, list[Leaf]] = {}
        for leaf in leaves:
            examples.setdefault(leaf.example, []).append(leaf)
        joins = self.cost.saves if self.layout == "packed" else _extends_chain
        grown = (self._grow(sorted(own, key=lambda leaf: leaf.sort_key), joins) for own in examples.values())
        return [tree for trees in grown for tree in trees]

    def _grow(self, leaves: Iterable[Leaf], joins: Callable[[int, Tree, Leaf], bool]) -> list[Tree]:
        """Join each leaf to the tree before it where that fits and pays.

        Leaves come in the order of their ids, so each has its longest common prefix with the
        one before or behind it.
        """
        trees: list[Tree] = []
        size = 0
        for leaf in leaves:
            shared = shared_length(trees[-1].leaves[-1], leaf) if trees else 0
            fits = size + len(leaf) - shared <= self.token_budget
            if trees and fits and joins(shared, trees[-1], leaf):
                trees[-1].leaves.append(leaf)
                trees[-1].shared.append(shared)
                size += len(leaf) - shared
            else:
                trees.append(Tree([leaf], [0]))
                size = len(leaf)
        return trees

    def _cut(self, trees: Sequence[Tree]) -> list[MicroBatch]:
        if self.layout == "padded":
            return [collate_rows(rows, trees=False, reader=self.pictures) for rows in self._padded_groups(trees)]
        bins: list[list[Tree]] = []
        room: list[int] = []
        for tree in sorted(trees, key=lambda tree: -tree.tokens):  # stable: equal sizes keep the step's order
            chosen = next((index for index, free in enumerate(room) if tree.tokens <= free), None)
            if chosen is None:
                bins.append([tree])
                room.append(self.token_budget - tree.tokens)
            else:
                bins[chosen].append(tree)
                room[chosen] -= tree.tokens
        return [collate_rows([self._lay_out(packed)], trees=True, reader=self.pictures) for packed in bins]

    def _lay_out(self, trees: Sequence[Tree]) -> PackedRow:
        if self.pictures is None:
            return lay_out(trees)
        return lay_out(trees, axes=self.pictures.axes, picture_token=self.pictures.token)

    def _padded_groups(self, trees: Sequence[Tree]) -> list[list[PackedRow]]:
        groups: list[list[PackedRow]] = []
        for row in sorted((self._lay_out([tree]) for tree in trees), key=len, reverse=True):
            # The first row of a group is its longest: all are padded to it.
            if groups and len(groups[-1][0]) * (len(groups[-1]) + 1) <= self.token_budget:
                groups[-1].append(row)
            else:
                groups.append([row])
        return groups


class ShrinkingPlanner:
    """A planner whose budget is halved when memory runs out, for all steps that follow.

    Args:
        planner: what it begins as.
    """

    def __init__(self, planner: Planner) -> None:
        self.planner = planner

    def __call__(self, examples: Sequence[TokenizedExample]) -> StepBatch:
        """Lay out one step under the budget of now."""
        return self.planner(examples)

    def shrink(self, tried: int) -> int:
        """Halve the budget, or what a step used of it where that was less, and return it.

        Args:
            tried: tokens of the largest micro-batch that did not fit, padding included.
        """
        self.planner = self.planner.with_budget(min(self.planner.token_budget, tried) // 2)
        return self.planner.token_budget


def _extends_chain(shared: int, tree: Tree, _leaf: Leaf) -> bool:
    return shared == len(tree.leaves[-1])
