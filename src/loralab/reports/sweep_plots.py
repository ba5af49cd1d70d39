"""Pictures of a sweep, as PNG bytes: the metric against each setting, over two of them, and all validation losses."""

import io
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from loralab.reports.curves import read_curve
from loralab.reports.plots import BLUE, DOTS_PER_INCH, GREY, INK, SIZE_INCHES, STYLE, VERMILION
from loralab.reports.sweep_reading import as_number, shorten
from loralab.reports.wording import format_measured, format_number
from loralab.run import RunFolder, read_metrics

# From this ratio between neighbours on average, values are tried on a log scale.
_LOG_FROM = 8.0
_MOST_CELLS = 20
_NAMED_LINES = 10
# Between runs with the same value, so that one does not hide another; in points, and for all of them together.
_STEP_POINTS, _SPREAD_POINTS = 9.0, 36.0
# Below this ratio a log axis names more than its powers of ten.
_SHORT_LOG = 200.0
# Characters below an axis before they touch.
_ROOM = 80
_MOST_DIGITS = 6
_NO_RUN = "#e6e6e6"


def own_style() -> AbstractContextManager[Any]:
    """Return a context that draws by matplotlib's defaults and the reports' style, whatever matplotlibrc says."""
    style: dict[Any, Any] = {k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith("backend")}
    return matplotlib.rc_context(style | STYLE)


def draw(act: Callable[[Axes, Figure], None]) -> bytes:
    """Return a picture that `act` draws."""
    with own_style():
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.14)
        figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout=layout)
        act(figure.add_subplot(), figure)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def draw_setting(runs: list[Mapping[str, Any]], key: str, *, metric: str, best: str) -> bytes:
    """Return the metric of complete runs against one setting.

    Args:
        runs: complete ones.
        key: the setting.
        metric: its name.
        best: name of the best run.
    """
    texts = [entry["settings"][key] for entry in runs]
    numbers = [as_number(text) for text in texts]
    numeric = None not in numbers
    order = list(dict.fromkeys(texts))
    places = [number if numeric and number is not None else float(order.index(text))
              for text, number in zip(texts, numbers, strict=True)]  # fmt: skip

    def act(axes: Axes, figure: Figure) -> None:
        for entry, place in zip(runs, places, strict=True):  # unseen: what is moved aside sets no bounds
            values = entry["interval"] or [entry["metric"]]
            axes.plot([place] * len(values), values, linestyle="none")
        for entry, place, points in zip(runs, places, _apart(places), strict=True):
            color = VERMILION if entry["name"] == best else BLUE
            aside = axes.transData + ScaledTranslation(points / 72, 0, figure.dpi_scale_trans)
            if entry["interval"]:
                axes.plot([place, place], entry["interval"], color=color, linewidth=1.0, alpha=0.55, transform=aside)
            axes.plot(
                [place], [entry["metric"]], marker="o", markersize=6, color=color, linestyle="none", zorder=4,
                transform=aside,
            )  # fmt: skip
        _scale(axes, dict(zip(places, texts, strict=True)), numeric=numeric)
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        axes.set_xlabel(key)
        axes.set_ylabel(metric)
        axes.set_title(f"{metric} against {key}", loc="left", pad=12)

    return draw(act)


def _apart(places: list[float]) -> list[float]:
    """Return how far each run is moved aside, in points, from others with the same value."""
    found = []
    for number, place in enumerate(places):
        alike = places.count(place)
        step = min(_STEP_POINTS, _SPREAD_POINTS / alike)
        found.append((places[:number].count(place) - (alike - 1) / 2) * step)
    return found


