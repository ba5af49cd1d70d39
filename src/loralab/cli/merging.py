"""The command that writes an adapter into its base: `merge`."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from loralab.cli.application import print_json
from loralab.config.paths import check_path
from loralab.console import ConsoleReporter
from loralab.errors import ConfigError
from loralab.options import AsJson, BaseModel, Device, RunPath, usable_path


def merge(
    run: RunPath,
    *,
    output: Annotated[
        Path,
        typer.Option(
            "--output", help="Folder of the merged model; it must not exist, or be empty.", callback=usable_path
        ),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="Type of all merged weights: float32, bfloat16 or float16; by default what each is stored in.",
        ),
    ] = None,
    onto: Annotated[
        str,
        typer.Option(
            "--onto",
            help="For a quantized base: dequantized, the weights that the adapter was trained on, or original, the "
            "unquantized ones.",
        ),
    ] = "dequantized",
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="Another adapter with the factor of its update, as RUN2=0.5; may be repeated."),
    ] = None,
    weight: Annotated[
        float, typer.Option("--weight", help="Factor of the update of RUN's adapter; 1 is as trained.")
    ] = 1.0,
    model: BaseModel = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Write an adapter into its base, and prove that the merged model answers as the adapter does.

    Example: loralab merge runs/price --output price-merged
    """
    others = [_read_other(text) for text in adapter or []]
    from loralab.workflows.first_look import check_merge

    check_merge([run, *(path for path, _ in others)], output, dtype=dtype, onto=onto)
    from loralab.workflows.merge import MergeRequest
    from loralab.workflows.merge import merge as merge_adapter

    request = MergeRequest(
        output, dtype=dtype, onto=onto, others=others, weight=weight, base_model=model, device=device
    )
    content = merge_adapter(run, request, reporter=ConsoleReporter())
    if as_json:
        print_json({"output": str(output), **content})
        return
    for line in _describe(output, content):
        print(line)


def _read_other(text: str) -> tuple[Path, float]:
    path, sign, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        sign, weight = "", 0.0
    if not sign or not path or not math.isfinite(weight):
        raise ConfigError(
            f"not an adapter with its weight: {text!r}",
            where="option --adapter",
            fix="write the folder, an equals sign and a number, as in --adapter runs/other=0.5",
        )
    return check_path(Path(path), where="option --adapter"), weight


def _describe(output: Path, content: dict[str, Any]) -> list[str]:
    proof, memory = content["proof"], content["peak_memory_bytes"]
    far, share = proof["kl_trained_merged"], proof["greedy_agreement_strict"]
    strict = "" if share == proof["greedy_agreement"] else f" ({share:.2%} strictly, the others are ties)"
    return [
        f"merged model: {output}",
        f"onto:         {content['onto']}",
        f"dtype:        {content['dtype']} ({content['dtype_reason']})",
        f"compared on:  {content['compared_on']}, {proof['rows']} rows, {proof['positions']} positions",
        f"logits:       largest difference {proof['max_logit_difference']:.3g}, "
        f"{proof['relative_logit_difference']:.1e} of their standard deviation",
        f"KL:           adapter || merged {proof['kl_adapter_merged']:.3g} nats, "
        f"adapter || base {proof['kl_adapter_base']:.3g} nats",
        *([] if far is None else [f"              adapter as it was trained || merged {far:.3g} nats"]),
        f"greedy:       {proof['greedy_agreement']:.2%} of {proof['greedy_tokens']} tokens the same{strict}",
        f"peak memory:  {memory['writing'] / 1e6:.0f} MB writing, {memory['proof'] / 1e6:.0f} MB comparing",
    ]
