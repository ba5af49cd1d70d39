"""What metrics have in common: answers added up by row, and quotients of sums.

Owns how several turns of one row are put together and how a row is named in errors.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from loralab.errors import DataError
from loralab.evaluation.answers import Evidence, Question
from loralab.evaluation.perplexity import FloatArray


def texts_of(evidence: Evidence) -> tuple[list[str], list[str]]:
    """Return the texts of all answers and their references, in the order of the questions."""
    return [answer.text for answer in evidence.answers], [answer.question.reference for answer in evidence.answers]


def add_rows(evidence: Evidence, per_answer: npt.ArrayLike) -> FloatArray:
    """Add what each answer gives to the row that it belongs to.

    Args:
        evidence: names the row of each answer.
        per_answer: what each answer adds (answers, k).

    Returns:
        What each row adds (units, k); zero for a row without an answer.
    """
    values = np.asarray(per_answer, dtype=np.float64)
    rows = np.zeros((evidence.units, values.shape[1]))
    np.add.at(rows, [answer.question.unit for answer in evidence.answers], values)
    return rows


class OncePerEvidence:
    """A slow function of the evidence that is computed once and kept until another evidence comes.

    Args:
        compute: from evidence to an array.
    """

    def __init__(self, compute: Callable[[Evidence], FloatArray]) -> None:
        self._compute = compute
        self._last: tuple[Evidence, FloatArray] | None = None

    def __call__(self, evidence: Evidence) -> FloatArray:
        """Return what the function gives for `evidence`."""
        if self._last is None or self._last[0] is not evidence:
            self._last = evidence, self._compute(evidence)
        return self._last[1]


def quotient(above: FloatArray, below: FloatArray) -> FloatArray:
    """Return `above / below`, nan where `below` is zero."""
    above, below = np.broadcast_arrays(np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64))
    result: FloatArray = np.divide(above, below, out=np.full(below.shape, np.nan), where=below != 0)
    return result


def place_of(question: Question) -> str:
    """Return where a question comes from, as errors say it."""
    return f"row {question.row} of data source {question.source + 1}"


def check_references(metric: str, *, usable: Callable[[str], bool], what: str, fix: str) -> Callable[[Evidence], None]:
    """Return a check that every reference can be used.

    Args:
        metric: its name, for the message.
        usable: tells whether a reference can be used.
        what: what a reference has to be, in words ("yes, no or maybe").
        fix: what to do about one that cannot be used.

    Raises:
        DataError: (the check) some reference cannot be used; the first one's row is named.
    """

    def check(evidence: Evidence) -> None:
        bad = [answer.question for answer in evidence.answers if not usable(answer.question.reference)]
        if bad:
            shown = bad[0].reference if len(bad[0].reference) <= 60 else f"{bad[0].reference[:57]}..."
            raise DataError(
                f"metric {metric}: the reference {shown!r} is not {what}"
                f" ({len(bad)} of {len(evidence.answers)} references are not)",
                where=place_of(bad[0]),
                fix=fix,
            )

    return check
