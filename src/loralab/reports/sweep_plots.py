"""Pictures of a sweep, as PNG bytes: the metric against each setting, over two of them, and all validation losses."""

import io
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import NullFormatter

from loralab.reports.curves import read_curve
from loralab.reports.plots import BLUE, DOTS_PER_INCH, GREY, INK, SIZE_INCHES, STYLE, VERMILION
from loralab.reports.sweep_reading import as_number
from loralab.reports.wording import format_measured, format_number
from loralab.run import RunFolder, read_metrics

# From this ratio between neighbours on average, values are tried on a log scale.
_LOG_FROM = 8.0
_MOST_CELLS = 20
_NAMED_LINES = 10


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

    def act(axes: Axes, _figure: Figure) -> None:
        numbers = [as_number(entry["settings"][key]) for entry in runs]
        texts = list(dict.fromkeys(entry["settings"][key] for entry in runs))
        numeric = None not in numbers
        places = [n if n is not None else 0.0 for n in numbers] if numeric else [
            float(texts.index(entry["settings"][key])) for entry in runs
        ]  # fmt: skip
        for entry, place in zip(runs, places, strict=True):
            value, color = entry["metric"], VERMILION if entry["name"] == best else BLUE
            if entry["interval"]:
                axes.plot([place, place], entry["interval"], color=color, linewidth=1.0, alpha=0.55)
            axes.plot([place], [value], marker="o", markersize=7, color=color, linestyle="none", zorder=4)
        ticks = sorted(set(places))
        if numeric and ticks[0] > 0 and ticks[-1] / ticks[0] >= _LOG_FROM:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        if len(ticks) <= _NAMED_LINES:
            axes.set_xticks(ticks, [format_number(t) for t in ticks] if numeric else texts)
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        axes.set_xlabel(key)
        axes.set_ylabel(metric)
        axes.set_title(f"{metric} against {key}", loc="left", pad=12)

    return draw(act)


def draw_map(runs: list[Mapping[str, Any]], keys: tuple[str, str], *, metric: str, lower: bool) -> bytes | None:
    """Return the metric over two settings as a map, or None where there are too many values of one.

    Args:
        runs: complete ones; of several at one place the mean is shown.
        keys: the settings, downwards and to the right.
        metric: its name.
        lower: whether lower is better, which is drawn darker.
    """
    sides = [_ordered(list(dict.fromkeys(entry["settings"][key] for entry in runs))) for key in keys]
    if max(map(len, sides)) > _MOST_CELLS or min(map(len, sides)) < 2:
        return None
    cells: dict[tuple[int, int], list[float]] = {}
    for entry in runs:
        place = (sides[0].index(entry["settings"][keys[0]]), sides[1].index(entry["settings"][keys[1]]))
        cells.setdefault(place, []).append(entry["metric"])
    means = {place: sum(values) / len(values) for place, values in cells.items()}

    def act(axes: Axes, figure: Figure) -> None:
        grid = [
            [means.get((row, column), float("nan")) for column in range(len(sides[1]))] for row in range(len(sides[0]))
        ]
        image = axes.imshow(grid, cmap="Blues_r" if lower else "Blues", aspect="auto")
        low, high = min(means.values()), max(means.values())
        for (row, column), value in means.items():
            share = (value - low) / (high - low or 1.0)
            dark = share < 0.45 if lower else share > 0.55
            axes.text(column, row, format_measured(value), ha="center", va="center", color="white" if dark else INK)
        axes.set_xticks(range(len(sides[1])), sides[1])
        axes.set_yticks(range(len(sides[0])), sides[0])
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

    def act(axes: Axes, _figure: Figure) -> None:
        palette = matplotlib.colormaps["viridis"]
        for place, (name, curve) in enumerate(curves.items()):
            first = name == best
            color = VERMILION if first else palette(0.9 * place / max(len(curves) - 1, 1)) if few else GREY
            axes.plot(
                curve.steps, curve.values, color=color, linewidth=2.2 if first else 1.1, marker="o",
                markersize=5 if first else 3.5, label=name if few or first else None, zorder=5 if first else 3,
            )  # fmt: skip
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel("nats per supervised token")
        axes.set_title("Validation loss", loc="left", pad=12)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9, borderaxespad=0.2, handlelength=1.8)

    return draw(act)
