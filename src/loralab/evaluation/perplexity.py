"""Loss and perplexity of a split, exactly: total nats over total supervised tokens.

Owns what `evaluation.json` says of losses, and the paired interval of their difference.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import nn

from loralab.data.example import TokenizedExample
from loralab.layout.collate import MicroBatch
from loralab.layout.planner import Planner
from loralab.models.token_loss import TokenLosses
from loralab.progress import Reporter
from loralab.training.distributed import ALONE, Processes
from loralab.training.loss import run_micro_batches

FloatArray = npt.NDArray[np.float64]
# Beyond this, a plain bootstrap takes gigabytes; the normal interval of the ratio is as good there.
_BOOTSTRAP_ROWS = 20_000


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


class Interrupted(Exception):
    """A measurement was asked to stop."""


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
    means = np.zeros(-(-len(examples) // batch_size))
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(means), processes.count):
            if should_stop():
                raise Interrupted
            number = first + processes.rank
            if number < len(means):
                rows = range(number * batch_size, min((number + 1) * batch_size, len(examples)))
                step = planner([examples[index] for index in rows])
                observe = functools.partial(sums.add, rows.start)
                with torch.no_grad():
                    result = run_micro_batches(model, step.micro_batches, device=device, observe=observe)
                means[number] = float(result.total) / max(result.count, 1)
                reporter.progress(label, min(len(examples), (first + processes.count) * batch_size), len(examples))
    finally:
        model.train(was_training)
    reporter.finish(label)
    # Each example was measured by one process and is zero in the others, so these sums are exact.
    totals, counts, entropy, correct = processes.sum(sums.values)
    return SplitLoss(totals, counts, processes.sum(means), entropy, correct)


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
    """Return the difference adapter - base with a paired interval over examples.

    Args:
        adapter: losses with the adapter.
        base: losses without, of the same examples.
        resamples: bootstrap resamples.
        level: confidence level.

    Returns:
        `eval_loss` (the difference in nats per token), `low`, `high`, `level`, `method`; the
        bounds are None where fewer than two examples leave nothing to resample.

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch. 13 (percentile interval).
    """
    nats, counts = adapter.totals - base.totals, adapter.counts
    result: dict[str, Any] = {"eval_loss": float(nats.sum() / counts.sum()), "level": level}
    if len(nats) < 2:
        return result | {"low": None, "high": None, "method": "none: one example"}
    if len(nats) > _BOOTSTRAP_ROWS:
        residual = nats - result["eval_loss"] * counts
        error = math.sqrt(len(nats) * residual.var(ddof=1)) / counts.sum()
        half = float(stats.norm.ppf((1 + level) / 2)) * error
        low, high = result["eval_loss"] - half, result["eval_loss"] + half
        return result | {"low": float(low), "high": float(high), "method": "normal interval of the ratio, by example"}
    interval = stats.bootstrap(
        (nats, counts),
        lambda n, c, axis=-1: n.sum(axis=axis) / c.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, 4_000_000 // len(nats)),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    method = f"paired percentile bootstrap over examples, {resamples} resamples"
    return result | {"low": float(interval.low), "high": float(interval.high), "method": method}
