"""The commands that ask an adapter: `generate`, `chat`."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from loralab.cli.application import print_json
from loralab.console import ConsoleReporter, printable
from loralab.options import (
    AsJson,
    BaseModel,
    Device,
    MaxNewTokens,
    Overrides,
    RunPath,
    Seed,
    System,
    Temperature,
    TopP,
    option_overrides,
    usable_path,
)


def generate(
    run: RunPath,
    overrides: Overrides = None,
    *,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A user turn; may be repeated.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="File with one prompt per line.", callback=usable_path)
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", help="A picture that every prompt begins with; may be repeated.", metavar="FILE"),
    ] = None,
    system: System = None,
    base: Annotated[bool, typer.Option("--base", help="Let the base model answer too.")] = False,
    model: BaseModel = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Prompt the adapter under its prompt contract."""
    from loralab.workflows.first_look import check_run

    check_run(run)
    from loralab.workflows.prompts import read_prompts

    prompts = read_prompts(prompt or [], file, None if sys.stdin is None or sys.stdin.isatty() else sys.stdin)
    from loralab.evaluation.generate import GenerationSettings
    from loralab.workflows.generate import generate as run_generation

    results = run_generation(
        run,
        prompts,
        settings=GenerationSettings(temperature=temperature, top_p=top_p, seed=seed),
        system=system,
        with_base=base,
        images=image or [],
        overrides=option_overrides(overrides, device=device, max_new_tokens=max_new_tokens),
        base_model=model,
        reporter=ConsoleReporter(),
    )
    if as_json:
        print_json({"answers": results})
        return
    for result in results:
        _print_answer(result, labelled=base or len(results) > 1)


def _print_answer(result: dict[str, Any], *, labelled: bool) -> None:
    adapter = printable(result["adapter"]["text"])
    if not labelled:
        print(adapter)
        return
    print(f"=== {printable(result['prompt'])}")
    if "base" in result:
        print(f"--- base\n{printable(result['base']['text'])}\n--- adapter")
    print(f"{adapter}\n")


def chat(
    run: RunPath,
    overrides: Overrides = None,
    *,
    system: System = None,
    base: Annotated[bool, typer.Option("--base", help="Begin with the base model, without the adapter.")] = False,
    model: BaseModel = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Talk with the adapter, or its base, under its prompt contract; /help in it lists what it can do.

    Turns come from the terminal, or from a pipe, one a line; answers go to stdout, all else to stderr.
    """
    from loralab.workflows.first_look import check_run

    check_run(run)
    from loralab.cli.terminal import history_path, is_terminal, keeping_history, turn_reader, write_answer
    from loralab.evaluation.generate import GenerationSettings
    from loralab.workflows.chat import open_chat
    from loralab.workflows.dialogue import hold_chat

    interactive = is_terminal(sys.stdin)
    conversation = open_chat(
        run,
        settings=GenerationSettings(temperature=temperature, top_p=top_p, seed=seed),
        system=system,
        base=base,
        overrides=option_overrides(overrides, device=device, max_new_tokens=max_new_tokens),
        base_model=model,
        interactive=interactive,
        write=write_answer,
        reporter=ConsoleReporter(),
    )
    if interactive:
        conversation.note("/help lists the commands, Ctrl-D leaves")
    history = keeping_history(history_path(), conversation.note) if interactive else nullcontext()
    with history:
        hold_chat(conversation, turn_reader(), interactive=interactive)
