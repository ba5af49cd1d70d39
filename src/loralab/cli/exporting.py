"""The command that hands a model to other programs: `export`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loralab.cli.application import print_json
from loralab.console import ConsoleReporter
from loralab.options import AsJson, usable_path


def export(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="Run folder, adapter folder, or a folder of `loralab merge`.", callback=usable_path
        ),
    ],
    *,
    to: Annotated[str, typer.Option("--to", help="Program to export for: ollama, vllm or gguf (llama.cpp).")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="Folder to write; it must not exist, or be empty; by default RUN-ollama, RUN-vllm or RUN-gguf.",
            callback=usable_path,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the model in the other program; the run's by default.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", help="Type of the weights with --to gguf: f16, 2 bytes each and the default, or f32, 4 bytes."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="BASE", help="Base model to use instead of the recorded one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Export a model for Ollama, vLLM or llama.cpp (GGUF), proved as far as it can be here.

    Example: loralab export runs/price --to ollama
    """
    from loralab.workflows.first_look import check_export

    check_export(run, output, to=to, dtype=dtype, name=name)
    from loralab.workflows.export import ExportRequest, export

    request = ExportRequest(to, output, name, dtype, model)
    result = export(run, request, reporter=ConsoleReporter())
    if as_json:
        print_json(result)
    else:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    size = sum(file["bytes"] for file in result["files"].values())
    print(f"wrote {result['output']} ({len(result['files'])} files, {size / 1e6:.1f} MB)")
    if "reason" in result:
        print(f"served: {result['served']} ({result['reason']})")
    if "weights" in result:
        print(f"weights: {result['weights']['form']} ({result['weights']['reason']})")
    if "proof" in result:
        logits = result["proof"]["logits"]
        apart = logits["max_difference_in_standard_deviations"]
        print(f"read back: logits within {apart:.2g} standard deviations of those of {logits['compared_with']}")
        print(f"rounding: KL {result['proof']['rounding_kl_nats']:.2g} nats from the merged model")
    if result.get("modelfile"):
        prompt = result["modelfile"]
        print(f"prompt: equal to {prompt['compared_with']} on {prompt['conversations_equal']} conversations")
        for caveat in prompt["caveats"]:
            print(f"note: {caveat}")
    for note in result["notes"]:
        print(f"note: {note}")
    print("next:")
    for command in result["commands"]:
        print(f"  {command}")
