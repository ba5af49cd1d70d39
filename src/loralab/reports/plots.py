"""Curves of a run against its steps, as PNG files.

Owns how the curves look. Uses matplotlib's object-oriented Agg interface only: no global figure,
no display, and the same bytes from the same metrics.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from loralab.reports.curves import Curve, kept_step, read_curve, shown_tasks
from loralab.reports.facts import Facts, dig, dig_number, load_facts
from loralab.reports.wording import format_loss, format_number
from loralab.run import RunFolder, replacing

# Okabe and Ito's palette, told apart with every common kind of colour blindness.
BLUE, LIGHT_BLUE, VERMILION, INK, GREY = "#0072B2", "#7FB8D8", "#D55E00", "#222222", "#6B6B6B"
# Of task metrics: a colour and a marker each, so that no line needs its colour to be told.
TASK_LINES = (("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "D"))
SIZE_INCHES = (9.0, 3.9)
DOTS_PER_INCH = 160
FEW_POINTS = 40
SMOOTH_FROM = 100
SMOOTH_SHARE = 50
LOG_SCALE_FROM = 50.0
SCIENTIFIC_BELOW = 1e-2

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "agg.path.chunksize": 20000,
}


def write_plots(folder: RunFolder) -> list[Path]:
    """Draw every plot that the run has numbers for.

    Args:
        folder: the run; plots of an earlier call that no longer apply are removed.

    Returns:
        The files written, in the order in which a reader wants them.
    """
    facts = load_facts(folder)
    written = []
    for name, draw in PLOTS.items():
        path = folder.plots / name
        with _own_style():
            layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.14)
            figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout=layout)
            drawn = draw(facts, figure.add_subplot())
            if drawn:
                _save(figure, path)
        if drawn:
            written.append(path)
        else:
            path.unlink(missing_ok=True)
    return written


@contextmanager
def _own_style() -> Iterator[None]:
    """Draw by matplotlib's defaults and `STYLE`, whatever the user's matplotlibrc says."""
    style: dict[Any, Any] = {
        key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")
    }
    with matplotlib.rc_context(style | STYLE):
        yield


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        # No version of matplotlib in the file: equal pictures are equal bytes.
        figure.savefig(temporary, format="png", metadata={"Software": None})


def smooth(values: list[float]) -> list[float]:
    """Return the mean over a centred window of a fiftieth of the points, cut at the ends."""
    half = max(1, len(values) // SMOOTH_SHARE // 2)
    sums = numpy.concatenate([[0.0], numpy.cumsum(numpy.asarray(values, dtype=numpy.float64))])
    index = numpy.arange(len(values))
    first, last = numpy.maximum(index - half, 0), numpy.minimum(index + half + 1, len(values))
    return [float(mean) for mean in (sums[last] - sums[first]) / (last - first)]


def _draw_loss(facts: Facts, axes: Axes) -> bool:
    train, validation = read_curve(facts.metrics, "loss"), read_curve(facts.metrics, "eval_loss")
    if not train and not validation:
        return False
    _draw_line(axes, train, label="training")
    kept = False
    if validation:
        axes.plot(
            validation.steps, validation.values, color=VERMILION, linewidth=1.2, marker="o", markersize=5,
            markeredgecolor="white", markeredgewidth=0.8, label="validation", zorder=4,
        )  # fmt: skip
        _mark_best(axes, validation, word="lowest")
        kept = _mark_kept(axes, validation, kept_step(facts))
    base = dig_number(facts.evaluation, "base", "eval_loss")
    if base is not None:
        split = dig(facts.evaluation, "split") or "evaluated rows"
        axes.axhline(base, color=INK, linestyle=(0, (5, 3)), linewidth=1.2, label=f"base model ({split})")
    values = train.values + validation.values + ([] if base is None else [base])
    _finish(axes, train.steps + validation.steps, values, title="Loss", label="nats per supervised token", beside=kept)
    return True


def _mark_best(axes: Axes, curve: Curve, *, color: str = VERMILION, highest: bool = False, word: str = "best") -> None:
    if len(curve.steps) < 2:
        return
    best = (max if highest else min)(range(len(curve.values)), key=curve.values.__getitem__)
    step, value = curve.steps[best], curve.values[best]
    label = f"{word}: {format_loss(value)} at step {step:,.0f}"
    axes.plot(
        [step], [value], linestyle="none", marker="o", markersize=11, markerfacecolor="none",
        markeredgecolor=color, markeredgewidth=1.6, label=label, zorder=5,
    )  # fmt: skip


def _mark_kept(axes: Axes, curve: Curve, step: float | None) -> bool:
    """Mark the step whose adapter was kept, where that is not the lowest point: another figure chose it."""
    if step not in curve.steps or len(curve.steps) < 2 or step == curve.steps[curve.values.index(min(curve.values))]:
        return False
    axes.plot(
        [step], [curve.values[curve.steps.index(step)]], linestyle="none", marker="D", markersize=11,
        markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.4, label=f"adapter kept: step {step:,.0f}",
        zorder=5,
    )  # fmt: skip
    return True


def _draw_metrics(facts: Facts, axes: Axes) -> bool:
    found = shown_tasks(facts)[: len(TASK_LINES)]
    if not found:
        return False
    for task, (color, marker) in zip(found, TASK_LINES, strict=False):
        axes.plot(
            task.curve.steps, task.curve.values, color=color, linewidth=1.2, marker=marker, markersize=5,
            markeredgecolor="white", markeredgewidth=0.8, label=task.figure, zorder=4,
        )  # fmt: skip
    first, (color, _) = found[0], TASK_LINES[0]
    _mark_best(axes, first.curve, color=color, highest=first.better == "higher")
    base = dig_number(facts.evaluation, "base", first.figure)
    if base is not None:
        split = dig(facts.evaluation, "split") or "evaluated rows"
        label = f"{first.figure}\nof the base ({split})"
        axes.axhline(base, color=color, linestyle=(0, (5, 3)), linewidth=1.2, label=label)
    steps = [step for task in found for step in task.curve.steps]
    values = [value for task in found for value in task.curve.values] + ([] if base is None else [base])
    _finish(axes, steps, values, title="Task metrics", label=first.figure if len(found) == 1 else "", beside=True)
    return True


def _draw_learning_rate(facts: Facts, axes: Axes) -> bool:
    curve = read_curve(facts.metrics, "learning_rate")
    _draw_line(axes, curve, label="learning rate", smoothed=False)
    _finish(axes, curve.steps, curve.values, title="Learning rate", label="learning rate", from_zero=True)
    return bool(curve)


def _draw_gradient_norm(facts: Facts, axes: Axes) -> bool:
    curve = read_curve(facts.metrics, "grad_norm")
    _draw_line(axes, curve, label="gradient norm, before clipping")
    limit = dig_number(facts.config, "training", "max_grad_norm")
    values = list(curve.values)
    if limit:
        axes.axhline(limit, color=INK, linestyle=(0, (5, 3)), linewidth=1.2, label=f"clipped to {format_number(limit)}")
        values.append(limit)
    _finish(axes, curve.steps, values, title="Gradient norm", label="L2 norm", from_zero=True)
    return bool(curve)


def _draw_line(axes: Axes, curve: Curve, *, label: str, smoothed: bool = True) -> None:
    """Draw a curve: points while they are few, with a smoothed one over it where they are many."""
    if not curve:
        return
    count = len(curve.steps)
    if not smoothed or count < SMOOTH_FROM:
        size = 4 if count <= FEW_POINTS else 0
        axes.plot(curve.steps, curve.values, color=BLUE, linewidth=1.8, marker="o", markersize=size, label=label)
        return
    axes.plot(curve.steps, curve.values, color=LIGHT_BLUE, linewidth=0.8, label=label)
    axes.plot(curve.steps, smooth(curve.values), color=BLUE, linewidth=2.0, label="smoothed")


def _finish(
    axes: Axes,
    steps: list[float],
    values: list[float],
    *,
    title: str,
    label: str,
    from_zero: bool = False,
    beside: bool = False,
) -> None:
    """Set scales, ticks, names and the legend once everything is drawn."""
    if not steps:
        return
    spread = max(values) / float(numpy.median(values)) if min(values) > 0 else 1.0
    if spread > LOG_SCALE_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        label = f"{label} (log scale)"
    elif from_zero and min(values) >= 0:
        axes.set_ylim(0, max(values) * 1.08 or 1.0)
    if max(values) < SCIENTIFIC_BELOW or spread > LOG_SCALE_FROM:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
    else:
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if len(set(steps)) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)
    axes.tick_params(length=3)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(label)
    axes.set_title(title, loc="left", pad=12)
    handles, names = axes.get_legend_handles_labels()
    if beside:
        axes.legend(handles, names, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=10, borderaxespad=0.2,
                    handlelength=1.8, labelspacing=0.7)  # fmt: skip
    elif names != [title.lower()]:
        axes.legend(handles, names, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(handles), fontsize=10,
                    borderaxespad=0.2, handlelength=1.8, columnspacing=1.4)  # fmt: skip


PLOTS: dict[str, Callable[[Facts, Axes], bool]] = {
    "loss.png": _draw_loss,
    "metrics.png": _draw_metrics,
    "learning_rate.png": _draw_learning_rate,
    "gradient_norm.png": _draw_gradient_norm,
}
