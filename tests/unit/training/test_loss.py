"""Loss sums: totals and counts over micro-batches, and where backward runs."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from loralab.layout.collate import MicroBatch
from loralab.layout.planner import Planner
from loralab.training.loss import run_micro_batches
from unit.layout.examples import example

CPU = torch.device("cpu")
EXAMPLES = [example(([1], [2, 3])), example(([4, 5], [6])), example(([7], [8, 9, 10]))]


class LabelLoss(nn.Module):
    """A stand-in whose token loss is weight x label."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, *, labels: Tensor, position_ids: Tensor, input_ids: Tensor, **_: Tensor) -> Tensor:
        assert position_ids.shape == input_ids.shape
        return self.weight * labels.float()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sums_do_not_depend_on_the_cut(size: int) -> None:
    model = LabelLoss()
    seen: list[float] = []

    def observe(batch: MicroBatch, losses: Tensor) -> None:
        assert not losses.requires_grad
        assert len(losses) == len(batch.labels)
        seen.extend(losses.tolist())

    result = run_micro_batches(
        model, Planner(size)(EXAMPLES).micro_batches, device=CPU, backward=Tensor.backward, observe=observe
    )
    assert seen == [1.0, 1.5, 3.0, 4.0, 4.5, 5.0]
    assert (float(result.total), result.count) == (19.0, 6)
    assert not result.total.requires_grad
    assert model.weight.grad is not None
    assert float(model.weight.grad) == 38.0


def test_only_the_last_micro_batch_synchronises() -> None:
    events: list[str] = []

    @contextlib.contextmanager
    def context(last: bool) -> Iterator[None]:
        events.append(f"enter {last}")
        yield
        events.append("exit")

    batches = Planner(2)(EXAMPLES).micro_batches
    run_micro_batches(LabelLoss(), batches, device=CPU, context=context, backward=lambda _: events.append("backward"))
    assert events == ["enter False", "backward", "exit", "enter True", "backward", "exit"]


def test_no_micro_batches_is_nothing() -> None:
    result = run_micro_batches(LabelLoss(), [], device=CPU)
    assert (float(result.total), result.count) == (0.0, 0)
