"""Loss and perplexity of a split, exactly: total nats over total supervised tokens.

Owns what `evaluation.json` says of losses, and the paired interval of their difference.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from loralab.data.example import TokenizedExample
from loralab.evaluation.forwards import observe_batches
from loralab.evaluation.metrics import intervals
from loralab.evaluation.metrics.swap import swap_test
from loralab.evaluation.metrics.verdict import judge
from loralab.layout.collate import MicroBatch
from loralab.layout.planner import Planner
from loralab.models.token_loss import TokenLosses
from loralab.progress import Reporter
from loralab.training.distributed import ALONE, Processes

FloatArray = intervals.FloatArray


@dataclass(frozen=True, slots=True)
class SplitLoss:
    """Losses of a split, kept per example so that two of them can be compared in pairs.

    Attributes:
        totals: negative log-likelihood of each example, nats (examples).
        counts: supervised tokens of each example (examples).
        batch_means: mean loss of each batch, as older scripts average it (batches).
        entropies: entropy of the predicted distributions of each example, summed, nats (examples).
        correct: number of labels of each example that were the most likely token (examples).
    """

    totals: FloatArray
    counts: FloatArray
    batch_means: FloatArray
    entropies: FloatArray
    correct: FloatArray

    @property
    def loss(self) -> float:
        """Total nats / total supervised tokens."""
        return float(self.totals.sum() / max(self.counts.sum(), 1.0))

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return perplexity_of(self.loss)

    @property
    def token_accuracy(self) -> float:
        """Share of labels that were the most likely token, given all before them."""
        return float(self.correct.sum() / max(self.counts.sum(), 1.0))

    @property
    def token_entropy(self) -> float:
        """Mean entropy of the predicted distributions, nats per supervised token."""
        return float(self.entropies.sum() / max(self.counts.sum(), 1.0))

    def as_dict(self) -> dict[str, Any]:
        """Return the figures under the names of `evaluation.json`."""
        return {
            "eval_loss": self.loss,
            "perplexity": self.perplexity,
            "eval_loss_batch_mean": float(self.batch_means.mean()) if len(self.batch_means) else math.nan,
            "num_batches": len(self.batch_means),
            "num_examples": len(self.counts),
            "supervised_tokens": int(self.counts.sum()),
            "token_accuracy": self.token_accuracy,
            "token_entropy": self.token_entropy,
        }


def perplexity_of(loss: float) -> float:
    """Return exp(loss), infinite where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf


def measure_loss(
    model: nn.Module,
    examples: Sequence[TokenizedExample],
    *,
    planner: Planner,
    batch_size: int,
    device: torch.device,
    reporter: Reporter,
    label: str,
    should_stop: Callable[[], bool] = lambda: False,
    processes: Processes = ALONE,
) -> SplitLoss:
    """Measure the loss of every example, in the split's order.

    Several processes take the batches in turn, and all of them know all losses in the end.

    Args:
        model: a `SupervisedPeftModel`; put into evaluation mode meanwhile.
        examples: the split.
        planner: lays out each batch; the losses are the same however it does.
        batch_size: examples per batch.
        device: where the model is.
        reporter: told of progress under `label`.
        label: name of the stage.
        should_stop: asked before every batch, in every process; they must agree.
        processes: those that share the work.

    Raises:
        Interrupted: `should_stop` answered yes.
    """
    sums = _Sums(len(examples))
    starts = range(0, len(examples), batch_size)

    def rows_of(number: int) -> range:
        return range(starts[number], min(starts[number] + batch_size, len(examples)))

    observe_batches(
        model,
        [len(rows_of(number)) for number in range(len(starts))],
        lambda number: [examples[index] for index in rows_of(number)],
        lambda number, batch, result: sums.add(starts[number], batch, result),
        planner=planner,
        device=device,
        reporter=reporter,
        label=label,
        should_stop=should_stop,
        processes=processes,
    )
    # Each example was measured by one process and is zero in the others, so these sums are exact.
    totals, counts, entropy, correct = processes.sum(sums.values)
    means = [
        totals[start : start + batch_size].sum() / max(counts[start : start + batch_size].sum(), 1) for start in starts
    ]
    return SplitLoss(totals, counts, np.array(means), entropy, correct)


class _Sums:
    """Loss, count, entropy and correct labels of each example (4, examples)."""

    def __init__(self, examples: int) -> None:
        self.values = np.zeros((4, examples))

    def add(self, start: int, batch: MicroBatch, result: TokenLosses) -> None:
        """Add the labels of a micro-batch whose step begins with example `start`."""
        owners = batch.label_examples.numpy() + start
        for total, per_label in zip(
            self.values, (result.losses, torch.ones_like(result.losses), result.entropies, result.correct), strict=True
        ):
            if per_label is not None:
                np.add.at(total, owners, per_label.double().cpu().numpy())


def compare_losses(adapter: SplitLoss, base: SplitLoss, *, resamples: int, level: float = 0.95) -> dict[str, Any]:
    """Return the difference adapter - base with a paired interval over examples, and what may be said of it.

    What is drawn and swapped is an example, which is a row, all turns of it. Rows of plain text are windows, each an
    example of its own: where windows of one document are alike, there is less to go by than the interval says.

    Args:
        adapter: losses with the adapter.
        base: losses without, of the same examples.
        resamples: bootstrap resamples.
        level: confidence level.

    Returns:
        `eval_loss` (the difference in nats per token), `low`, `high`, `level`, `method`, `verdict`, `reason` (what
        the verdict rests on), `swap_p` and `swap_method` (see `metrics/swap.py`; absent where a loss is not finite).
        The bounds are None where fewer than two examples leave nothing to resample.

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch. 13 (percentile interval).
    """
    nats, counts = adapter.totals - base.totals, adapter.counts
    value = float(nats.sum() / max(counts.sum(), 1.0))
    (interval,) = intervals.ratio_intervals(nats[:, None], counts, resamples=resamples, level=level)
    swap = None
    if np.isfinite(nats).all():
        ours, theirs = (np.stack([side.totals, counts], axis=1) for side in (adapter, base))
        swap = swap_test(ours, theirs, _loss_of_sums, resamples=resamples)["eval_loss"]
    verdict = judge(value, interval, better="lower", rows=len(nats), level=level, swap=swap)
    return {
        "eval_loss": value,
        "level": level,
        "low": interval.low,
        "high": interval.high,
        "method": interval.method if interval.low is None else f"paired {interval.method}",
        **verdict.as_dict(),
        **({} if swap is None else swap.as_dict()),
    }


def _loss_of_sums(totals: FloatArray) -> dict[str, FloatArray]:
    return {"eval_loss": totals[..., 0] / np.maximum(totals[..., 1], 1.0)}
