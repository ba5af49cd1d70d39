"""Texts: hand-counted cases, and the libraries' own corpus scores as oracles."""

import math

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF as SACRE_CHRF

from loralab.errors import DataError
from loralab.evaluation.metrics.intervals import resample_sums
from loralab.evaluation.metrics.measure import measure
from loralab.evaluation.metrics.texts import BLEU_METRIC, CHRF, EXACT_MATCH, ROUGE
from unit.evaluation.metrics.made import evidence_of, figures_of

_REFERENCES = [
    "The cat sat on the mat, and looked at the dog.",
    "Der Hund lief über die Straße.",
    "猫坐在垫子上。",
    "a",
    "One, two; three (four) five!",
    "",
]
_ANSWERS = [
    "The cat sat on a mat and looked at the big dog.",
    "Der Hund lief auf die Straße.",
    "猫坐在椅子上。",
    "a",
    "one two three four five\nsix",
    "Something where nothing was asked.",
]


def test_exact_match_leaves_outer_blanks_aside() -> None:
    answers, references = [" a b\n", "A b", "", "猫"], ["a b", "a b", " ", "猫"]
    assert figures_of(EXACT_MATCH, evidence_of(answers, references)) == {"exact_match": 0.75}
    assert EXACT_MATCH.per_answer(evidence_of(answers, references)).tolist() == [1, 0, 1, 1]


def test_rouge_by_hand() -> None:
    # Unigrams: 2 of 3 and 2 of 4; bigrams: 1 of 2 and 1 of 3; longest common subsequence 2.
    figures = figures_of(ROUGE, evidence_of(["the cat ran"], ["The cat sat down"]))
    assert figures["rouge1"] == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert figures["rouge2"] == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert figures["rougeL"] == pytest.approx(4 / 7)
    # Not stemmed.
    assert figures_of(ROUGE, evidence_of(["cats"], ["cat"]))["rouge1"] == 0


def test_rouge_is_the_mean_of_the_librarys() -> None:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    counted = [place for place, text in enumerate(_REFERENCES) if text not in ("", "猫坐在垫子上。")]
    scores = [scorer.score(_REFERENCES[place], _ANSWERS[place]) for place in counted]
    evidence = evidence_of(_ANSWERS, _REFERENCES)
    for name, value in figures_of(ROUGE, evidence).items():
        assert value == pytest.approx(np.mean([each[name].fmeasure for each in scores]))
    assert ROUGE.count(ROUGE.statistics(evidence).sum(axis=0)) == len(counted)
    assert np.isnan(ROUGE.per_answer(evidence)).tolist() == [False, False, True, False, False, True]


def test_rouge_refuses_references_that_it_cannot_count() -> None:
    with pytest.raises(DataError, match="use chrf"):
        measure({"rouge": ROUGE}, evidence_of(["猫", "犬"], ["猫", "犬"]), resamples=10)


@pytest.mark.parametrize("take", [slice(None), slice(0, 2), slice(3, 4), slice(2, 3)])
def test_bleu_and_chrf_are_those_of_sacrebleu(take: slice) -> None:
    answers, references = _ANSWERS[take], _REFERENCES[take]
    evidence = evidence_of(answers, references)
    assert figures_of(BLEU_METRIC, evidence)["bleu"] == pytest.approx(BLEU().corpus_score(answers, [references]).score)
    assert figures_of(CHRF, evidence)["chrf"] == pytest.approx(SACRE_CHRF().corpus_score(answers, [references]).score)
    sentences = [SACRE_CHRF().sentence_score(a, [r]).score for a, r in zip(answers, references, strict=True)]
    np.testing.assert_allclose(CHRF.per_answer(evidence), sentences)


def test_drawn_rows_have_the_corpus_score_of_those_rows() -> None:
    evidence = evidence_of(_ANSWERS, _REFERENCES)
    seed, resamples = 11, 8
    drawn = np.random.default_rng(seed).integers(0, len(_ANSWERS), size=(resamples, len(_ANSWERS)))
    for metric, corpus in ((BLEU_METRIC, BLEU()), (CHRF, SACRE_CHRF())):
        sums = resample_sums(metric.statistics(evidence), resamples=resamples, seed=seed)
        (figures,) = metric.figures(sums).values()
        expected = [
            corpus.corpus_score([_ANSWERS[row] for row in rows], [[_REFERENCES[row] for row in rows]]).score
            for rows in drawn
        ]
        np.testing.assert_allclose(figures, expected)


@pytest.mark.parametrize("metric", [EXACT_MATCH, ROUGE, BLEU_METRIC, CHRF])
def test_same_texts_are_perfect_and_empty_answers_nothing(metric) -> None:
    texts = ["the quick brown fox jumps", "over the lazy dog today"]
    for value in figures_of(metric, evidence_of(texts, texts)).values():
        assert value in (pytest.approx(1.0), pytest.approx(100.0))
    for value in figures_of(metric, evidence_of(["", ""], texts)).values():
        assert value == 0
        assert not math.isnan(value)
