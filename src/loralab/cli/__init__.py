"""The command line: arguments in, exit code out.

Owns options, exit codes and what is printed. Each command imports its workflow when it runs,
so that help and configuration errors never wait for torch.
"""

import logging
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from loralab import __version__
from loralab.cli import (
    asking,
    comparing,
    data,
    environment,
    exporting,
    judging,
    launching,
    measuring,
    merging,
    planning,
    previewing,
    sharing,
    start,
    sweeping,
    training,
)
from loralab.cli.application import app, leave
from loralab.console import ClosedOutput, ConsoleReporter, discard, printable, speaks, tolerate_characters
from loralab.errors import LoralabError

# What a shell gives for a process that ended because nobody reads its output (128 + SIGPIPE).
CLOSED_OUTPUT_CODE = 141

# The commands under their headings, in the order that `--help` shows.
COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Start": {
        "demo": start.demo,
        "doctor": environment.doctor,
        "recipes": start.recipes,
        "init": start.init,
        "schema": start.schema,
    },
    "Data": {"preview": previewing.preview, "prepare": data.prepare},
    "Train": {
        "plan": planning.plan,
        "train": training.train,
        "sweep": sweeping.sweep,
        "launch": launching.launch,
        "replay": training.replay,
    },
    "Measure": {
        "inspect": environment.inspect,
        "eval": measuring.evaluate,
        "compare": comparing.compare,
        "judge": judging.judge,
        "report": measuring.report,
    },
    "Ask": {"generate": asking.generate, "chat": asking.chat},
    "Share": {"push": sharing.push, "merge": merging.merge, "export": exporting.export},
}


def _show_version(asked: bool) -> None:
    if asked:
        print(f"loralab {__version__}")
        raise typer.Exit


@app.callback()
def _before_the_command(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """LoRA fine-tuning that proves what it claims: train, evaluate, compare, use."""


for _heading, _commands in COMMANDS.items():
    for _name, _command in _commands.items():
        app.command(name=_name, rich_help_panel=_heading)(_command)


def main() -> None:
    """Run the command line and exit with its code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("loralab").setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that nothing here uses
    tolerate_characters()
    try:
        app()
    except LoralabError as error:
        ConsoleReporter.close()
        if speaks(error):
            print(printable(str(error), sys.stderr), file=sys.stderr)
        leave(error.exit_code)
    except ClosedOutput:
        ConsoleReporter.close()
        discard(sys.stdout)
        sys.exit(CLOSED_OUTPUT_CODE)
