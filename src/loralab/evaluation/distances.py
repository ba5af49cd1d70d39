"""How far base and adapter are apart in what they predict, position by position.

Owns the distances between two sets of logits and the loop that takes both sides' logits at the same
positions, chunk by chunk. Knows nothing of what is compared.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loralab.data.example import Branch, TokenizedExample
from loralab.errors import ModelError
from loralab.evaluation.forwards import Interrupted
from loralab.evaluation.metrics.intervals import ratio_intervals
from loralab.evaluation.perplexity import FloatArray
from loralab.layout.collate import MicroBatch
from loralab.layout.planner import Planner
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.token_loss import chunk_elements
from loralab.progress import Reporter
from loralab.training.loss import model_inputs

# Distances by name, in the order of the rows that `measure_distances` returns.
DISTANCES = {
    "kl_base_adapter": "KL(base || adapter), nats: what the base expects, priced by the adapter",
    "kl_adapter_base": "KL(adapter || base), nats",
    "jensen_shannon": "Jensen-Shannon divergence, nats, at most ln 2",
    "l2_logits": "L2 distance of the logits",
    "l2_logits_centred": "L2 distance of the logits after taking the mean difference off, so that no constant counts",
    "l2_probabilities": "L2 distance of the probabilities, at most the square root of 2",
    "top1_agreement": "share of positions where both have the same most likely token",
}
# float64 and some ten temporaries, which are quickest in a cache: a chunk of distances is so much smaller than one of
# logits.
_SMALLER = 32


@dataclass(frozen=True, slots=True)
class BranchDistances:
    """Both sides at the positions that predict an answer's tokens.

    Attributes:
        distances: in the order of `DISTANCES` (7, N); the first position is the last token of the prompt.
        base_losses: negative log-likelihood of each token without the adapter, nats (N).
        adapter_losses: the same with it (N).
    """

    distances: FloatArray
    base_losses: FloatArray
    adapter_losses: FloatArray


def measure_distances(base: Tensor, adapter: Tensor) -> Tensor:
    """Return every distance of `DISTANCES` between two sets of logits, float64 (7, N).

    All is computed in float64 from log-softmax, so that no type's extremes overflow. A token that one side rules
    out (logit -inf) adds nothing where its own probability is the factor, and two equal logits differ by 0 even
    where both are -inf; a divergence is infinite where one side rules out what the other expects. KL is the sum of
    p (log p - log q) - p + q, none of whose terms is negative.

    The L2 distance of logits is not a distance of predictions: a constant added to all logits of one side changes it
    and no probability. `l2_logits_centred` takes that constant off.

    Args:
        base: logits of the base model (N, V).
        adapter: logits with the adapter (N, V).

    Raises:
        ModelError: a logit is no number.

    Source: Kullback & Leibler 1951, On Information and Sufficiency; Lin 1991, Divergence Measures Based on the
    Shannon Entropy (Jensen-Shannon, eq. 3.4).
    """
    first, second = _exact(base), _exact(adapter)
    log_p, log_q = _log_probabilities(first, "base model"), _log_probabilities(second, "base with adapter")
    p, q = log_p.exp(), log_q.exp()
    # Where both agree their middle is the same to the last bit, so that equal sides are at no distance at all.
    log_middle = torch.where(log_p == log_q, log_p, torch.logaddexp(log_p, log_q) - math.log(2))
    middle = (p + q) / 2
    first_to_middle = _divergence(_difference(log_p, log_middle), p, middle)
    second_to_middle = _divergence(_difference(log_q, log_middle), q, middle)
    jensen_shannon = (first_to_middle + second_to_middle) / 2
    ratio = _difference(log_p, log_q)
    apart = _difference(first, second)
    l2 = apart.norm(dim=-1)
    centred = (apart - apart.mean(dim=-1, keepdim=True)).norm(dim=-1)
    return torch.stack(
        [
            _divergence(ratio, p, q),
            _divergence(-ratio, q, p),
            jensen_shannon.clamp(max=math.log(2)),
            l2,
            torch.where(l2.isinf(), l2, centred),
            (p - q).norm(dim=-1),
            (first.argmax(dim=-1) == second.argmax(dim=-1)).double(),
        ]
    )


def _exact(logits: Tensor) -> Tensor:
    # A head in half precision overflows to infinity, of which a softmax is nan: it counts as the largest of its
    # type, as in evaluations (`token_loss.safe_log_softmax`).
    logits = logits.clamp(max=torch.finfo(logits.dtype).max)
    # Apple's GPUs have no float64.
    return logits.to("cpu" if logits.device.type == "mps" else logits.device).double()


def _log_probabilities(logits: Tensor, who: str) -> Tensor:
    found = logits.log_softmax(dim=-1)
    if found.isnan().any():
        raise ModelError(
            f"logits that are no numbers at {int(found.isnan().any(dim=-1).sum())} of {len(found)} positions",
            where=who,
            fix="compute with a wider type: model.precision=float32",
        )
    return found


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """Return a - b, and 0 where both are the same infinity."""
    return torch.where(a == b, 0.0, a - b)


def _divergence(ratio: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) from log p - log q and both."""
    terms = torch.where(p > 0, p * ratio, 0.0) - p + q
    return terms.sum(dim=-1).clamp(min=0.0)


