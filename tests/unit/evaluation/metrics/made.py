"""Evidence made of texts, for tests of metrics."""

from collections.abc import Mapping, Sequence

import numpy as np

from loralab.config.metric_facts import Way
from loralab.evaluation.answers import Answered, Evidence, Question
from loralab.evaluation.metrics.metric import Metric
from loralab.evaluation.perplexity import SplitLoss


def evidence_of(
    answers: Sequence[str],
    references: Sequence[str],
    *,
    units: Sequence[int] | None = None,
    way: Way = "generate",
    ids: Sequence[int] | None = None,
    stopped: Sequence[bool] | None = None,
    scores: Sequence[Mapping[str, float]] | None = None,
) -> Evidence:
    """Return evidence of answers, one row each unless `units` says otherwise; `ids` are numbers of tokens."""
    rows = list(range(len(answers))) if units is None else list(units)
    answered = [
        Answered(
            question=Question(
                unit=unit, row=unit + 1, source=0, prompt_ids=(1,), reference_ids=(2,), prompt="p", reference=reference
            ),
            text=answer,
            ids=() if ids is None else tuple(range(ids[place])),
            stopped=None if stopped is None else stopped[place],
            label_scores=None if scores is None else scores[place],
        )
        for place, (unit, answer, reference) in enumerate(zip(rows, answers, references, strict=True))
    ]
    return Evidence(units=max(rows, default=-1) + 1, way=way, answers=answered)


def evidence_of_losses(
    totals: Sequence[float],
    counts: Sequence[float],
    *,
    lengths: tuple[Sequence[float], Sequence[float]] | None = None,
    correct: Sequence[float] | None = None,
    entropies: Sequence[float] | None = None,
) -> Evidence:
    """Return evidence of losses, nats and tokens of each row; `lengths` are bytes and words."""
    zeros = [0.0] * len(totals)
    arrays = [np.array(each, dtype=np.float64) for each in (totals, counts, entropies or zeros, correct or zeros)]
    losses = SplitLoss(arrays[0], arrays[1], np.zeros(1), arrays[2], arrays[3])
    sizes = [None if lengths is None else np.array(each, dtype=np.float64) for each in (lengths or ((), ()))]
    return Evidence(units=len(totals), losses=losses, answer_bytes=sizes[0], answer_words=sizes[1])


def figures_of(metric: Metric, evidence: Evidence) -> dict[str, float]:
    """Return a metric's figures, nan among them."""
    totals = metric.statistics(evidence).sum(axis=0)
    return {name: float(value) for name, value in metric.figures(totals).items()}
