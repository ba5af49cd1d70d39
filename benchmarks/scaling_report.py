"""What `scaling.py` shows: tables, a plot and a JSON file."""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from contest_report import machine

BLUE, GREY, ORANGE = "#1b6ca8", "#8a97a1", "#d1772f"
# Of all stages in the order of a run, those behind the first step last.
AFTER = ("checkpoint", "final evaluation", "report", "end of the process")
Line = dict[str, Any]


def _gib(amount: float | None) -> str:
    return "" if amount is None else f"{amount / 2**30:.3f}"


def _data_bytes(line: Line) -> float:
    return float(line["parts"].get("data", 0))


ROW_COLUMNS: dict[str, Callable[[Line], str]] = {
    "rows": lambda line: f"{line['rows']:,}",
    "read and tokenize, s": lambda line: f"{line['data_seconds']:.2f}",
    "plan, s": lambda line: f"{line['planning_seconds']:.2f}",
    "start to training loop, s": lambda line: f"{line['to_training_seconds']:.1f}",
    "s per 1,000 tokens": lambda line: f"{line['seconds_per_1000_tokens']:.3f}",
    "memory, GiB": lambda line: _gib(line["memory_bytes"]),
    "of it tokenizer and rows": lambda line: _gib(_data_bytes(line)),
    "VmHWM, GiB": lambda line: _gib(line["peak_rss_bytes"]),
}
LENGTH_COLUMNS: dict[str, Callable[[Line], str]] = {
    "budget": lambda line: (
        f"{line['budget']} ({line['token_budget']:,})" if line["budget"] == "auto" else f"{line['token_budget']:,}"
    ),
    "length": lambda line: f"{line['length']:,}",
    "batch": lambda line: str(line["batch"]),
    "tokens/s (range)": lambda line: (
        f"{line['tokens_per_second']:,.0f} ({line['range'][0]:,.0f} to {line['range'][1]:,.0f})"
    ),
    "MFLOP a token": lambda line: f"{sum(line['mflop_per_token'].values()):.0f}",
    "of it attention": lambda line: f"{line['mflop_per_token']['attention']:.0f}",
    "GFLOP/s": lambda line: f"{line['gflops']:.1f}",
    "of the shortest's": lambda line: f"{line['of_shortest']:.2f}",
    "memory, GiB": lambda line: _gib(line["memory_bytes"]),
    "predicted": lambda line: _gib(line["predicted_bytes"]),
    "VmHWM, GiB": lambda line: _gib(line["peak_rss_bytes"]),
}


def render_tables(found: dict[str, Any], *, note: str) -> str:
    """Return all parts that were measured, as Markdown."""
    sections = []
    if "rows" in found:
        sections += ["## Rows", "", *_table(ROW_COLUMNS, found["rows"]), ""]
    if "lengths" in found:
        sections += ["## Lengths", "", *_table(LENGTH_COLUMNS, _compared(found["lengths"])), "", note, ""]
    for line in found.get("start", []):
        low, high = line["range"]
        sections += [
            "## Start",
            "",
            f"From the start of the process to the end of the first step: {line['to_first_step_seconds']:.1f} s "
            f"({low:.1f} to {high:.1f}); whole process {line['process_seconds']:.1f} s.",
            "",
            "| stage | seconds |",
            "|---|---|",
            *(f"| {stage} | {seconds:.2f} |" for stage, seconds in _stages(line)),
        ]
    return "\n".join(sections)


def _table(columns: dict[str, Callable[[Line], str]], lines: Sequence[Line]) -> list[str]:
    rows = [f"| {' | '.join(cell(line) for cell in columns.values())} |" for line in lines]
    return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *rows]


def _compared(lines: Sequence[Line]) -> list[Line]:
    """Return the lines with their rate as a share of that of the shortest rows under the same budget."""
    shortest: dict[str, Line] = {}
    for line in sorted(lines, key=lambda line: int(line["length"])):
        shortest.setdefault(line["budget"], line)
    return [{**line, "of_shortest": line["gflops"] / shortest[line["budget"]]["gflops"]} for line in lines]


def _stages(line: Line) -> list[tuple[str, float]]:
    """Return stages and seconds, in the order in which they were first seen, those behind the first step last."""
    return sorted(line["stages"].items(), key=lambda item: item[0] in AFTER)


