"""The command line as a whole: what holds for every command.

Owns the application that commands are added to, what happens when nobody reads stdout any more, how a process
ends with an exit code, and how `--json` is printed.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from loralab.console import ClosedOutput, nobody_reads
from loralab.run import render_json


class _Commands(TyperGroup):
    """The commands; a closed stdout comes out as `ClosedOutput`, not as an exit code that means a bug."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        """Read the arguments; `--help` prints here."""
        with _watching_output():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with _watching_output():
            return super().invoke(ctx)


@contextmanager
def _watching_output() -> Iterator[None]:
    try:
        yield
        if sys.stdout is not None:  # as after `>&-`
            sys.stdout.flush()
    except BrokenPipeError as error:
        if nobody_reads(sys.stdout):
            raise ClosedOutput from None
        # typer would take any broken pipe for the output's, and end without a word.
        raise RuntimeError("the pipe to another process broke") from error
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # how rich, which writes the help, ends
            raise ClosedOutput from None
        raise


@contextmanager
def result_alone_on_stdout() -> Iterator[None]:
    """Send to stderr what libraries print meanwhile, as deepspeed does wherever it is installed."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def leave(code: int) -> NoReturn:
    """End this process with an exit code, once all that it said is written.

    A process that fails while it is one of several ends without Python's own shutdown: a thread of gloo that lets
    go of the tensor of its last sum meanwhile would abort it, and the code would be lost.
    """
    distributed = sys.modules.get("torch.distributed")  # not imported here: most commands never need torch
    if distributed is not None and distributed.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # as after `>&-`
                with contextlib.suppress(OSError):
                    stream.flush()
        os._exit(code)
    sys.exit(code)


app = typer.Typer(
    cls=_Commands,
    name="loralab",
    help="LoRA fine-tuning that proves what it claims: train, evaluate, compare, use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_json(value: Any) -> None:
    """Print a value as one JSON document, in whatever encoding stdout has."""
    text = render_json(value)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:  # replacement characters would change the values; JSON has escapes
        text = json.dumps(json.loads(text), indent=2)
    print(text)
