"""The commands about data, without a model: `prepare`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from loralab.cli.application import print_json
from loralab.console import ConsoleReporter, ResultConsole
from loralab.options import AsJson, Overrides, usable_path


def prepare(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.", callback=usable_path)],
    overrides: Overrides = None,
    *,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder to write; prepared/NAME by default.", callback=usable_path),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the prepared data in the folder.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the data as a tokenized folder, which `data.train` can name."""
    from loralab.workflows.configure import load_run_config

    loaded = load_run_config(config, overrides or [])
    from loralab.workflows.prepare import prepare as run_preparation

    reporter = ConsoleReporter()
    result = run_preparation(loaded, output, overwrite=overwrite, reporter=reporter)
    if as_json:
        print_json(result)
        return
    table = Table("split", "rows", "tokens", "supervised tokens")
    for name, facts in result["splits"].items():
        table.add_row(name, *(f"{facts[key]:,}" for key in ("rows", "tokens", "supervised_tokens")))
    ResultConsole().print(table)
    settings = [
        f"data.train={result['path']}",
        *(f"data.{name}={name}" for name in result["splits"] if name != "train"),
    ]
    reporter.say(f"train on it with {' '.join([*settings, f'data.max_length={loaded.config.data.max_length}'])}")
    print(result["path"])
