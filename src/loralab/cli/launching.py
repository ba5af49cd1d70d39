"""The command `launch`: `train` as several processes, on one machine or several."""

import os
from pathlib import Path
from typing import Annotated

import typer

from loralab.cli.application import leave
from loralab.cli.training import CONFIG_ARGUMENT, WarmStart, check_train_options, run_source
from loralab.config.distributed_checks import RANK_VARIABLES
from loralab.console import ConsoleReporter
from loralab.options import AsJson, Overrides


def launch(
    config: Annotated[Path, CONFIG_ARGUMENT],
    overrides: Overrides = None,
    *,
    num_processes: Annotated[
        int | None,
        typer.Option("--num-processes", min=1, help="Processes on this machine; by default one per visible GPU."),
    ] = None,
    num_machines: Annotated[int, typer.Option("--num-machines", min=1, help="Machines that share the run.")] = 1,
    machine_rank: Annotated[
        int | None, typer.Option("--machine-rank", min=0, help="Number of this machine, from 0.")
    ] = None,
    main_address: Annotated[
        str | None,
        typer.Option("--main-address", metavar="HOST:PORT", help="Machine 0 and a free port there; the same on all."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    warm_start: WarmStart = None,
    as_json: AsJson = False,
) -> None:
    """Train in several processes: `train`, once for each GPU.

    One Ctrl-C reaches all of them: they write one checkpoint and end. The exit code is that of the run.
    """
    from loralab.workflows.configure import load_run_config

    for name in RANK_VARIABLES:  # of a cluster that numbers its machines so: this is no process of a run yet
        os.environ.pop(name, None)
    check_train_options(resume=resume, overwrite=overwrite)
    loaded = load_run_config(*run_source(config, overrides))
    from loralab.workflows.launch import launch as start
    from loralab.workflows.launch import resolve_processes
    from loralab.workflows.machines import resolve_machines

    reporter = ConsoleReporter()
    machines = resolve_machines(num_machines, machine_rank, main_address)
    processes = resolve_processes(num_processes, loaded.config)
    reporter.say(f"processes: {processes.value} ({processes.reason})")
    flags = [
        *(["--resume"] if resume else []),
        *(["--overwrite"] if overwrite else []),
        *(["--warm-start", str(warm_start)] if warm_start is not None else []),
        *(["--json"] if as_json else []),
    ]
    arguments = ["train", str(config), *(overrides or []), *flags]
    code = start(arguments, loaded.config, processes=processes.value, machines=machines, reporter=reporter)
    if code:
        leave(code)