def _by_budget(axes: Axes, lines: Sequence[Line], key: str, *, scale: float = 1.0) -> None:
    budgets = dict.fromkeys(line["budget"] for line in lines)
    for budget, (colour, mark) in zip(budgets, itertools.cycle(((BLUE, "o"), (ORANGE, "s"))), strict=False):
        chosen = [line for line in lines if line["budget"] == budget]
        lengths, values = [line["length"] for line in chosen], [line[key] / scale for line in chosen]
        axes.plot(lengths, values, color=colour, marker=mark, label=f"budget {budget}", alpha=0.85)


def _draw_lengths(top: Sequence[Axes], lines: Sequence[Line]) -> None:
    titles = ("tokens/s by length", "counted GFLOP/s by length", "peak memory by length, GiB")
    keys = (("tokens_per_second", 1.0), ("gflops", 1.0), ("memory_bytes", 2.0**30))
    for axes, title, (key, scale) in zip(top, titles, keys, strict=True):
        _by_budget(axes, lines, key, scale=scale)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xscale("log", base=2)
        lengths = sorted({line["length"] for line in lines})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=8)
        axes.set_xlabel("tokens of a row")
    _, high = top[1].get_ylim()
    base = _compared(lines)[0]["gflops"]
    top[1].axhspan(0.85 * base, 1.15 * base, color=GREY, alpha=0.2, linewidth=0, label="within 15 % of the shortest")
    top[1].set_ylim(0, max(high, 1.3 * base))
    for axes in top:
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8, frameon=False)


def _draw_rows(memory: Axes, speed: Axes, lines: Sequence[Line]) -> None:
    counts = [line["rows"] for line in lines]
    memory.plot(counts, [line["memory_bytes"] / 2**30 for line in lines], color=BLUE, marker="o", label="measured")
    own = [_data_bytes(line) / 2**30 for line in lines]
    memory.plot(counts, own, color=GREY, marker="s", label="of it tokenizer and rows")
    memory.set_title("peak memory by rows, GiB", loc="left", fontsize=10)
    speed.plot(counts, [line["seconds_per_1000_tokens"] for line in lines], color=BLUE, marker="o", label="training")
    per_row = [1000 * line["data_seconds"] / line["rows"] for line in lines]
    speed.plot(counts, per_row, color=GREY, marker="s", label="reading and tokenizing, per 1,000 rows")
    speed.set_title("seconds per 1,000 tokens by rows", loc="left", fontsize=10)
    for axes in (memory, speed):
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [f"{count:,}" for count in counts], fontsize=8)
        axes.set_xlabel("rows of the data set")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8, frameon=False)


def _draw_start(axes: Axes, line: Line) -> None:
    stages = _stages(line)[::-1]
    names, seconds = [name for name, _ in stages], [value for _, value in stages]
    axes.barh(names, seconds, color=[GREY if name in AFTER else BLUE for name in names])
    for place, value in enumerate(seconds):
        axes.text(value, place, f" {value:.2f}", va="center", fontsize=8)
    axes.set_xlim(0, max(seconds) * 1.2)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("seconds; grey: behind the first step")
    axes.set_title(f"start: {line['to_first_step_seconds']:.1f} s to the first step", loc="left", fontsize=10)


def draw_plot(found: dict[str, Any], path: Path) -> None:
    """Write one picture of all parts that were measured."""
    mpl.use("Agg")
    figure, (top, bottom) = plt.subplots(2, 3, figsize=(13, 7.5), layout="constrained")
    for axes in (*top, *bottom):
        axes.spines[["top", "right"]].set_visible(False)
    parts = {"lengths": top, "rows": bottom[:2], "start": bottom[2:]}
    for part, panels in parts.items():
        for axes in panels:
            axes.set_visible(part in found)
    if "lengths" in found:
        _draw_lengths(top, found["lengths"])
    if "rows" in found:
        _draw_rows(bottom[0], bottom[1], found["rows"])
    if "start" in found:
        _draw_start(bottom[2], found["start"][0])
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_report(found: dict[str, Any], *, note: str, folder: Path) -> None:
    """Write `scaling.json`, `scaling.md` and `scaling.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine(), "counted": note, **found}
    (folder / "scaling.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    (folder / "scaling.md").write_text(render_tables(found, note=note) + "\n", encoding="utf-8")
    draw_plot(found, folder / "scaling.png")
