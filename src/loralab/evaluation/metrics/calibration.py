"""How far confidence in closed labels can be trusted: expected calibration error and Brier score.

Owns how scores become probabilities: normalised over the labels that were scored.
"""

from collections.abc import Mapping

import numpy as np

from loralab.config.metric_facts import FACTS
from loralab.errors import DataError
from loralab.evaluation.answers import Answered, Evidence
from loralab.evaluation.metrics.classes import plain_label
from loralab.evaluation.metrics.metric import Metric
from loralab.evaluation.metrics.sums import add_rows, place_of, quotient
from loralab.evaluation.perplexity import FloatArray

BINS = 10


def label_probabilities(scores: Mapping[str, float]) -> FloatArray:
    """Return the probability of each label among the labels, in their order.

    Args:
        scores: log-probability of each label, nats; at least one finite.
    """
    values = np.array(list(scores.values()), dtype=np.float64)
    weights = np.exp(values - values.max())
    return np.asarray(weights / weights.sum())


def _one(answer: Answered) -> tuple[float, bool, float]:
    """Return confidence, whether the chosen label is right, and the Brier score of one answer."""
    scores = answer.label_scores or {}
    names = [plain_label(name) for name in scores]
    probabilities = label_probabilities(scores)
    chosen, true = int(probabilities.argmax()), names.index(plain_label(answer.question.reference))
    target = np.zeros(len(names))
    target[true] = 1
    return float(probabilities[chosen]), chosen == true, float(((probabilities - target) ** 2).sum())


def _rows(evidence: Evidence) -> FloatArray:
    cells = np.zeros((len(evidence.answers), 3 * BINS + 1))
    for index, answer in enumerate(evidence.answers):
        confidence, right, brier = _one(answer)
        # Bins are open below and closed above, as in the paper; a confidence is above 0.
        bin_index = min(max(int(np.ceil(confidence * BINS)) - 1, 0), BINS - 1)
        cells[index, [bin_index, BINS + bin_index, 2 * BINS + bin_index]] = 1, confidence, right
        cells[index, -1] = brier
    return add_rows(evidence, cells)


def _figures(totals: FloatArray) -> Mapping[str, FloatArray]:
    count = totals[..., :BINS].sum(axis=-1)
    gaps = np.abs(totals[..., 2 * BINS : 3 * BINS] - totals[..., BINS : 2 * BINS])
    return {
        "calibration_ece": quotient(gaps.sum(axis=-1), count),
        "calibration_brier": quotient(totals[..., -1], count),
    }


def _details(evidence: Evidence) -> Mapping[str, list[dict[str, float | int]]]:
    totals = _rows(evidence).sum(axis=0)
    counts, confidence, right = totals[:-1].reshape(3, BINS)
    return {
        "bins": [
            {
                "above": index / BINS,
                "up_to": (index + 1) / BINS,
                "answers": int(counts[index]),
                "confidence": float(confidence[index] / counts[index]),
                "accuracy": float(right[index] / counts[index]),
            }
            for index in range(BINS)
            if counts[index]
        ]
    }


def _check(evidence: Evidence) -> None:
    for answer in evidence.answers:
        scores = answer.label_scores or {}
        names = [plain_label(name) for name in scores]
        if len(set(names)) < len(names):
            raise DataError(
                f"metric calibration: of the labels {', '.join(scores)} two differ in case or outer blanks only",
                where="key evaluation.metrics",
                fix="name each label once",
            )
        if plain_label(answer.question.reference) not in names:
            raise DataError(
                f"metric calibration: the reference {answer.question.reference!r} is none of the labels "
                f"{', '.join(scores)}",
                where=place_of(answer.question),
                fix="name every label of the data where the closed labels are set",
            )
        best = max(scores.values())
        if not np.isfinite(best) or any(np.isnan(score) for score in scores.values()):
            raise DataError(
                f"metric calibration: the labels' scores are {list(scores.values())}, not finite",
                where=place_of(answer.question),
                fix="load the model in float32 or bfloat16 (model.precision)",
            )


CALIBRATION = Metric(
    summary=f"How far the confidence in labels can be trusted: expected calibration error ({BINS} bins of equal width "
    "over the chosen label's probability) and Brier score (squared error summed over the labels, mean over answers).",
    source="Guo et al. 2017, On Calibration of Modern Neural Networks, eq. 3 (ECE); Brier 1950 (score)",
    needs=FACTS["calibration"].needs,
    better=FACTS["calibration"].figures,
    statistics=_rows,
    figures=_figures,
    count=lambda totals: totals[..., :BINS].sum(axis=-1),
    per_answer=lambda evidence: np.array([-_one(answer)[2] for answer in evidence.answers], dtype=np.float64),
    details=_details,
    check=_check,
)
