"""Loss and perplexity of a split, exactly: total nats over total supervised tokens.

Owns what `evaluation.json` says of losses, and the paired interval of their difference.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import Tensor, nn

from loralab.data.example import TokenizedExample
from loralab.layout.collate import MicroBatch
from loralab.layout.planner import Planner
from loralab.progress import Reporter
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
    """

    totals: FloatArray
    counts: FloatArray
    batch_means: FloatArray

    @property
    def loss(self) -> float:
        """Total nats / total supervised tokens."""
        return float(self.totals.sum() / max(self.counts.sum(), 1.0))

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return perplexity_of(self.loss)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures under the names of `evaluation.json`."""
        return {
            "eval_loss": self.loss,
            "perplexity": self.perplexity,
            "eval_loss_batch_mean": float(self.batch_means.mean()) if len(self.batch_means) else math.nan,
            "num_batches": len(self.batch_means),
            "num_examples": len(self.counts),
            "supervised_tokens": int(self.counts.sum()),
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
    batch_size: int,
    device: torch.device,
    reporter: Reporter,
    label: str,
    should_stop: Callable[[], bool] = lambda: False,
) -> SplitLoss:
    """Measure the loss of every example, in the split's order.

    Args:
        model: a `SupervisedPeftModel`; put into evaluation mode meanwhile.
        examples: the split.
        batch_size: examples per batch.
        device: where the model is.
        reporter: told of progress under `label`.
        label: name of the stage.
        should_stop: asked before every batch.

    Raises:
        Interrupted: `should_stop` answered yes.
    """
    planner = Planner(batch_size)
    totals, counts, means = np.zeros(len(examples)), np.zeros(len(examples)), []
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(examples), batch_size):
            if should_stop():
                raise Interrupted
            step = planner([examples[i] for i in range(start, min(start + batch_size, len(examples)))])

            def observe(batch: MicroBatch, losses: Tensor, start: int = start) -> None:
                owners = batch.label_examples.numpy() + start
                np.add.at(totals, owners, losses.double().cpu().numpy())
                np.add.at(counts, owners, 1.0)

            result = run_micro_batches(model, step.micro_batches, device=device, observe=observe)
            means.append(float(result.total) / max(result.count, 1))
            reporter.progress(label, start + len(step.rows), len(examples))
    model.train(was_training)
    reporter.finish(label)
    return SplitLoss(totals, counts, np.asarray(means))


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
