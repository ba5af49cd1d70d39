"""The command `compare`: base against adapter as tables, as JSON and as a page."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from loralab.cli.application import print_json
from loralab.console import ConsoleReporter, ResultConsole, printable
from loralab.options import (
    AsJson,
    BaseModel,
    BatchSize,
    Device,
    MaxLength,
    MaxNewTokens,
    Overrides,
    RunPath,
    Split,
    option_overrides,
    usable_path,
)

_LABELS = {
    "kl_base_adapter": "KL(base || adapter)",
    "kl_adapter_base": "KL(adapter || base)",
    "jensen_shannon": "Jensen-Shannon",
    "l2_logits": "L2 of logits",
    "l2_logits_centred": "L2, constant off",
    "l2_probabilities": "L2 of probabilities",
    "top1_agreement": "top-1 agreement",
}
_SHOWN_PROMPTS = 10


def compare(
    run: RunPath,
    overrides: Overrides = None,
    *,
    model: BaseModel = None,
    data: Annotated[
        str | None, typer.Option("--data", help="File, saved data set or Hub id to compare on, instead of the run's.")
    ] = None,
    split: Split = None,
    max_examples: Annotated[int, typer.Option("--max-examples", help="Most rows of it, evenly spread.")] = 50,
    probe: Annotated[
        str | None,
        typer.Option("--probe", help="Unrelated text: a text file, cut at blank lines, or rows with a field 'text'."),
    ] = None,
    no_probe: Annotated[bool, typer.Option("--no-probe", help="Do not measure unrelated text.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder for comparison.json and comparison.html.", callback=usable_path),
    ] = None,
    batch_size: BatchSize = None,
    max_length: MaxLength = None,
    max_new_tokens: MaxNewTokens = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Compare base and adapter: distances, answers side by side, and a probe for forgetting."""
    own_split = split if data is None else None  # of other data, `split` names one of its own
    chosen = option_overrides(
        overrides,
        batch_size=batch_size,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        device=device,
        split=own_split,
    )
    from loralab.workflows.compare import ComparisonRequest
    from loralab.workflows.compare import compare as run_comparison

    request = ComparisonRequest(
        data=data, split=split, max_examples=max_examples, probe=probe, with_probe=not no_probe, output=output
    )
    result = run_comparison(run, request, overrides=chosen, base_model=model, reporter=ConsoleReporter())
    if as_json:
        print_json(result)
        return
    console = ResultConsole(highlight=False)
    console.print(_distances(result))
    console.print(_prompts(result))
    for line in _lines(result):
        console.print(escape(line), soft_wrap=True)


def _distances(result: dict[str, Any]) -> Table:
    totals = result["totals"]
    prompt, answer = totals["last_prompt_token"], totals["answer"]
    table = Table("mean, 95 % interval")
    if prompt is not None:
        table.add_column(f"last prompt token\nn = {prompt['count']:,}")
    table.add_column(f"{'answer' if prompt else 'text'}\nn = {answer['count']:,} tokens")
    for name, label in _LABELS.items():
        table.add_row(label, *(_interval(part[name]) for part in (prompt, answer) if part is not None))
    return table


def _interval(figure: dict[str, Any]) -> str:
    if figure["low"] is None or figure["high"] is None:
        return _number(figure["mean"])
    return f"{_number(figure['mean'])}  {_number(figure['low'])} to {_number(figure['high'])}"


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.2e}"


def _prompts(result: dict[str, Any]) -> Table:
    """Return the prompts with the largest divergences; the page has all of them."""
    records = sorted(result["prompts"], key=lambda record: -record["kl_divergence"])
    shown = records[:_SHOWN_PROMPTS]
    answered = result["generation"] is not None
    texts = {"base_output": "base", "adapter_output": "adapter"} if answered else {"reference": "text"}
    table = Table("row", "KL", "L2", "top-1")
    for name in texts.values():
        table.add_column(name, max_width=52 // len(texts))
    for record in shown:
        agree = record["top1_agreement"]
        same = f"{agree:.0%}" if not answered else "same" if agree else "other"
        lines = (_line(record[key]) for key in texts)
        table.add_row(_row_name(record), _number(record["kl_divergence"]), _number(record["l2_distance"]), same, *lines)
    table.caption = f"{len(shown)} of {len(records)}, in the order of KL(base || adapter)"
    return table


def _row_name(record: dict[str, Any]) -> str:
    """Return `1.3` for the third window of the first row, `1` for a row in one piece."""
    window = record.get("window")
    return str(record["row"]) if window is None else f"{record['row']}.{window}"


def _line(text: str) -> str:
    """Return the beginning of a text on one line."""
    flat = " ".join(text.split())
    return escape(printable(flat if len(flat) <= 50 else f"{flat[:47]}..."))


def _lines(result: dict[str, Any]) -> list[str]:
    lines = [f"compared at {result['measured_at']}; {result['examples']} of {result['of_examples']} rows"]
    generation = result["generation"]
    if generation is not None:
        lines.append(
            f"answers: {generation['same_answer']:.0%} the same; ended by a stop token: base "
            f"{generation['base_stopped']:.0%}, adapter {generation['adapter_stopped']:.0%}"
        )
    probe = result["probe"]
    if probe is not None:
        lines.append(f"probe ({probe['name']}): {probe['reading']}")
    return lines
