"""The loader of a run's steps, and the processes in which their pictures are decoded.

Owns how many processes there are, and how an error in one of them reaches the run as the error that it is.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from loralab.data.example import TokenizedExample
from loralab.errors import LoralabError, WorkerError, excerpt
from loralab.layout.collate import StepBatch
from loralab.layout.planner import ShrinkingPlanner
from loralab.models.precision import Resolved
from loralab.training.sampler import StepSampler

_MOST_PROCESSES = 4


def resolve_decoders(setting: int | Literal["auto"], *, decodes: bool, device: torch.device) -> Resolved[int]:
    """Choose in how many processes pictures are decoded while the model computes; 0 decodes between the steps.

    Args:
        setting: `data.num_workers`.
        decodes: whether steps hold pixels: rows have pictures, and their features are not kept.
        device: where the model computes.
    """
    if not decodes:
        return Resolved(0, "no picture is decoded in a step")
    if setting != "auto":
        return Resolved(setting, "set in data.num_workers")
    if device.type == "cpu":
        return Resolved(0, "the processors that would decode compute the step")
    # Not all: one hands the work to the device.
    return Resolved(max(1, min(_MOST_PROCESSES, (os.cpu_count() or 2) - 1)), "pictures are decoded beside the device")


def build_loader(rows: Any, sampler: StepSampler, planner: ShrinkingPlanner, *, decoders: int) -> DataLoader[Any]:
    """Return the loader whose every item is a `StepBatch`, or the error that came of making it.

    Args:
        rows: the training split.
        sampler: which rows make which step.
        planner: lays out a step.
        decoders: processes.
    """
    kept: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": 2} if decoders else {}
    return DataLoader(rows, batch_sampler=sampler, collate_fn=_Collate(planner), num_workers=decoders, **kept)


def next_step(steps: Iterator[StepBatch | LoralabError]) -> StepBatch | LoralabError:
    """Return the next item of a loader.

    Raises:
        WorkerError: a process that decodes pictures died, or has no room to hand them over.
        StopIteration: there is none.
    """
    try:
        return next(steps)
    except (RuntimeError, OSError) as error:  # what torch makes of a process that is gone
        if "worker" not in str(error) and "shm" not in str(error) and not isinstance(error, OSError):
            raise
        raise WorkerError(
            f"a process that decodes pictures failed: {excerpt(error)}",
            where="the loader of steps",
            fix="set data.num_workers: 0, lower data.image.max_pixels, or give more shared memory (docker --shm-size)",
        ) from error


class _Collate:
    """Lays out a step; an error comes back as a value, since a loader's process would lose what it says."""

    def __init__(self, planner: ShrinkingPlanner) -> None:
        self._planner = planner

    def __call__(self, examples: Sequence[TokenizedExample]) -> StepBatch | LoralabError:
        try:
            return self._planner(examples)
        except LoralabError as error:
            return error
