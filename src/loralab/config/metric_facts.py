"""What each task metric is called, measured on, and which way is better: what can be told without computing.

Owns the names that a configuration may use. What a metric computes stands in `evaluation/metrics/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Better: TypeAlias = Literal["higher", "lower"]
Way: TypeAlias = Literal["generate", "score", "teacher_forced"]
Need: TypeAlias = Literal["losses", "answers", "generated", "scores"]


@dataclass(frozen=True, slots=True)
class MetricFacts:
    """What a metric gives.

    Attributes:
        needs: what it is measured on: `losses`, `answers` (any way of answering), `generated` (answers that
            were generated) or `scores` (closed labels).
        figures: each figure's name and which direction is better, or None where neither is.
        headline: the figures that a line of progress shows.
    """

    needs: Need
    figures: Mapping[str, Better | None]
    headline: tuple[str, ...]


YES_NO_CLASSES = ("yes", "no", "maybe")
_YES_NO: dict[str, Better | None] = {
    "yes_no_accuracy": "higher",
    "yes_no_macro_f1": "higher",
    "yes_no_unparsable": "lower",
    **{f"yes_no_{kind}_{each}": "higher" for each in YES_NO_CLASSES for kind in ("precision", "recall", "f1")},
}

FACTS: dict[str, MetricFacts] = {
    "perplexity": MetricFacts(
        "losses",
        {"perplexity": "lower", "byte_perplexity": "lower", "word_perplexity": "lower", "bits_per_byte": "lower"},
        ("perplexity",),
    ),
    "token_accuracy": MetricFacts("losses", {"token_accuracy": "higher"}, ("token_accuracy",)),
    "token_entropy": MetricFacts("losses", {"token_entropy": None}, ("token_entropy",)),
    "exact_match": MetricFacts("answers", {"exact_match": "higher"}, ("exact_match",)),
    "yes_no": MetricFacts("answers", _YES_NO, ("yes_no_accuracy", "yes_no_macro_f1")),
    "label_accuracy": MetricFacts(
        "answers", {"label_accuracy": "higher", "label_macro_f1": "higher"}, ("label_accuracy", "label_macro_f1")
    ),
    "calibration": MetricFacts(
        "scores", {"calibration_ece": "lower", "calibration_brier": "lower"}, ("calibration_ece",)
    ),
    "number": MetricFacts(
        "answers",
        {
            "number_mae": "lower",
            "number_rmse": "lower",
            "number_within_20": "higher",
            "number_r2": "higher",
            "number_unparsable": "lower",
        },
        ("number_mae", "number_within_20"),
    ),
    "rouge": MetricFacts("answers", {"rouge1": "higher", "rouge2": "higher", "rougeL": "higher"}, ("rougeL",)),
    "bleu": MetricFacts("answers", {"bleu": "higher"}, ("bleu",)),
    "chrf": MetricFacts("answers", {"chrf": "higher"}, ("chrf",)),
    "stop_rate": MetricFacts("generated", {"stop_rate": "higher"}, ("stop_rate",)),
    "length": MetricFacts("generated", {"length_tokens": None, "length_characters": None}, ("length_tokens",)),
    "repetition": MetricFacts("answers", {"repetition": "lower"}, ("repetition",)),
}
# What training measures in any case, besides the loss; the second is not a metric of an evaluation.
ALWAYS: dict[str, Better] = {"eval_loss": "lower", "loss": "lower", "perplexity": "lower"}
# Names in `evaluation.json` and `metrics.jsonl` that no function of a user's may take.
RESERVED = frozenset(
    {
        *("loss", "eval_loss", "eval_loss_batch_mean", "num_batches", "num_examples", "supervised_tokens"),
        *("split", "batch_size", "max_length", "base", "difference", "differences", "metrics", "details", "note"),
        *(
            "answered_by",
            "answered_rows",
            "left_out",
            "learning_rate",
            "grad_norm",
            "tokens_per_second",
            "step",
            "epoch",
        ),
        *(figure for facts in FACTS.values() for figure in facts.figures),
    }
)


def is_outside(name: str) -> bool:
    """Return whether a metric is a function of the user's, written as `package.module:function`."""
    return ":" in name


def figure_name(metric: str) -> str:
    """Return a figure's name without the `eval_` that it has in `metrics.jsonl`; the loss keeps its own."""
    return metric if metric == "eval_loss" else metric.removeprefix("eval_")


def owner_of(figure: str) -> str | None:
    """Return the metric that gives a figure, or None."""
    return next((name for name, facts in FACTS.items() if figure in facts.figures), None)


def better_of(figure: str, outside: Mapping[str, Better] | None = None) -> Better | None:
    """Return which direction of a figure is better, or None where neither is or it is not known."""
    if figure in ALWAYS:
        return ALWAYS[figure]
    owner = owner_of(figure)
    return FACTS[owner].figures[figure] if owner is not None else (outside or {}).get(figure)
