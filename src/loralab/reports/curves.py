"""Curves of a run: one quantity against its steps, read from `metrics.jsonl`.

Owns reading alone. How curves look is `plots.py`'s, what they say `curves_reading.py`'s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loralab.config.metric_checks import watched_metric
from loralab.config.metric_facts import ALWAYS, FACTS, Better, better_of, owner_of
from loralab.config.training_schema import EarlyStopping, TrainingConfig
from loralab.reports.facts import Facts, dig, dig_number, dig_table

# More lines than this cannot be told apart.
SHOWN_TASKS = 4
# What the loss's own curve says.
_OF_LOSSES = frozenset({"perplexity", "token_accuracy", "token_entropy"})


@dataclass(frozen=True, slots=True)
class Curve:
    """One quantity against steps.

    Attributes:
        steps: increasing steps, [N].
        values: finite values, [N].
    """

    steps: list[float]
    values: list[float]

    def __bool__(self) -> bool:
        return bool(self.steps)


def read_curve(metrics: Sequence[Mapping[str, Any]], key: str) -> Curve:
    """Return the finite values of `key` by step; of a step logged twice (a resumed run), the last."""
    by_step: dict[float, float] = {}
    for row in metrics:
        step, value = dig_number(row, "step"), dig_number(row, key)
        if step is not None and value is not None:
            by_step[step] = value
    steps = sorted(by_step)
    return Curve(steps, [by_step[step] for step in steps])


@dataclass(frozen=True, slots=True)
class TaskCurve:
    """A task figure against steps.

    Attributes:
        figure: its name, without `eval_`.
        curve: its values.
        better: which direction is better.
        watched: whether it decides on the best adapter.
    """

    figure: str
    curve: Curve
    better: Better
    watched: bool = False


def task_curves(facts: Facts) -> list[TaskCurve]:
    """Return the curves of the watched figure and of the headline figures, the watched one first.

    Args:
        facts: the run; figures that were never measured while training, or have no better direction, are left out.
    """
    watched = watched_figure(facts)
    headlines = [figure for each in FACTS.values() for figure in each.headline if figure not in _OF_LOSSES]
    own = {
        key: each.get("better")
        for key, each in dig_table(facts.evaluation, "metrics").items()
        if isinstance(each, dict) and owner_of(key) is None  # functions of the user's own
    }
    names = dict.fromkeys([*([watched] if watched and watched not in ALWAYS else []), *headlines, *own])
    found = []
    for figure in names:
        better = better_of(figure) or own.get(figure) or (_watched_direction(facts) if figure == watched else None)
        curve = read_curve(facts.metrics, f"eval_{figure}")
        if curve and better in ("higher", "lower"):
            found.append(TaskCurve(figure, curve, better, figure == watched))
    return found


def shown_tasks(facts: Facts) -> list[TaskCurve]:
    """Return the task figures of one picture: the watched one first, and those that share its scale of 0 to 1.

    Args:
        facts: the run.
    """
    found = task_curves(facts)
    shown = found[:1]
    for task in found[1:]:
        # Of two metrics that say the same, one line would hide the other.
        if _is_share(task) and _is_share(found[0]) and all(task.curve != other.curve for other in shown):
            shown.append(task)
    return shown[:SHOWN_TASKS]


def _is_share(task: TaskCurve) -> bool:
    return all(0 <= value <= 1 for value in task.curve.values)


def watched_figure(facts: Facts) -> str | None:
    """Return the figure that decides on the best adapter or on an early stop, or None where none does."""
    training = dig_table(facts.config, "training")
    stopping = dig_table(training, "early_stopping")
    if not stopping and not training.get("load_best_model_at_end"):
        return None
    named, best = stopping.get("metric"), training.get("metric_for_best_model")
    return watched_metric(
        TrainingConfig(
            early_stopping=EarlyStopping(metric=named) if isinstance(named, str) and named else None,
            metric_for_best_model=best if isinstance(best, str) else None,
        )
    )


def kept_step(facts: Facts) -> float | None:
    """Return the step of the best evaluation by the watched figure, whose adapter was kept; None where that was not."""
    figure = watched_figure(facts)
    if figure is None or dig(facts.config, "training", "load_best_model_at_end") is not True:
        return None
    better = better_of(figure) or _watched_direction(facts) or dig(facts.evaluation, "metrics", figure, "better")
    curve = read_curve(facts.metrics, figure if figure in ("loss", "eval_loss") else f"eval_{figure}")
    if not curve or better not in ("higher", "lower"):
        return None
    # Of equal ones the first, as training itself takes it.
    return curve.steps[curve.values.index((min if better == "lower" else max)(curve.values))]


def _watched_direction(facts: Facts) -> Better | None:
    mode = dig(facts.config, "training", "early_stopping", "mode")
    directions: dict[str, Better] = {"min": "lower", "max": "higher"}
    return directions.get(str(mode))