def measure_branches(
    model: SupervisedPeftModel,
    branches: Sequence[Branch],
    *,
    planner: Planner,
    batch_size: int,
    device: torch.device,
    reporter: Reporter,
    label: str,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[BranchDistances]:
    """Measure base and adapter at all positions that predict the answers of branches.

    Both read the same tokens: the prompt, then the reference answer up to each position. Logits are formed at these
    positions alone, and those of few positions at a time.

    Args:
        model: base with adapter; put into evaluation mode meanwhile.
        branches: prompts with their answers, each with a label.
        planner: lays out each batch; the distances are the same however it does.
        batch_size: branches per batch.
        device: where the model is.
        reporter: told of progress under `label`.
        label: name of the stage.
        should_stop: asked before every batch.

    Returns:
        One for each branch, in order.

    Raises:
        Interrupted: `should_stop` answered yes.
        ModelError: a logit is no number.
    """
    found: list[BranchDistances] = []
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(branches), batch_size):
            if should_stop():
                raise Interrupted
            own = branches[start : start + batch_size]
            # Each branch is an example of its own, so that its labels can be told from another's.
            step = planner([TokenizedExample(number, 0, (branch,)) for number, branch in enumerate(own)])
            values: dict[int, FloatArray] = {}
            for batch in step.micro_batches:
                values |= _measure_batch(model, batch, device)
            found += [BranchDistances(each[2:], each[0], each[1]) for _, each in sorted(values.items())]
            reporter.progress(label, len(found), len(branches))
    finally:
        model.train(was_training)
    reporter.finish(label)
    return found


@torch.no_grad()
def _measure_batch(model: SupervisedPeftModel, batch: MicroBatch, device: torch.device) -> dict[int, FloatArray]:
    """Return losses of base and adapter and all distances (9, N) of each example of a micro-batch."""
    inputs: dict[str, Any] = model_inputs(batch.to(device))
    labels = inputs.pop("labels")
    del inputs["token_prefixes"]
    with_adapter = model.label_logits(**inputs)
    with model.disable_adapter():
        without = model.label_logits(**inputs)
    parts: list[Tensor] = []
    rows = max(1, chunk_elements(device.type) // model.vocabulary)
    for start in range(0, len(labels), rows):
        chunk = slice(start, start + rows)
        adapter = with_adapter(chunk)
        with model.disable_adapter():  # the head may be adapted too
            base = without(chunk)
        parts += _measure_chunk(base, adapter, labels[chunk])
    values = torch.cat(parts, dim=1).numpy()
    owners = batch.label_examples.numpy()
    return {int(owner): values[:, owners == owner] for owner in np.unique(owners)}


def _measure_chunk(base: Tensor, adapter: Tensor, labels: Tensor) -> list[Tensor]:
    small = max(1, chunk_elements(base.device.type) // base.shape[1] // _SMALLER)
    parts = zip(base.split(small), adapter.split(small), labels.split(small), strict=True)
    return [
        torch.cat([_losses(b, targets)[None], _losses(a, targets)[None], measure_distances(b, a).cpu()])
        for b, a, targets in parts
    ]


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(_exact(logits), labels, reduction="none").cpu()


def mean_intervals(
    sums: FloatArray, counts: FloatArray, *, resamples: int, level: float = 0.95, seed: int = 0
) -> list[dict[str, float | None]]:
    """Return the mean of each figure with its interval over rows.

    Args:
        sums: what each row adds to each figure (rows, figures).
        counts: how many observations each row adds (rows).
        resamples: bootstrap resamples.
        level: confidence level.
        seed: of the resampling.

    Returns:
        `mean`, `low` and `high` of each figure; the bounds are None where fewer than two rows leave nothing to
        resample, or where a row is infinite.

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch. 13 (percentile interval).
    """
    means = (sums.sum(axis=0) / counts.sum()).tolist()
    intervals = ratio_intervals(sums, counts, resamples=resamples, level=level, seed=seed)
    return [{"mean": mean, "low": each.low, "high": each.high} for mean, each in zip(means, intervals, strict=True)]
