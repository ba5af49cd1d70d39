"""Metrics of the losses: perplexity by token, byte and word, token accuracy and entropy.

Owns what the losses are divided by. The losses themselves are `evaluation/perplexity.py`'s.
"""

import math
from collections.abc import Mapping

import numpy as np

from loralab.config.metric_facts import FACTS
from loralab.errors import DataError
from loralab.evaluation.answers import Evidence
from loralab.evaluation.metrics.metric import Metric
from loralab.evaluation.metrics.sums import quotient
from loralab.evaluation.perplexity import FloatArray, SplitLoss


def _losses(evidence: Evidence) -> SplitLoss:
    if evidence.losses is None:
        raise DataError("no losses were measured", where="key evaluation.metrics", fix="measure the split's losses too")
    return evidence.losses


def _perplexity_rows(evidence: Evidence) -> FloatArray:
    losses = _losses(evidence)
    unknown = np.zeros(evidence.units)
    lengths = [unknown if each is None else each for each in (evidence.answer_bytes, evidence.answer_words)]
    return np.stack([losses.totals, losses.counts, *lengths], axis=1).astype(np.float64)


def _perplexity(totals: FloatArray) -> Mapping[str, FloatArray]:
    nats, tokens, byte_count, words = np.moveaxis(totals, -1, 0)
    with np.errstate(over="ignore"):  # a loss of more than 709 nats is an infinite perplexity
        return {
            "perplexity": np.exp(quotient(nats, tokens)),
            "byte_perplexity": np.exp(quotient(nats, byte_count)),
            "word_perplexity": np.exp(quotient(nats, words)),
            "bits_per_byte": quotient(nats, byte_count) / math.log(2),
        }


def _perplexity_counts(totals: FloatArray) -> Mapping[str, FloatArray]:
    return {
        "byte_perplexity": totals[..., 2],
        "word_perplexity": totals[..., 3],
        "bits_per_byte": totals[..., 2],
    }


def _accuracy_rows(evidence: Evidence) -> FloatArray:
    losses = _losses(evidence)
    return np.stack([losses.correct, losses.counts], axis=1).astype(np.float64)


def _entropy_rows(evidence: Evidence) -> FloatArray:
    losses = _losses(evidence)
    return np.stack([losses.entropies, losses.counts], axis=1).astype(np.float64)


PERPLEXITY = Metric(
    summary="Exponential of the mean loss per token, per UTF-8 byte and per blank-separated word; bits per byte. "
    "Only those per byte and per word can be compared between tokenizers.",
    source="Jelinek et al. 1977, Perplexity: a measure of the difficulty of speech recognition tasks",
    needs=FACTS["perplexity"].needs,
    better=FACTS["perplexity"].figures,
    statistics=_perplexity_rows,
    figures=_perplexity,
    count=lambda totals: totals[..., 1],
    counts=_perplexity_counts,
)

TOKEN_ACCURACY = Metric(
    summary="Share of the answers' tokens that were the most likely one, given the true tokens before them.",
    source="share of argmax hits over supervised tokens",
    needs=FACTS["token_accuracy"].needs,
    better=FACTS["token_accuracy"].figures,
    statistics=_accuracy_rows,
    figures=lambda totals: {"token_accuracy": quotient(totals[..., 0], totals[..., 1])},
    count=lambda totals: totals[..., 1],
)

TOKEN_ENTROPY = Metric(
    summary="Mean entropy of the predicted distributions over the answers' tokens, nats; neither way is better.",
    source="Shannon 1948, A Mathematical Theory of Communication, section 6",
    needs=FACTS["token_entropy"].needs,
    better=FACTS["token_entropy"].figures,
    statistics=_entropy_rows,
    figures=lambda totals: {"token_entropy": quotient(totals[..., 0], totals[..., 1])},
    count=lambda totals: totals[..., 1],
)
