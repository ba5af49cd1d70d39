"""The command `sweep`: one configuration trained at several points of a space."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from loralab.cli.application import print_json
from loralab.console import ConsoleReporter, ResultConsole
from loralab.options import AsJson, usable_path
from loralab.reports.sweep_reading import shorten
from loralab.reports.wording import format_bytes, format_count, format_interval, format_measured, format_seconds

_LEAST_WIDTH = 110


def sweep(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.", callback=usable_path)],
    given: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SETTINGS]...",
            help="section.key=value holds for every run; section.key=V1,V2 or LOW..HIGH varies, as with --grid.",
        ),
    ] = None,
    *,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", help="section.key=V1,V2,V3, or LOW..HIGH with --random; may be repeated."),
    ] = None,
    random: Annotated[
        int | None,
        typer.Option(
            "--random", min=1, help="Points to draw, 1,000 at most; by default every point of the grid is taken."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the drawing with --random.")] = 0,
    metric: Annotated[
        str,
        typer.Option("--metric", help="Figure of the final evaluation that decides, measured on the validation split."),
    ] = "eval_loss",
    mode: Annotated[
        Literal["min", "max"] | None,
        typer.Option("--mode", help="Which direction is better; by default known by the metric."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="Folder of the sweep; by default sweeps/<name of CONFIG>, of RUN where that is RUN/config.yaml.",
            callback=usable_path,
        ),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run again what failed before; by default it stays failed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train every point of a grid, or random points: each a run folder, one table. The same command again goes on.

    Example: loralab sweep run.yaml --grid lora.r=8,16 --grid training.learning_rate=1e-4,2e-4
    """
    from loralab.workflows.sweep import Search, check_all_completed
    from loralab.workflows.sweep import sweep as run_sweep

    search = Search(
        config, grid or [], given or [], random=random, seed=seed, metric=metric, mode=mode, output=output,
        retry_failed=retry_failed,
    )  # fmt: skip
    result = run_sweep(search, reporter=ConsoleReporter())
    if as_json:
        print_json(result)
    else:
        _print_sweep(result)
    check_all_completed(result)


def _print_sweep(result: dict[str, Any]) -> None:
    console = ResultConsole(highlight=False)
    console.width = max(console.width, _LEAST_WIDTH)  # cells that are cut would be no figures
    keys = list(result["space"])
    table = Table(box=None, pad_edge=False)
    for name in ("run", *keys):
        table.add_column(name.rpartition(".")[2])
    for name in (result["metric"], "95 % interval", "time", "memory", "trainable", "steps"):
        table.add_column(name, justify="right")
    order = {name: place for place, name in enumerate(result["reading"]["order"])}
    for entry in sorted(result["runs"], key=lambda each: (order.get(each["name"], len(order)), each["number"])):
        settings = [Text(shorten(entry["settings"][key])) for key in keys]  # lists in brackets are no markup
        if entry["status"] == "completed":
            low, high = entry["interval"] or (None, None)
            figures = [
                format_measured(entry["metric"], low, high),
                format_interval(low, high),
                format_seconds(entry["train_seconds"]),
                format_bytes(entry["peak_memory_bytes"]),
                format_count(entry["trainable_parameters"]),
                format_count(entry["steps"]),
            ]
        else:
            figures = [entry["status"]]
        table.add_row(f"{entry['number']:03}", *settings, *figures)
    console.print(table)
    if result["reading"]["best"]:
        console.print(f"best: {Path(result['folder']) / result['reading']['best']}", soft_wrap=True, markup=False)
    for caution in result["reading"]["cautions"]:
        console.print(f"note: {caution}", soft_wrap=True, markup=False)
    console.print(f"page: {Path(result['folder']) / 'sweep.html'}", soft_wrap=True, markup=False)
