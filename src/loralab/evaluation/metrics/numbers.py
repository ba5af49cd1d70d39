"""Metrics of answers that are a number, such as a price.

Owns how a number is read from a text.
"""

import re
import unicodedata
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from loralab.config.metric_facts import FACTS
from loralab.evaluation.answers import Evidence
from loralab.evaluation.metrics.metric import Metric
from loralab.evaluation.metrics.sums import add_rows, check_references, quotient, texts_of
from loralab.evaluation.perplexity import FloatArray

WITHIN = 0.2
# A larger one cannot be squared and summed in float64.
LARGEST = 1e100
_NUMBER = re.compile(r"(?:(?<!\w)[-+]\$?)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:e[-+]?\d+(?!\w))?")


def parse_number(text: str) -> float | None:
    """Return the first number of a text, None where there is none or it is beyond 1e100.

    A point is the decimal sign and commas group thousands: "Price is $1,299.99" is 1299.99. Words behind
    the number are not read: "$ 5k" and "5 million" are 5. A minus counts where no word stands right before it.

    Args:
        text: an answer.
    """
    plain = unicodedata.normalize("NFKC", text).replace("\u2212", "-").lower()
    found = _NUMBER.search(plain)
    if found is None:
        return None
    value = float(re.sub("[,$]", "", found.group()))
    return value if abs(value) <= LARGEST else None


def _pairs(evidence: Evidence) -> tuple[FloatArray, FloatArray]:
    """Return answers and references as numbers (answers), nan where there is none."""
    answers, references = (
        np.array([np.nan if (value := parse_number(text)) is None else value for text in texts], dtype=np.float64)
        for texts in texts_of(evidence)
    )
    return answers, references


def _rows(evidence: Evidence) -> FloatArray:
    answers, _ = _pairs(evidence)
    return _rows_of(evidence, np.isfinite(answers))


def _paired_rows(first: Evidence, second: Evidence) -> tuple[FloatArray, FloatArray]:
    both = np.isfinite(_pairs(first)[0]) & np.isfinite(_pairs(second)[0])
    return _rows_of(first, both), _rows_of(second, both)


def _rows_of(evidence: Evidence, counted: npt.NDArray[np.bool_]) -> FloatArray:
    """Return what each row adds (units, 8).

    All answers, those with a number, those within 20 %; then of the answers whose errors count, all of which have a
    number: how many, |error|, error^2, reference and its square.
    """
    answers, references = _pairs(evidence)
    parsed = np.isfinite(answers)
    distance = np.where(parsed, np.abs(answers - references), 0.0)
    error = np.where(counted, distance, 0.0)
    # R2 does not change when all references are moved by one number; near zero their squares keep their digits.
    centred = np.where(counted, references - (np.median(references) if len(references) else 0.0), 0.0)
    limit = WITHIN * np.abs(references) * (1 + 1e-9)  # 1.2 times a decimal price is not exact in binary
    within = parsed & (distance <= limit)
    columns = [np.ones_like(error), parsed, within, counted, error, error**2, centred, centred**2]
    return add_rows(evidence, np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=1))


def _figures(totals: FloatArray) -> Mapping[str, FloatArray]:
    count, parsed, within, counted, absolute, squared, references, references_squared = np.moveaxis(totals, -1, 0)
    spread = references_squared - np.nan_to_num(quotient(references**2, counted))
    # Equal references leave rounding errors and nothing to explain.
    spread = np.where(spread > 1e-12 * references_squared, spread, 0.0)
    return {
        "number_mae": quotient(absolute, counted),
        "number_rmse": np.sqrt(quotient(squared, counted)),
        "number_within_20": quotient(within, count),
        "number_r2": 1 - quotient(squared, spread),
        "number_unparsable": quotient(count - parsed, count),
    }


def _per_answer(evidence: Evidence) -> FloatArray:
    answers, references = _pairs(evidence)
    return 0.0 - np.abs(answers - references)  # of no error 0, not -0


NUMBER = Metric(
    summary="The first number of the answer against that of the reference: mean absolute error, root mean squared "
    "error and R2 over answers that have a number; share within 20 % of the reference, share without a number. "
    "Errors of two models are compared over questions that both answered by a number.",
    source="Hyndman & Koehler 2006, Another look at measures of forecast accuracy (MAE, RMSE); "
    "R2 = 1 - residual / total sum of squares",
    needs=FACTS["number"].needs,
    better=FACTS["number"].figures,
    statistics=_rows,
    figures=_figures,
    count=lambda totals: totals[..., 0],
    per_answer=_per_answer,
    check=check_references(
        "number",
        usable=lambda reference: parse_number(reference) is not None,
        what="a text with a number",
        fix="leave number out of evaluation.metrics, or mend the row's answer",
    ),
    shares=("number_within_20", "number_unparsable"),
    counts=lambda totals: dict.fromkeys(("number_mae", "number_rmse", "number_r2"), totals[..., 3]),
    paired=_paired_rows,
)
