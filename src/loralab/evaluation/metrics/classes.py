"""Metrics of answers that are one of a few classes: yes/no/maybe, and labels of any kind.

Owns how an answer becomes a class. Confidence in labels is `calibration.py`'s.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix

from loralab.config.metric_facts import FACTS, YES_NO_CLASSES
from loralab.errors import DataError
from loralab.evaluation.answers import Evidence
from loralab.evaluation.metrics.metric import Metric
from loralab.evaluation.metrics.sums import add_rows, check_references, quotient, texts_of
from loralab.evaluation.perplexity import FloatArray

UNPARSABLE = "unparsable"
OTHER = "(no label)"
MOST_LABELS = 50

# What may stand before the answer itself.
_LEAD = re.compile(r"(?:so |therefore,? )?(?:the |my )?(?:(?:final|correct|right) )?answer(?:\s*(?::|=)|\s+is\b\s*:?)")
_NO_WORD = re.compile(r"[\W_]*")
# Not "yesterday", "no-one" or "no's"; and not a question given back: "yes or no", "yes/no/maybe".
_CLASS = re.compile(r"(yes|no|maybe)(?!\w|['\u2019-]\w)(?!\s*(?:/|,?\s*\bor\b)\s*(?:yes|no|maybe)\b)")


def parse_yes_no(text: str) -> str | None:
    """Return "yes", "no" or "maybe", or None where a text says none of them.

    The first word decides, whatever its case and the punctuation around it; a lead like "Answer:" or
    "The answer is" is passed over. "Yes, because ..." is yes; "yesterday", "not sure", "unknown", "yes or no"
    and an answer that comes to the point only later are None.

    Args:
        text: an answer.
    """
    plain = unicodedata.normalize("NFKC", text).lower()
    start = _NO_WORD.match(plain)
    lead = _LEAD.match(plain, start.end() if start else 0)
    start = _NO_WORD.match(plain, lead.end() if lead else 0)
    found = _CLASS.match(plain, start.end() if start else 0)
    return found.group(1) if found else None


def class_scores(right: FloatArray, predicted: FloatArray, true: FloatArray) -> tuple[FloatArray, ...]:
    """Return precision, recall and F1 of each class, nan for a class that no reference has.

    A class that is never predicted has precision 0, as scikit-learn has it with `zero_division=0`.

    Args:
        right: answers of the class that are right (..., classes).
        predicted: answers of the class (..., classes).
        true: references of the class (..., classes).

    Returns:
        Precision, recall and F1 (..., classes).
    """
    there = np.where(true > 0, 0.0, np.nan)
    precision = there + np.nan_to_num(quotient(right, predicted))
    recall = there + np.nan_to_num(quotient(right, true))
    f1 = there + np.nan_to_num(quotient(2 * right, predicted + true))
    return precision, recall, f1


def macro_mean(values: FloatArray) -> FloatArray:
    """Return the mean over the classes that are not nan (..., classes), nan where all are."""
    return quotient(np.nansum(values, axis=-1), np.isfinite(values).sum(axis=-1))


def _yes_no_rows(evidence: Evidence) -> FloatArray:
    answers, references = texts_of(evidence)
    cells = np.zeros((len(answers), len(YES_NO_CLASSES), len(YES_NO_CLASSES) + 1))
    for index, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        said, true = parse_yes_no(answer), parse_yes_no(reference)
        if true is not None:  # `check` refuses other references
            column = len(YES_NO_CLASSES) if said is None else YES_NO_CLASSES.index(said)
            cells[index, YES_NO_CLASSES.index(true), column] = 1
    return add_rows(evidence, cells.reshape(len(answers), -1))


def _yes_no(totals: FloatArray) -> Mapping[str, FloatArray]:
    cells = totals.reshape(*totals.shape[:-1], len(YES_NO_CLASSES), len(YES_NO_CLASSES) + 1)
    count = cells.sum(axis=(-2, -1))
    right = np.diagonal(cells[..., : len(YES_NO_CLASSES)], axis1=-2, axis2=-1)
    scores = class_scores(right, cells[..., : len(YES_NO_CLASSES)].sum(axis=-2), cells.sum(axis=-1))
    figures = {
        "yes_no_accuracy": quotient(right.sum(axis=-1), count),
        "yes_no_macro_f1": macro_mean(scores[2]),
        "yes_no_unparsable": quotient(cells[..., -1].sum(axis=-1), count),
    }
    for index, word in enumerate(YES_NO_CLASSES):
        for name, score in zip(("precision", "recall", "f1"), scores, strict=True):
            figures[f"yes_no_{name}_{word}"] = score[..., index]
    return figures


def _yes_no_counts(totals: FloatArray) -> Mapping[str, FloatArray]:
    """Return the references of each class, and for its precision the answers of the class."""
    cells = totals.reshape(*totals.shape[:-1], len(YES_NO_CLASSES), len(YES_NO_CLASSES) + 1)
    true, said = cells.sum(axis=-1), cells.sum(axis=-2)
    counts: dict[str, FloatArray] = {}
    for index, word in enumerate(YES_NO_CLASSES):
        counts |= {f"yes_no_precision_{word}": said[..., index]}
        counts |= {f"yes_no_{name}_{word}": true[..., index] for name in ("recall", "f1")}
    return counts


def _yes_no_right(evidence: Evidence) -> FloatArray:
    answers, references = texts_of(evidence)
    pairs = zip(answers, references, strict=True)
    return np.array([parse_yes_no(a) == parse_yes_no(r) for a, r in pairs], dtype=np.float64)


def _yes_no_details(evidence: Evidence) -> Mapping[str, Any]:
    answers, references = texts_of(evidence)
    said, true = ([parse_yes_no(text) for text in texts] for texts in (answers, references))
    return _confusion(true, said, order=YES_NO_CLASSES, other=UNPARSABLE)


def _confusion(
    true: Sequence[str | None], said: Sequence[str | None], *, order: Sequence[str], other: str
) -> Mapping[str, Any]:
    """Return counts: a row for each class of the references, a column for each class that is met, then `other`."""
    columns = [word for word in order if word in {*true, *said}]
    classes = [word for word in columns if word in true]
    number = {word: index for index, word in enumerate(columns)}
    true_numbers, said_numbers = (
        [len(columns) if word is None else number.get(word, len(columns)) for word in words] for words in (true, said)
    )
    counts = confusion_matrix(true_numbers, said_numbers, labels=range(len(columns) + 1))
    return {
        "classes": classes,
        "columns": [*columns, other],
        "confusion_matrix": counts[[number[word] for word in classes]].tolist(),
    }


def plain_label(text: str) -> str:
    """Return a label as it is compared: without outer blanks, whatever its case."""
    return text.strip().casefold()


def _labels(evidence: Evidence) -> tuple[list[str], list[str], list[str]]:
    answers, references = ([plain_label(text) for text in texts] for texts in texts_of(evidence))
    return answers, references, sorted(set(references))


def _label_rows(evidence: Evidence) -> FloatArray:
    answers, references, known = _labels(evidence)
    column = {label: index for index, label in enumerate(known)}
    cells = np.zeros((len(answers), 3, len(known)))
    for index, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        cells[index, 2, column[reference]] = 1
        if answer in column:
            cells[index, 1, column[answer]] = 1
        cells[index, 0, column[reference]] = answer == reference
    return add_rows(evidence, cells.reshape(len(answers), -1))


def _label_figures(totals: FloatArray) -> Mapping[str, FloatArray]:
    right, predicted, true = np.moveaxis(totals.reshape(*totals.shape[:-1], 3, -1), -2, 0)
    return {
        "label_accuracy": quotient(right.sum(axis=-1), true.sum(axis=-1)),
        "label_macro_f1": macro_mean(class_scores(right, predicted, true)[2]),
    }


def _label_right(evidence: Evidence) -> FloatArray:
    answers, references, _ = _labels(evidence)
    return np.array([a == r for a, r in zip(answers, references, strict=True)], dtype=np.float64)


def _label_details(evidence: Evidence) -> Mapping[str, Any]:
    answers, references, known = _labels(evidence)
    return _confusion(references, answers, order=known, other=OTHER)


def _check_labels(evidence: Evidence) -> None:
    _, _, known = _labels(evidence)
    if len(known) > MOST_LABELS:
        raise DataError(
            f"metric label_accuracy: the references have {len(known)} different labels, more than {MOST_LABELS}",
            where="key evaluation.metrics",
            fix="use exact_match for free answers",
        )


YES_NO_METRIC = Metric(
    summary="Answers read as yes, no or maybe by their first word: accuracy (unparsable ones are wrong), precision, "
    "recall and F1 of each class, macro F1 over the classes that the references have, share of unparsable answers.",
    source="van Rijsbergen 1979, Information Retrieval, ch. 7 (F1); PubMedQA (Jin et al. 2019) for the task",
    needs=FACTS["yes_no"].needs,
    better=FACTS["yes_no"].figures,
    statistics=_yes_no_rows,
    figures=_yes_no,
    count=lambda totals: totals.sum(axis=-1),
    share_of_right="yes_no_accuracy",
    per_answer=_yes_no_right,
    details=_yes_no_details,
    check=check_references(
        "yes_no",
        usable=lambda reference: parse_yes_no(reference) is not None,
        what="yes, no or maybe",
        fix="leave yes_no out of evaluation.metrics, or mend the row's answer; label_accuracy takes any labels",
    ),
    shares=("yes_no_accuracy", "yes_no_unparsable"),
    counts=_yes_no_counts,
)

LABEL_ACCURACY = Metric(
    summary="Answers that equal their label, whatever case and outer blanks: accuracy, and macro F1 over the labels "
    f"that the references have (at most {MOST_LABELS}).",
    source="van Rijsbergen 1979, Information Retrieval, ch. 7 (F1)",
    needs=FACTS["label_accuracy"].needs,
    better=FACTS["label_accuracy"].figures,
    statistics=_label_rows,
    figures=_label_figures,
    count=lambda totals: totals.reshape(*totals.shape[:-1], 3, -1)[..., 2, :].sum(axis=-1),
    share_of_right="label_accuracy",
    per_answer=_label_right,
    details=_label_details,
    check=_check_labels,
    shares=("label_accuracy",),
)
