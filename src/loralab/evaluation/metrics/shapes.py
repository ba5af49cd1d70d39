"""Metrics of the form of generated answers: whether they stop, how long they are, whether they repeat themselves.

Owns nothing that needs a reference.
"""

import numpy as np

from loralab.config.metric_facts import FACTS
from loralab.evaluation.answers import Evidence
from loralab.evaluation.metrics.metric import Metric
from loralab.evaluation.metrics.sums import add_rows, quotient
from loralab.evaluation.perplexity import FloatArray

REPEATED_WORDS = 4


def repeated_share(text: str) -> float:
    """Return the share of a text's word 4-grams that occurred before in it, nan for a text of fewer words.

    Args:
        text: blank-separated words.

    Source: Welleck et al. 2020, Neural Text Generation with Unlikelihood Training, section 6 (seq-rep-4).
    """
    words = text.split()
    runs = [tuple(words[start : start + REPEATED_WORDS]) for start in range(len(words) - REPEATED_WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else np.nan


def _stop_rows(evidence: Evidence) -> FloatArray:
    return add_rows(evidence, [(float(bool(answer.stopped)), 1.0) for answer in evidence.answers])


def _length_rows(evidence: Evidence) -> FloatArray:
    return add_rows(evidence, [(len(answer.ids), len(answer.text), 1) for answer in evidence.answers])


def _repeated_shares(evidence: Evidence) -> FloatArray:
    return np.array([repeated_share(answer.text) for answer in evidence.answers], dtype=np.float64)


def _repetition_rows(evidence: Evidence) -> FloatArray:
    shares = _repeated_shares(evidence)
    return add_rows(evidence, np.stack([np.nan_to_num(shares), np.isfinite(shares)], axis=1))


def _paired_repetition_rows(first: Evidence, second: Evidence) -> tuple[FloatArray, FloatArray]:
    shares = [_repeated_shares(evidence) for evidence in (first, second)]
    both = np.isfinite(shares[0]) & np.isfinite(shares[1])
    ours, theirs = (np.stack([np.where(both, each, 0.0), both], axis=1) for each in shares)
    return add_rows(first, ours), add_rows(second, theirs)


def _repetition_per_answer(evidence: Evidence) -> FloatArray:
    return -_repeated_shares(evidence)


STOP_RATE = Metric(
    summary="Share of generated answers that ended by a stop token and not by the length limit.",
    source="the prompt contract's stop tokens",
    needs=FACTS["stop_rate"].needs,
    better=FACTS["stop_rate"].figures,
    statistics=_stop_rows,
    figures=lambda totals: {"stop_rate": quotient(totals[..., 0], totals[..., 1])},
    count=lambda totals: totals[..., 1],
    shares=("stop_rate",),
)

LENGTH = Metric(
    summary="Mean length of generated answers in tokens and in characters; neither way is better.",
    source="counts of tokens and of Unicode code points",
    needs=FACTS["length"].needs,
    better=FACTS["length"].figures,
    statistics=_length_rows,
    figures=lambda totals: {
        "length_tokens": quotient(totals[..., 0], totals[..., 2]),
        "length_characters": quotient(totals[..., 1], totals[..., 2]),
    },
    count=lambda totals: totals[..., 2],
)

REPETITION = Metric(
    summary="Share of an answer's word 4-grams that occurred before in it; mean over answers of 4 words or more. "
    "Two models are compared over questions that both gave such an answer to.",
    source="Welleck et al. 2020, Neural Text Generation with Unlikelihood Training, section 6 (seq-rep-4)",
    needs=FACTS["repetition"].needs,
    better=FACTS["repetition"].figures,
    statistics=_repetition_rows,
    figures=lambda totals: {"repetition": quotient(totals[..., 0], totals[..., 1])},
    count=lambda totals: totals[..., 1],
    per_answer=_repetition_per_answer,
    paired=_paired_repetition_rows,
)
