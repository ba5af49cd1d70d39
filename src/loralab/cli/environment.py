"""The commands that look without training: `doctor` at the machine, `inspect` at an adapter."""

from typing import Annotated

import typer

from loralab.cli.application import print_json
from loralab.console import ConsoleReporter, ResultConsole
from loralab.options import AsJson, RunPath


def doctor(
    *,
    no_step: Annotated[bool, typer.Option("--no-step", help="Leave out the LoRA steps.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look at this machine: facts, findings with a fix each, and a proven LoRA step on every device.

    Exit code: 0 when no problem was found, 2 when there is one to mend, 3 when a step failed or computed wrong.
    """
    from loralab.cli.doctor_text import print_diagnosis
    from loralab.workflows.doctor import examine

    result = examine(steps=not no_step, reporter=ConsoleReporter())
    if as_json:
        print_json(result)
    else:
        print_diagnosis(ResultConsole(highlight=False), result)
    if result["exit_code"]:
        raise typer.Exit(result["exit_code"])


def inspect(
    run: RunPath,
    *,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="BASE", help="Also compare with this base model; no weights are loaded."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what an adapter is: base, rank, layers with the norm of B (0 = never trained), what matches nothing."""
    from loralab.cli.inspect_text import print_adapter
    from loralab.workflows.inspect import inspect_adapter

    result, tensors = inspect_adapter(run)
    if model is not None:
        from loralab.workflows.inspect_base import attach

        attach(result, tensors, model)
    if as_json:
        print_json(result)
    else:
        print_adapter(ResultConsole(highlight=False), result)
