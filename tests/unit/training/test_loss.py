"""Loss sums: totals and counts over micro-batches, and where backward runs."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loralab.layout.collate import MicroBatch
from loralab.layout.planner import Layout, Planner
from loralab.models.token_loss import TokenLosses
from loralab.training.loss import run_micro_batches
from unit.layout.examples import example

CPU = torch.device("cpu")
EXAMPLES = [example(([1], [2, 3])), example(([4, 5], [6])), example(([7], [8, 9, 10]))]


class LabelLoss(nn.Module):
    """A stand-in whose token loss is weight x label; it notes what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.asked: list[tuple[Any, bool]] = []

    def forward(
        self, *, labels: Tensor, dropout_key: tuple[int, int] | None, statistics: bool, **inputs: Any
    ) -> TokenLosses:
        assert inputs["position_ids"].shape == (1, *inputs["input_ids"].shape)
        self.asked.append((dropout_key, statistics))
        losses = self.weight * labels.float()
        return TokenLosses(losses.detach(), losses.detach(), labels > 5) if statistics else TokenLosses(losses)


@pytest.mark.parametrize("budget", [2, 4, 100])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_sums_do_not_depend_on_the_cut(budget: int, layout: Layout) -> None:
    model = LabelLoss()
    batches = Planner(budget, layout=layout)(EXAMPLES).micro_batches
    result = run_micro_batches(model, batches, device=CPU, backward=Tensor.backward, dropout_key=(7, 3))
    assert (float(result.total), result.count) == (19.0, 6)
    assert not result.total.requires_grad
    assert model.weight.grad is not None
    assert float(model.weight.grad) == 38.0
    assert model.asked == [((7, 3), False)] * len(batches)


def test_an_observer_sees_every_label_with_its_statistics() -> None:
    model = LabelLoss()
    seen: list[tuple[int, float, float, bool]] = []

    def observe(batch: MicroBatch, result: TokenLosses) -> None:
        assert result.entropies is not None
        assert result.correct is not None
        columns = (batch.label_examples, result.losses, result.entropies, result.correct)
        seen.extend(zip(*(column.tolist() for column in columns), strict=True))

    batches = Planner(3, layout="packed")(EXAMPLES).micro_batches
    result = run_micro_batches(model, batches, device=CPU, observe=observe)
    halves = [(0, 2), (0, 3), (1, 6), (2, 8), (2, 9), (2, 10)]
    assert sorted(seen) == [(owner, label / 2, label / 2, label > 5) for owner, label in halves]
    assert (float(result.total), result.count) == (19.0, 6)
    assert model.asked == [(None, True)] * len(batches)


def test_only_the_last_micro_batch_synchronises() -> None:
    events: list[str] = []

    @contextlib.contextmanager
    def context(last: bool) -> Iterator[None]:
        events.append(f"enter {last}")
        yield
        events.append("exit")

    batches = Planner(3, layout="packed")(EXAMPLES).micro_batches
    assert len(batches) == 3
    run_micro_batches(LabelLoss(), batches, device=CPU, context=context, backward=lambda _: events.append("backward"))
    assert events == [*["enter False", "backward", "exit"] * 2, "enter True", "backward", "exit"]


def test_no_micro_batches_is_nothing() -> None:
    result = run_micro_batches(LabelLoss(), [], device=CPU)
    assert (float(result.total), result.count) == (0.0, 0)
