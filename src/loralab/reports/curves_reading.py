"""What the curves of a run say, by rules: overfitting, a step size that does not fit, spikes, a plateau.

Owns the rules and their thresholds. A rule speaks only where the numbers leave little doubt: silence is no
praise. What varies from point to point is measured on the curve itself (`curve_noise.py`).
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from loralab.reports.curve_noise import (
    FEWEST_FOR_NOISE,
    chance,
    fell_after,
    lowest,
    mostly_rising,
    noise_of,
    seen_noise,
    sure_change,
)
from loralab.reports.curves import Curve, TaskCurve
from loralab.reports.wording import format_count, format_loss, format_number

Kind = Literal[
    "diverged",
    "rate_too_high",
    "overfitting",
    "metric_worsens",
    "spikes",
    "noisy",
    "rate_too_low",
    "still_improving",
    "plateau",
    "few_evaluations",
    "no_validation",
]
MOST_FINDINGS = 4
# A change must be beyond noise (`sure_change`), and this share of the value; the last one where noise is unknown.
SMALL_SHARE, LARGE_SHARE, UNKNOWN_SHARE = 0.02, 0.05, 0.12
SPIKE = 10.0
SAME_SHARE = 0.005


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the curves say.

    Attributes:
        kind: which rule found it.
        text: what was seen, with the steps it is about.
        advice: what to do.
        steps: first and last step it is about.
    """

    kind: Kind
    text: str
    advice: str
    steps: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Curves:
    """What the rules look at.

    Attributes:
        train: loss of the training windows.
        validation: loss on the validation split.
        gradient_norm: norm of the gradients, before clipping.
        tasks: task figures.
        answered_rows: most rows behind a task figure while training, or None where unknown.
        loss_change: loss of the adapter - loss of the base, as the final evaluation has it, by the base's loss.
        kept_by: the figure by which the best evaluation's adapter is kept at the end, or None where it is the last.
    """

    train: Curve
    validation: Curve
    gradient_norm: Curve
    tasks: Sequence[TaskCurve] = ()
    answered_rows: float | None = None
    loss_change: float | None = None
    kept_by: str | None = None


def read_curves(curves: Curves) -> list[Finding]:
    """Return what the curves say, most important first, at most four findings; none for a run that logged nothing."""
    if not curves.train and not curves.validation:
        return []
    found = [finding for rule in RULES if (finding := rule(curves)) is not None]
    kinds = {finding.kind for finding in found}
    return [finding for finding in found if not kinds & _SAID_BY.get(finding.kind, set())][:MOST_FINDINGS]


