"""Questions by hand, and two processes as two threads that wait for each other."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

from loralab.evaluation.answers import Question
from loralab.training.distributed import FloatArray, Processes

Value = TypeVar("Value")


def question(
    prompt: Sequence[int], reference: Sequence[int] = (1,), *, unit: int = 0, text: str = "", reference_text: str = ""
) -> Question:
    return Question(unit, unit + 1, 0, tuple(prompt), tuple(reference), text, reference_text)


def count_forwards(model: Any) -> list[int]:
    """Return a list that grows by the tokens of each forward, padding included."""
    read: list[int] = []
    model.embedding.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    return read


class _Meeting:
    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)
        self.values: dict[int, Any] = {}


@dataclass(frozen=True)
class _Thread:
    """What evaluation asks of `Processes`, between threads."""

    rank: int
    meeting: _Meeting
    count: int = 2
    lockstep: bool = False

    def gather(self, value: Value) -> list[Value]:
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait()
        found = [self.meeting.values[rank] for rank in range(2)]
        self.meeting.barrier.wait()
        return found

    def sum(self, values: FloatArray) -> FloatArray:
        first, second = self.gather(values)
        total: FloatArray = first + second
        return total


def in_two_processes(work: Callable[[Processes], Value]) -> list[Value]:
    """Return what `work` gives in each of two processes, by rank.

    They share torch's generator, so `work` draws nothing that counts: models are built before.
    """
    meeting = _Meeting()
    with torch.random.fork_rng(devices=[]), ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda rank: work(cast(Processes, _Thread(rank, meeting))), range(2)))
