"""Which rows make which optimizer step.

Owns the order of rows: a function of seed, epoch and ranks alone, so that a resumed run needs
nothing replayed.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Sampler

Share: TypeAlias = tuple[npt.NDArray[np.int64], float]

# How many groups ahead are looked through for one that fits into what is left of a step.
_LOOK_AHEAD = 64


@dataclass
class StepSampler(Sampler[list[int]]):
    """Yields, for each optimizer step, this rank's row indices.

    Args:
        rows: number of training rows.
        rows_per_step: B x K x D.
        seed: of the order.
        groups: rows that should meet in a step, or None for a random order of rows.
        shares: rows of each source and passes over them in one epoch, or None for one pass over all.
            Of 0.5 passes, an epoch takes the half that the one before left.
        rank: this process.
        world_size: number of processes (D).
    """

    rows: int
    rows_per_step: int
    seed: int
    groups: Sequence[Sequence[int]] | None = None
    shares: Sequence[Share] | None = None
    rank: int = 0
    world_size: int = 1
    epoch: int = 0

    def __len__(self) -> int:
        return (self.rows_per_epoch + self.rows_per_step - 1) // self.rows_per_step

    @property
    def rows_per_epoch(self) -> int:
        """Number of rows that one epoch takes, a row counted as often as it is taken."""
        if self.shares is None:
            return self.rows
        return sum(_taken(weight, len(rows)) for rows, weight in self.shares)

    def _passes(self) -> list[list[int]]:
        """Return the rows of an epoch as passes in which each occurs at most once."""
        if self.shares is None:
            return [list(range(self.rows))]
        passes: dict[int, list[int]] = {}
        for members, weight in self.shares:
            rows = members.tolist()
            whole, rest = divmod(_taken(weight, len(rows)), max(len(rows), 1))
            for number in range(whole):
                passes.setdefault(number, []).extend(rows)
            if rest:  # in turn and not drawn anew, so that epochs leave no row out while others come again
                circle = _shuffled(rows, torch.Generator().manual_seed(self.seed)) * 2
                start = self.epoch * rest % len(rows)
                passes.setdefault(whole, []).extend(sorted(circle[start : start + rest]))
        return [passes[number] for number in sorted(passes)]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps():
            # Neighbours stay on one rank: they may share a prefix.
            start, end = (len(step) * place // self.world_size for place in (self.rank, self.rank + 1))
            yield step[start:end]

    def steps(self) -> list[list[int]]:
        """Return the rows of every step of the epoch, over all ranks."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        passes = self._passes()
        if self.groups is None:
            order = _shuffled([row for each in passes for row in each], generator)
        else:
            order = self._grouped_order(passes, generator)
        cut = [order[start : start + self.rows_per_step] for start in range(0, len(order), self.rows_per_step)]
        if self.groups is None:
            return cut
        # Filling steps takes small groups as they fit, large ones when they must: no epoch shall go by size.
        full, rest = divmod(len(order), self.rows_per_step)
        return [*_shuffled(cut[:full], generator), *(cut[full:] if rest else [])]

    def _grouped_order(self, passes: Sequence[Sequence[int]], generator: torch.Generator) -> list[int]:
        """Return the rows of all passes so that groups are cut by the end of a step as seldom as may be."""
        size = self.rows_per_step
        taken = [set(each) for each in passes]
        groups = [[row for row in group if row in rows] for rows in taken for group in self.groups or ()]
        shuffled = [_shuffled(group, generator) for group in groups if group]
        pieces = [group[start : start + size] for group in shuffled for start in range(0, len(group), size)]
        waiting = deque(_shuffled(pieces, generator))
        order: list[int] = []
        while waiting:
            room = self.rows_per_step - len(order) % self.rows_per_step
            ahead = range(min(_LOOK_AHEAD, len(waiting)))
            chosen = next((place for place in ahead if len(waiting[place]) <= room), None)
            if chosen is None:
                order += waiting[0][:room]
                waiting[0] = waiting[0][room:]
                continue
            order += waiting[chosen]
            del waiting[chosen]
        return order


def _taken(weight: float, count: int) -> int:
    """Return how many rows an epoch takes of a source with `count` of them; at least one, where there is one."""
    return max(round(weight * count), min(count, 1))


def _shuffled(items: Sequence, generator: torch.Generator) -> list:  # type: ignore[type-arg]
    return [items[place] for place in torch.randperm(len(items), generator=generator).tolist()]
