"""What a metric is.

Every metric here is a function of sums over rows: `statistics` gives what each row adds, `figures` turns
totals into figures. So point, interval (rows resampled) and paired difference come from the same two
functions for an accuracy, a macro F1 or a corpus BLEU alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from loralab.evaluation.answers import Evidence
from loralab.evaluation.perplexity import FloatArray

Better: TypeAlias = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One entry of the table.

    Attributes:
        summary: one sentence for help and report.
        source: where its definition comes from.
        needs: what it is measured on: `losses`, `answers` (any way of answering), `generated` (answers that
            were generated) or `scores` (closed labels).
        better: figure name -> which direction is better, or None where neither is. Figure names are complete and
            unique over all metrics: `exact_match`, `yes_no_macro_f1`.
        statistics: from evidence to what each row adds (units, k), float64.
        figures: from totals (..., k) to each figure (...); nan where it is not defined.
        count: from totals (..., k) to how many observations stand behind the figures (...).
        share_of_right: name of the figure that is a share of right answers, one per question, whose
            right and wrong answers McNemar's test compares; None where there is none.
        per_answer: from evidence to one score per answer (answers), higher is better, nan where not defined: sorts
            best and worst examples; None where there is none.
        details: from evidence to what a report shows besides figures (a confusion matrix), or None.
        check: raises a `DataError` that names what is missing where evidence cannot be measured; None checks nothing.
        shares: figures that are plain shares of answers; with one answer per row their interval is Wilson's.
        try_out: as `check`, but for evidence that is made up before training alone: it may cost something; None does
            nothing.
        counts: from totals to the count of each figure that has another one than `count`; None where all share it.
        paired: from the evidence of two models, of the same questions, to what each row adds on either side when
            they are compared (units, k each). For figures over those answers alone that can be measured (with a
            number, of enough words): two models give them to different questions, so that only questions that both
            answered so may count. None where `statistics` of each side do, since every answer counts.
    """

    summary: str
    source: str
    needs: Literal["losses", "answers", "generated", "scores"]
    better: Mapping[str, Better | None]
    statistics: Callable[[Evidence], FloatArray]
    figures: Callable[[FloatArray], Mapping[str, FloatArray]]
    count: Callable[[FloatArray], FloatArray]
    share_of_right: str | None = None
    per_answer: Callable[[Evidence], FloatArray] | None = None
    details: Callable[[Evidence], Mapping[str, Any]] | None = None
    check: Callable[[Evidence], None] | None = None
    try_out: Callable[[Evidence], None] | None = None
    shares: tuple[str, ...] = ()
    counts: Callable[[FloatArray], Mapping[str, FloatArray]] | None = None
    paired: Callable[[Evidence, Evidence], tuple[FloatArray, FloatArray]] | None = None
