"""Metrics of texts against their references: exact match, ROUGE, BLEU and chrF.

Owns what counts as an equal text. ROUGE and BLEU are rouge-score's and sacrebleu's own.
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from loralab.config.metric_facts import FACTS
from loralab.errors import DataError
from loralab.evaluation.answers import Evidence
from loralab.evaluation.metrics.metric import Metric
from loralab.evaluation.metrics.sums import OncePerEvidence, add_rows, quotient, texts_of
from loralab.evaluation.perplexity import FloatArray

_ROUGE = ("rouge1", "rouge2", "rougeL")
_BLEU_ORDER = 4
_CHRF_ORDER = 6
_CHRF_BETA = 2


def is_exact(answer: str, reference: str) -> bool:
    """Return whether an answer equals its reference, outer blanks aside."""
    return answer.strip() == reference.strip()


def _exact_per_answer(evidence: Evidence) -> FloatArray:
    pairs = zip(*texts_of(evidence), strict=True)
    return np.array([is_exact(answer, reference) for answer, reference in pairs], dtype=np.float64)


def _exact_rows(evidence: Evidence) -> FloatArray:
    right = _exact_per_answer(evidence)
    return add_rows(evidence, np.stack([right, np.ones_like(right)], axis=1))


def _score_rouge(evidence: Evidence) -> FloatArray:
    """Return the three F scores of each answer (answers, 3), nan where the reference has no word of a-z and 0-9."""
    scorer = RougeScorer(list(_ROUGE), use_stemmer=False)
    rows = []
    for answer, reference in zip(*texts_of(evidence), strict=True):
        scores = scorer.score(target=reference, prediction=answer)
        rows.append([scores[name].fmeasure if _has_rouge_word(reference) else np.nan for name in _ROUGE])
    return np.array(rows, dtype=np.float64).reshape(-1, len(_ROUGE))


# Longest common subsequences take a second for some hundred long answers; scores and their sums are both asked for.
_rouge_per_answer = OncePerEvidence(_score_rouge)


def _has_rouge_word(text: str) -> bool:
    return any(character.isascii() and character.isalnum() for character in text.lower())


def _rouge_rows(evidence: Evidence) -> FloatArray:
    scores = _rouge_per_answer(evidence)
    counted = np.isfinite(scores[:, :1])
    return add_rows(evidence, np.concatenate([np.nan_to_num(scores), counted], axis=1))


def _check_rouge(evidence: Evidence) -> None:
    _, references = texts_of(evidence)
    if references and not any(map(_has_rouge_word, references)):
        raise DataError(
            f"metric rouge counts words of a-z and 0-9, and none of the {len(references)} references has any",
            where="key evaluation.metrics",
            fix="use chrf, which counts characters of any script",
        )


def _score_bleu(evidence: Evidence) -> FloatArray:
    """Return of each answer its counts, totals, length, reference length, 1, and its own BLEU (answers, 12)."""
    # Effective order touches a sentence's own score alone; the counts that are summed are the same.
    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(answer, [reference]) for answer, reference in zip(*texts_of(evidence), strict=True)]
    rows = [[*each.counts, *each.totals, each.sys_len, each.ref_len, 1, each.score] for each in scores]
    return np.array(rows, dtype=np.float64).reshape(-1, 2 * _BLEU_ORDER + 4)


_bleu_per_answer = OncePerEvidence(_score_bleu)


def _bleu_rows(evidence: Evidence) -> FloatArray:
    return add_rows(evidence, _bleu_per_answer(evidence)[:, :-1])


def _bleu(totals: FloatArray) -> Mapping[str, FloatArray]:
    flat = totals.reshape(-1, totals.shape[-1])
    scores = [
        BLEU.compute_bleu(
            correct=row[:_BLEU_ORDER],
            total=row[_BLEU_ORDER : 2 * _BLEU_ORDER],
            sys_len=row[-3],
            ref_len=row[-2],
            smooth_method="exp",
        ).score
        if row[-1]
        else np.nan
        for row in flat.round().astype(int).tolist()
    ]
    return {"bleu": np.array(scores, dtype=np.float64).reshape(totals.shape[:-1])}


def _chrf_counts(answer: str, reference: str) -> list[int]:
    """Return for each order the n-grams of the answer, of the reference and of both (3 * 6)."""
    said, true = "".join(answer.split()), "".join(reference.split())
    sums: list[int] = []
    for order in range(1, _CHRF_ORDER + 1):
        ours, theirs = (
            Counter(text[start : start + order] for start in range(len(text) - order + 1)) for text in (said, true)
        )
        # An order that the reference is too short for says nothing of the answer.
        sums += [ours.total() if theirs else 0, theirs.total(), (ours & theirs).total()]
    return sums


def _chrf_per_answer(evidence: Evidence) -> FloatArray:
    sums = [_chrf_counts(answer, reference) for answer, reference in zip(*texts_of(evidence), strict=True)]
    return np.array(sums, dtype=np.float64).reshape(-1, 3 * _CHRF_ORDER)


def _chrf_rows(evidence: Evidence) -> FloatArray:
    sums = _chrf_per_answer(evidence)
    return add_rows(evidence, np.concatenate([sums, np.ones((len(sums), 1))], axis=1))


def chrf_of(totals: FloatArray) -> FloatArray:
    """Return chrF from the n-gram counts of answers, references and both.

    Precision and recall are means over the orders that both sides have.

    Args:
        totals: counts (..., 3 * 6).

    Returns:
        chrF, 0 to 100 (...).

    Source: Popovic 2015, chrF: character n-gram F-score for automatic MT evaluation, eq. 1 with beta 2.
    """
    answers, references, both = np.moveaxis(totals.reshape(*totals.shape[:-1], _CHRF_ORDER, 3), -1, 0)
    there = (answers > 0) & (references > 0)
    orders = there.sum(axis=-1)
    precision, recall = (
        np.nan_to_num(quotient(np.where(there, np.nan_to_num(quotient(both, each)), 0.0).sum(axis=-1), orders))
        for each in (answers, references)
    )
    weight = _CHRF_BETA**2
    return 100 * np.nan_to_num(quotient((1 + weight) * precision * recall, weight * precision + recall))


EXACT_MATCH = Metric(
    summary="Share of answers that equal their reference, outer blanks aside.",
    source="Rajpurkar et al. 2016, SQuAD, section 6.1 (without its normalisation)",
    needs=FACTS["exact_match"].needs,
    better=FACTS["exact_match"].figures,
    statistics=_exact_rows,
    figures=lambda totals: {"exact_match": quotient(totals[..., 0], totals[..., 1])},
    count=lambda totals: totals[..., 1],
    share_of_right="exact_match",
    per_answer=_exact_per_answer,
    shares=("exact_match",),
)

ROUGE = Metric(
    summary="Mean F scores of ROUGE-1, ROUGE-2 and ROUGE-L (0 to 1) over words of a-z and 0-9, lower case, not "
    "stemmed; references without such words are left out.",
    source="Lin 2004, ROUGE: A Package for Automatic Evaluation of Summaries; library rouge-score, use_stemmer False",
    needs=FACTS["rouge"].needs,
    better=FACTS["rouge"].figures,
    statistics=_rouge_rows,
    figures=lambda totals: {name: quotient(totals[..., i], totals[..., 3]) for i, name in enumerate(_ROUGE)},
    count=lambda totals: totals[..., 3],
    per_answer=lambda evidence: _rouge_per_answer(evidence)[:, 2],
    check=_check_rouge,
)

BLEU_METRIC = Metric(
    summary="Corpus BLEU (0 to 100): tokenizer 13a, case kept, exponential smoothing, one reference.",
    source="Papineni et al. 2002, BLEU; Post 2018, A Call for Clarity in Reporting BLEU Scores; library sacrebleu",
    needs=FACTS["bleu"].needs,
    better=FACTS["bleu"].figures,
    statistics=_bleu_rows,
    figures=_bleu,
    count=lambda totals: totals[..., -1],
    per_answer=lambda evidence: _bleu_per_answer(evidence)[:, -1],
)

CHRF = Metric(
    summary="Corpus chrF2 (0 to 100): F score of character 1- to 6-grams without blanks, recall counting twice.",
    source="Popovic 2015, chrF: character n-gram F-score for automatic MT evaluation; the figures of sacrebleu's CHRF",
    needs=FACTS["chrf"].needs,
    better=FACTS["chrf"].figures,
    statistics=_chrf_rows,
    figures=lambda totals: {"chrf": np.where(totals[..., -1] > 0, chrf_of(totals[..., :-1]), np.nan)},
    count=lambda totals: totals[..., -1],
    per_answer=lambda evidence: chrf_of(_chrf_per_answer(evidence)),
)
