"""Curves of a run against its steps, as PNG files.

Owns how the curves look. Uses matplotlib's object-oriented Agg interface only: no global figure,
no display, and the same bytes from the same metrics.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from loralab.reports.facts import Facts, dig, dig_number, load_facts
from loralab.reports.wording import format_loss, format_number
from loralab.run import RunFolder, replacing

# Okabe and Ito's palette, told apart with every common kind of colour blindness.
BLUE, LIGHT_BLUE, VERMILION, INK, GREY = "#0072B2", "#7FB8D8", "#D55E00", "#222222", "#6B6B6B"
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


def read_curve(metrics: list[dict[str, Any]], key: str) -> Curve:
    """Return the finite values of `key` by step; of a step logged twice (a resumed run), the last."""
    by_step: dict[float, float] = {}
    for row in metrics:
        step, value = dig_number(row, "step"), dig_number(row, key)
        if step is not None and value is not None:
            by_step[step] = value
    steps = sorted(by_step)
    return Curve(steps, [by_step[step] for step in steps])


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
    if validation:
        axes.plot(
            validation.steps, validation.values, color=VERMILION, linewidth=1.2, marker="o", markersize=5,
            markeredgecolor="white", markeredgewidth=0.8, label="validation", zorder=4,
        )  # fmt: skip
        _mark_best(axes, validation)
    base = dig_number(facts.evaluation, "base", "eval_loss")
    if base is not None:
        split = dig(facts.evaluation, "split") or "evaluated rows"
        axes.axhline(base, color=INK, linestyle=(0, (5, 3)), linewidth=1.2, label=f"base model ({split})")
    values = train.values + validation.values + ([] if base is None else [base])
    _finish(axes, train.steps + validation.steps, values, title="Loss", label="nats per supervised token")
    return True


def _mark_best(axes: Axes, validation: Curve) -> None:
    if len(validation.steps) < 2:
        return
    best = min(range(len(validation.values)), key=validation.values.__getitem__)
    step, value = validation.steps[best], validation.values[best]
    label = f"best: {format_loss(value)} at step {step:,.0f}"
    axes.plot(
        [step], [value], linestyle="none", marker="o", markersize=11, markerfacecolor="none",
        markeredgecolor=VERMILION, markeredgewidth=1.6, label=label, zorder=5,
    )  # fmt: skip


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
    axes: Axes, steps: list[float], values: list[float], *, title: str, label: str, from_zero: bool = False
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
    if names != [title.lower()]:
        axes.legend(handles, names, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(handles), fontsize=10,
                    borderaxespad=0.2, handlelength=1.8, columnspacing=1.4)  # fmt: skip


PLOTS: dict[str, Callable[[Facts, Axes], bool]] = {
    "loss.png": _draw_loss,
    "learning_rate.png": _draw_learning_rate,
    "gradient_norm.png": _draw_gradient_norm,
}