def find_divergence(curves: Curves) -> Finding | None:
    """Say that training diverged.

    The median of the last tenth of the training losses (8 of them or more, of the tenth at least 3) lies above that of
    the first three by 10 % and more than noise can do (`sure_change`, here and below), and each of the last three above
    all of the first three.
    """
    steps, values = curves.train.steps, curves.train.values
    if len(values) < 8:
        return None
    last = max(3, len(values) // 10)
    start, end = statistics.median(values[:3]), statistics.median(values[-last:])
    bar = start + max(0.1 * abs(start), sure_change(values[: len(values) // 2]))
    if end <= bar or min(values[-3:]) <= max(values[:3]):
        return None
    lowest = min(range(len(values)), key=values.__getitem__)
    return Finding(
        "diverged",
        f"Training diverged: its loss ended at {format_loss(end)}, above the {format_loss(start)} it began with "
        f"(lowest {format_loss(values[lowest])} at step {_step(steps[lowest])}).",
        "Lower training.learning_rate to a third, or set training.warmup_ratio: 0.03 if there is no warm-up.",
        (steps[lowest], steps[-1]),
    )


def find_early_rise(curves: Curves) -> Finding | None:
    """Say that the learning rate is too high.

    Within the first third of the training losses (8 or more), three in a row (a twentieth of all losses, where
    that is more) lie above the first by 5 % and more than the noise of the later half can do.
    """
    steps, values = curves.train.steps, curves.train.values
    if len(values) < 8:
        return None
    bar = values[0] + max(LARGE_SHARE * abs(values[0]), sure_change(values[len(values) // 2 :]))
    early = values[: max(4, len(values) // 3)]
    row = max(3, len(values) // 20)
    for start in range(1, len(early) - row + 1):
        if min(early[start : start + row]) > bar:
            return Finding(
                "rate_too_high",
                f"The training loss rose early, from {format_loss(values[0])} at step {_step(steps[0])} to "
                f"{format_loss(max(early))} within the first {_step(steps[len(early) - 1])} steps: "
                "the learning rate is likely too high at the start.",
                "Lower training.learning_rate, or let it rise slowly (training.warmup_ratio: 0.03 or more).",
                (steps[0], steps[len(early) - 1]),
            )
    return None


def find_overfitting(curves: Curves) -> Finding | None:
    """Say that the run overfitted.

    Two or more evaluations follow the best one and rise: the last one and the mean of their later half lie above it by
    2 % of the loss and more than noise can do (of four evaluations and fewer, whose noise cannot be told: by 12 %, each
    above the one before), all of them by an eighth of that, and most pairs of them are in rising order. The training
    loss fell meanwhile by 1 % and three standard errors.
    """
    steps, values = curves.validation.steps, curves.validation.values
    if len(values) < 3:
        return None
    best = lowest(values)
    after = values[best + 1 :]
    # Where it first fell is curved, which is no noise.
    late = values[max(best - 1, 0) :]
    late = late if len(late) >= FEWEST_FOR_NOISE else values
    noise = noise_of(late)
    bar = max(SMALL_SHARE * values[best], sure_change(late)) if noise is not None else UNKNOWN_SHARE * values[best]
    rises = len(after) >= 2 and min(after[-1], statistics.mean(after[len(after) // 2 :])) - values[best] > bar
    steady = min(after, default=0.0) > values[best] + bar / 8 and mostly_rising([values[best], *after], noise)
    if not rises or not steady or not fell_after(curves.train, steps[best]):
        return None
    kept = "" if curves.kept_by is None else f"The adapter kept is that of the best evaluation by {curves.kept_by}."
    advice = "Train for fewer steps, or set training.early_stopping and training.load_best_model_at_end: true."
    return Finding(
        "overfitting",
        f"Overfitting: the validation loss rose from {format_loss(values[best])} at step {_step(steps[best])} to "
        f"{format_loss(values[-1])} at step {_step(steps[-1])} while the training loss fell; the best checkpoint by "
        f"this loss is that of step {_step(steps[best])}.",
        kept or f"{advice} More rows, or a smaller lora.r, help too.",
        (steps[best], steps[-1]),
    )


def find_worse_metric(curves: Curves) -> Finding | None:
    """Say that a task figure worsened while the validation loss improved.

    Of five evaluations or more, the loss's last value is 2 %, and more than noise can do, below its first, and 0.5 %
    below where the figure was at its best. The last two values of the figure, both behind its best, are worse than the
    best by more than chance. Chance is, for a share of known rows, 2.5 standard errors of a difference between two
    independent samples, for other figures 10 % of the best value, and never less than the noise of the figure's own
    curve can do.
    """
    values = curves.validation.values
    if len(values) < FEWEST_FOR_NOISE or values[0] - values[-1] <= max(
        SMALL_SHARE * abs(values[0]), sure_change(values)
    ):
        return None
    for task in curves.tasks:
        steps, own = task.curve.steps, task.curve.values
        sign = 1 if task.better == "lower" else -1
        best = lowest([sign * value for value in own])
        if len(own) < FEWEST_FOR_NOISE or best > len(own) - 3:
            continue
        loss_then = dict(zip(curves.validation.steps, values, strict=True)).get(steps[best])
        if loss_then is None or loss_then - values[-1] <= SAME_SHARE * abs(values[-1]):
            continue
        worst_case = min(sign * (value - own[best]) for value in own[-2:])
        if worst_case > max(chance(own, own[best], curves.answered_rows), sure_change(own)):
            return Finding(
                "metric_worsens",
                f"{task.figure} worsened from {format_number(own[best])} at step {_step(steps[best])} to "
                f"{format_number(own[-1])} at step {_step(steps[-1])} while the validation loss improved: a lower "
                "loss is not a better answer here.",
                f"Let it choose the checkpoint: {task.figure} in training.early_stopping.metric or "
                "training.metric_for_best_model, with training.load_best_model_at_end: true."
                if curves.kept_by != task.figure
                else "The adapter kept is that of its best evaluation.",
                (steps[best], steps[-1]),
            )
    return None


def find_spikes(curves: Curves) -> Finding | None:
    """Say that the gradient norm has spikes.

    Behind the first tenth of 20 points or more, some are ten times the median, but not more than a twentieth of them:
    that would be their ordinary spread.
    """
    count = len(curves.gradient_norm.steps)
    if count < 20:
        return None
    points = list(zip(curves.gradient_norm.steps, curves.gradient_norm.values, strict=True))[count // 10 :]
    median = statistics.median(value for _, value in points)
    spikes = [(step, value) for step, value in points if value > SPIKE * median > 0]
    if not spikes or len(spikes) > max(1, len(points) // 20):
        return None
    named = ", ".join(_step(step) for step, _ in spikes[:3]) + (" and others" if len(spikes) > 3 else "")
    plural = "s" if len(spikes) > 1 else ""
    return Finding(
        "spikes",
        f"The gradient norm spiked at step{plural} {named}: up to {format_number(max(v for _, v in spikes))}, where "
        f"its median is {format_number(median)}.",
        "Look at the rows of these steps (loralab preview); odd rows are the usual cause. Clipping "
        "(training.max_grad_norm) bounds what they do.",
        (spikes[0][0], spikes[-1][0]),
    )


def find_noise(curves: Curves) -> Finding | None:
    """Say that the validation loss is too noisy to tell a course.

    Of six evaluations or more, noise is above 1 % of the loss, and the means of the first and the last third differ by
    less than two standard errors.
    """
    steps, values = curves.validation.steps, curves.validation.values
    if len(values) < 6:
        return None
    noise, third = seen_noise(values), len(values) // 3
    change = abs(statistics.mean(values[-third:]) - statistics.mean(values[:third]))
    if noise <= 0.01 * abs(statistics.mean(values)) or change >= 2 * noise * math.sqrt(2 / third):
        return None
    return Finding(
        "noisy",
        f"The validation loss goes up and down by about {format_loss(noise)} from one evaluation to the next, more "
        f"than it changed from step {_step(steps[0])} to step {_step(steps[-1])}: no course can be told.",
        "Lower training.learning_rate, or take more rows per step; if there are few validation rows, take more.",
        (steps[0], steps[-1]),
    )


def find_low_rate(curves: Curves) -> Finding | None:
    """Say that the loss barely moved.

    From base to adapter by less than 1 % (final evaluation), and over training, of ten points or more, by less than 1 %
    and two standard errors between its first and its last third.
    """
    steps, values = curves.train.steps, curves.train.values
    change = curves.loss_change
    if len(values) < 10 or change is None or abs(change) >= 0.01:
        return None
    third = len(values) // 3
    first, last = values[:third], values[-third:]
    moved = abs(statistics.mean(last) - statistics.mean(first))
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / third)
    if moved >= 0.01 * abs(statistics.mean(first)) or moved >= 2 * error > 0:
        return None
    return Finding(
        "rate_too_low",
        f"The loss barely moved: less than 1 % from step {_step(steps[0])} to step {_step(steps[-1])}, and from base "
        f"to adapter by {format_number(100 * change, 2)} %. The learning rate is too low, or there is little to learn.",
        "Try training.learning_rate three times as high; if nothing moves still, look at the data (loralab preview).",
        (steps[0], steps[-1]),
    )


def find_unfinished(curves: Curves) -> Finding | None:
    """Say that the validation loss still fell at the end.

    Of six evaluations or more the last is the best, and over the last third (two evaluations at least) the loss fell
    by 2 % and more than noise can do.
    """
    steps, values = curves.validation.steps, curves.validation.values
    if len(values) < 6 or lowest(values) < len(values) - 1:
        return None
    start = len(values) - 1 - max(2, len(values) // 3)
    fall = values[start] - values[-1]
    if fall <= max(SMALL_SHARE * values[start], sure_change(values)) or values[-2] >= values[start]:
        return None
    return Finding(
        "still_improving",
        f"The validation loss still fell at the end: from {format_loss(values[start])} at step {_step(steps[start])} "
        f"to {format_loss(values[-1])} at step {_step(steps[-1])}, its lowest.",
        "Train longer (training.num_train_epochs or training.max_steps).",
        (steps[start], steps[-1]),
    )


def find_plateau(curves: Curves) -> Finding | None:
    """Say that the last half of the steps brought nothing.

    Over the last half of six evaluations or more the validation loss stays within 0.5 % of its last value, after a fall
    of 2 % or more.
    """
    steps, values = curves.validation.steps, curves.validation.values
    if len(values) < 6:
        return None
    end, start = values[-1], len(values)
    while start > 0 and abs(values[start - 1] - end) <= SAME_SHARE * abs(end):
        start -= 1
    if start > len(values) // 2 or values[0] - end <= SMALL_SHARE * abs(values[0]):
        return None
    return Finding(
        "plateau",
        f"The validation loss has stayed within 0.5 % of {format_loss(end)} since step {_step(steps[start])}, up to "
        f"step {_step(steps[-1])}: these steps brought nothing that shows in it.",
        "Fewer steps would have done as well; for a lower loss, change something else than their number (rows, lora.r, "
        "training.learning_rate).",
        (steps[start], steps[-1]),
    )


def find_few_evaluations(curves: Curves) -> Finding | None:
    """Say that one or two evaluations are no curve."""
    steps = curves.validation.steps
    if not 1 <= len(steps) <= 2 or len(curves.train.steps) < 3:
        return None
    once = "once" if len(steps) == 1 else "twice"
    return Finding(
        "few_evaluations",
        f"The validation loss was measured {once} while training, which shows no course.",
        "Set evaluation.strategy: steps, and evaluation.steps to a tenth of the run's steps.",
        (steps[0], steps[-1]),
    )


def find_no_validation(curves: Curves) -> Finding | None:
    """Say that no validation loss was measured, so that nothing can be said about new rows."""
    steps = curves.train.steps
    if curves.validation:
        return None
    return Finding(
        "no_validation",
        "No validation loss was measured while training: whether the run overfitted cannot be told from its curves.",
        "Set data.validation, such as 0.05 of the training rows.",
        (steps[0], steps[-1]),
    )


# Most important first.
RULES: tuple[Callable[[Curves], Finding | None], ...] = (
    find_divergence,
    find_early_rise,
    find_overfitting,
    find_worse_metric,
    find_spikes,
    find_noise,
    find_low_rate,
    find_unfinished,
    find_plateau,
    find_few_evaluations,
    find_no_validation,
)
# What another finding says already, or explains better.
_SAID_BY: dict[Kind, set[Kind]] = {
    "rate_too_high": {"diverged"},
    "spikes": {"diverged"},
    "noisy": {"diverged", "overfitting"},
    "plateau": {"rate_too_low"},
}


def _step(step: float) -> str:
    return format_count(step)
