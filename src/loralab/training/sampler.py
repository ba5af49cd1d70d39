"""Which rows make which optimizer step.

Owns the order of rows: a function of seed, epoch and ranks alone, so that a resumed run needs
nothing replayed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler


@dataclass
class StepSampler(Sampler[list[int]]):
    """Yields, for each optimizer step, this rank's row indices.

    Args:
        rows: number of training rows.
        rows_per_step: B x K x D.
        seed: of the order.
        rank: this process.
        world_size: number of processes (D).
    """

    rows: int
    rows_per_step: int
    seed: int
    rank: int = 0
    world_size: int = 1
    epoch: int = 0

    def __len__(self) -> int:
        return (self.rows + self.rows_per_step - 1) // self.rows_per_step

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.rows, generator=generator).tolist()
        for start in range(0, self.rows, self.rows_per_step):
            yield order[start : start + self.rows_per_step][self.rank :: self.world_size]