def _scale(axes: Axes, ticks: Mapping[float, str], *, numeric: bool) -> None:
    """Name values as they were given, where there is room for all, and choose the scale of numbers."""
    low, high = min(ticks), max(ticks)
    if numeric and low > 0 and high / low >= _LOG_FROM:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < _SHORT_LOG else (1.0,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
    if len(ticks) <= _NAMED_LINES:
        names = [shorten(text) for text in ticks.values()]
        slanted = max(map(len, names)) * len(names) > _ROOM
        axes.set_xticks(list(ticks), names, rotation=20 if slanted else 0, ha="right" if slanted else "center")
    if len(ticks) == 1 or not numeric:  # what is moved aside must not leave the picture
        axes.set_xlim(low - 0.5, high + 0.5)
    else:
        axes.margins(x=0.08)


def draw_map(runs: list[Mapping[str, Any]], keys: tuple[str, str], *, metric: str, lower: bool) -> bytes | None:
    """Return the metric over two settings as a map, or None where there are too many values of one.

    Args:
        runs: all; of several at one place the mean is shown, where none is complete the state of the last.
        keys: the settings, downwards and to the right.
        metric: its name.
        lower: whether lower is better, which is drawn darker.
    """
    sides = [_ordered(list(dict.fromkeys(entry["settings"][key] for entry in runs))) for key in keys]
    if max(map(len, sides)) > _MOST_CELLS or min(map(len, sides)) < 2:
        return None
    cells: dict[tuple[int, int], list[float]] = {}
    states: dict[tuple[int, int], str] = {}
    for entry in runs:
        place = (sides[0].index(entry["settings"][keys[0]]), sides[1].index(entry["settings"][keys[1]]))
        if entry["status"] == "completed":
            cells.setdefault(place, []).append(entry["metric"])
        else:
            states[place] = entry["status"]
    means = {place: sum(values) / len(values) for place, values in cells.items()}

    def act(axes: Axes, figure: Figure) -> None:
        grid = [
            [means.get((row, column), float("nan")) for column in range(len(sides[1]))] for row in range(len(sides[0]))
        ]
        colors = matplotlib.colormaps["Blues_r" if lower else "Blues"].with_extremes(bad=_NO_RUN)
        image = axes.imshow(grid, cmap=colors, aspect="auto")
        low, high = min(means.values()), max(means.values())
        digits = min(max(2 - math.floor(math.log10(high - low)), 0), _MOST_DIGITS) if high > low else None
        for (row, column), value in means.items():
            share = (value - low) / (high - low or 1.0)
            dark = share < 0.45 if lower else share > 0.55
            text = format_measured(value) if digits is None else f"{value:.{digits}f}"
            axes.text(column, row, text, ha="center", va="center", color="white" if dark else INK)
        for (row, column), state in states.items():
            if (row, column) not in means:
                axes.text(column, row, state, ha="center", va="center", color=GREY)
        names = [[shorten(value) for value in side] for side in sides]
        slanted = max(map(len, names[1])) * len(names[1]) > _ROOM
        axes.set_xticks(
            range(len(sides[1])), names[1], rotation=20 if slanted else 0, ha="right" if slanted else "center"
        )
        axes.set_yticks(range(len(sides[0])), names[0])
        axes.grid(False)
        axes.set_xlabel(keys[1])
        axes.set_ylabel(keys[0])
        axes.set_title(f"{metric} over both settings", loc="left", pad=12)
        figure.colorbar(image, ax=axes, label=metric)

    return draw(act)


def _ordered(values: list[str]) -> list[str]:
    if any(as_number(value) is None for value in values):
        return values
    return sorted(values, key=float)


def draw_curves(folder: Path, runs: list[Mapping[str, Any]], *, best: str) -> bytes | None:
    """Return the validation losses of all runs against their steps, or None where none has any.

    Args:
        folder: of the sweep.
        runs: complete ones.
        best: name of the best run, which stands out.
    """
    curves = {
        entry["name"]: read_curve(read_metrics(RunFolder(folder / entry["name"]).metrics), "eval_loss")
        for entry in runs
    }
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return None
    few = len(curves) <= _NAMED_LINES
    labels = {entry["name"]: f"{entry['number']:03}: {_values(entry)}" for entry in runs}

    def act(axes: Axes, _figure: Figure) -> None:
        palette = matplotlib.colormaps["viridis"]
        for place, (name, curve) in enumerate(curves.items()):
            first = name == best
            color = VERMILION if first else palette(0.9 * place / max(len(curves) - 1, 1)) if few else GREY
            axes.plot(
                curve.steps, curve.values, color=color, linewidth=2.2 if first else 1.1, marker="o",
                markersize=5 if first else 3.5, label=labels[name] if few or first else None, zorder=5 if first else 3,
            )  # fmt: skip
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("nats per supervised token")
        axes.set_title("Validation loss", loc="left", pad=12)
        keys = ", ".join(key.rpartition(".")[2] for key in runs[0]["settings"])
        axes.legend(
            title=f"run: {keys}",
            alignment="left",
            title_fontsize=9,
            loc="upper left",
            bbox_to_anchor=(1.01, 1.0),
            fontsize=9,
            borderaxespad=0.2,
            handlelength=1.8,
        )

    return draw(act)


def _values(entry: Mapping[str, Any]) -> str:
    return ", ".join(shorten(value) for value in entry["settings"].values())
