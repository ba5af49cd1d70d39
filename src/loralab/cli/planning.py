"""The command `plan`: what a run would do, before it does it."""

from pathlib import Path
from typing import Annotated

import typer

from loralab.cli.application import print_json
from loralab.console import ConsoleReporter, ResultConsole
from loralab.options import AsJson, Overrides, usable_path


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.", callback=usable_path)],
    overrides: Overrides = None,
    *,
    no_probe: Annotated[
        bool,
        typer.Option("--no-probe", help="Load no weights: memory is counted, time is not given."),
    ] = False,
    num_processes: Annotated[
        int,
        typer.Option("--num-processes", min=1, help="Processes on this machine; memory is that of each. No probe."),
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Show what `train` would do: parameters, steps, tokens, memory, time and disk.

    Exit code 0 whether it fits or not; a script reads `fits` of --json.
    """
    from loralab.workflows.configure import load_run_config

    loaded = load_run_config(config, list(overrides or []))
    from loralab.cli.plan_text import print_plan
    from loralab.workflows.plan import plan as make_plan

    result = make_plan(loaded, probe=not no_probe, reporter=ConsoleReporter(), processes=num_processes)
    if as_json:
        print_json(result)
    else:
        print_plan(ResultConsole(highlight=False), result)
