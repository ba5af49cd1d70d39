"""The commands that measure an adapter and show what was measured: `eval`, `report`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from loralab.cli.application import print_json
from loralab.console import ConsoleReporter, ResultConsole
from loralab.errors import ConfigError
from loralab.options import (
    AsJson,
    BaseModel,
    BatchSize,
    Device,
    MaxLength,
    Overrides,
    RunPath,
    Split,
    option_overrides,
    usable_path,
)


def evaluate(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN]", help="Run folder, or an adapter folder.", callback=usable_path),
    ] = None,
    overrides: Overrides = None,
    *,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="The same as RUN, as an option.", callback=usable_path)
    ] = None,
    model: BaseModel = None,
    data: Annotated[
        str | None, typer.Option("--data", help="File, saved data set or Hub id to evaluate on, instead of the run's.")
    ] = None,
    split: Split = None,
    batch_size: BatchSize = None,
    max_length: MaxLength = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure loss and perplexity of base and adapter on a split."""
    if adapter is not None and run is not None and "=" in str(run):
        run, overrides = None, [str(run), *(overrides or [])]  # with --adapter, RUN's place holds an override
    target = _one_target(run, adapter)
    own_split = split if data is None else None  # of other data, `split` names one of its own
    chosen = option_overrides(overrides, batch_size=batch_size, max_length=max_length, device=device, split=own_split)
    from loralab.workflows.evaluate import evaluate as run_evaluation

    result = run_evaluation(
        target, overrides=chosen, base_model=model, data=data, data_split=split, reporter=ConsoleReporter()
    )
    if as_json:
        print_json(result)
        return
    table = Table("", "base", "adapter")
    for name in ("eval_loss", "perplexity", "eval_loss_batch_mean", "supervised_tokens", "num_examples", "num_batches"):
        table.add_row(name, _figure(result["base"][name]), _figure(result[name]))
    console = ResultConsole()
    console.print(table)
    console.print(_difference(result["difference"]))


def _one_target(run: Path | None, adapter: Path | None) -> Path:
    given = [path for path in (run, adapter) if path is not None]
    if len(given) != 1:
        what = "two adapters given" if given else "no adapter given"
        raise ConfigError(what, where="arguments RUN, --adapter", fix="give one: loralab eval RUN, or --adapter DIR")
    return given[0]


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _difference(difference: dict[str, Any]) -> str:
    text = f"adapter - base: {difference['eval_loss']:+.4f} nats per token"
    if difference["low"] is None:
        return text
    interval = f"{difference['level']:.0%} interval {difference['low']:+.4f} to {difference['high']:+.4f}"
    verdict = "" if difference["low"] > 0 or difference["high"] < 0 else "; no difference seen"
    return f"{text}, {interval}{verdict}"


def report(run: RunPath) -> None:
    """Rebuild plots, page and model card from the run folder."""
    from loralab.run import open_run
    from loralab.workflows.report import build_report

    folder = open_run(run)
    build_report(folder)
    print(folder.report)
