"""What the page of a run says of its curves: the pictures with their numbers as text, and the reading by rules."""

from collections.abc import Callable
from pathlib import Path

from loralab.reports.curves import read_curve, shown_tasks, task_curves, watched_figure
from loralab.reports.curves_reading import Curves, read_curves
from loralab.reports.facts import Facts, dig, dig_number
from loralab.reports.wording import format_count, format_number
from loralab.run import Json

BAD_FINDINGS = {"diverged", "rate_too_high", "overfitting", "metric_worsens", "spikes"}


def describe_plots(facts: Facts, picture: Callable[[Path], str | None]) -> list[Json]:
    """Return the pictures that the run folder has, each with its numbers as text."""
    plots = []
    for name, title, curves in (
        ("loss.png", "Loss", (("loss", "Training loss"), ("eval_loss", "Validation loss"))),
        ("metrics.png", "Task metrics", tuple((f"eval_{task.figure}", task.figure) for task in shown_tasks(facts))),
        ("learning_rate.png", "Learning rate", (("learning_rate", "Learning rate"),)),
        ("gradient_norm.png", "Gradient norm", (("grad_norm", "Gradient norm"),)),
    ):
        address = picture(facts.folder.plots / name)
        if address:
            words = " ".join(filter(None, (_describe_curve(facts.metrics, key, label) for key, label in curves)))
            plots.append({"title": title, "address": address, "text": words or f"{title} against optimizer steps."})
    return plots


def describe_reading(facts: Facts) -> Json | None:
    """Return what the curves say by rules; None where there are no curves."""
    if not facts.metrics:
        return None
    found = read_curves(_curves(facts))
    return {
        "findings": [
            {"text": each.text, "advice": each.advice, "bad": each.kind in BAD_FINDINGS, "kind": each.kind}
            for each in found
        ]
    }


def _curves(facts: Facts) -> Curves:
    base, change = (
        dig_number(facts.evaluation, *keys) for keys in (("base", "eval_loss"), ("difference", "eval_loss"))
    )
    rows = dig_number(facts.data, "splits", "validation", "rows_kept")
    limit = dig_number(facts.config, "evaluation", "metric_rows")
    return Curves(
        train=read_curve(facts.metrics, "loss"),
        validation=read_curve(facts.metrics, "eval_loss"),
        gradient_norm=read_curve(facts.metrics, "grad_norm"),
        tasks=task_curves(facts),
        answered_rows=None if rows is None or limit is None else min(rows, limit),
        loss_change=change / base if change is not None and base else None,
        kept_by=watched_figure(facts) if dig(facts.config, "training", "load_best_model_at_end") is True else None,
    )


def _describe_curve(metrics: list[Json], key: str, label: str) -> str:
    points = [(dig_number(row, "step"), dig_number(row, key)) for row in metrics]
    known = [(step, value) for step, value in points if step is not None and value is not None]
    if not known:
        return ""
    (first_step, first), (last_step, last) = known[0], known[-1]
    if first_step == last_step:
        return f"{label}: {format_number(last)} at step {format_count(last_step)}."
    return (
        f"{label}: {format_number(first)} at step {format_count(first_step)}, "
        f"{format_number(last)} at step {format_count(last_step)}."
    )
