"""What `eval` shows on a terminal: one table of base and adapters, with the paired differences."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from loralab.console import ResultConsole, printable

# From here on figures are written in short.
_LONG = 1e6
_COUNTS = ("supervised_tokens", "num_examples", "num_batches")
_LOSSES = ("eval_loss", "perplexity", "eval_loss_batch_mean")


def print_evaluations(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> None:
    """Print the figures of adapters and their base.

    Args:
        names: of the adapters.
        results: the content of `evaluation.json` for each.
    """
    console = ResultConsole()
    columns = ["adapter"] if len(results) == 1 else list(names)
    table = Table("", "base", *columns)
    for name in (*_LOSSES, *_figures(results), *_COUNTS):
        bases = {_figure(result["base"].get(name)) for result in results}
        base = bases.pop() if len(bases) == 1 else " / ".join(_figure(each["base"].get(name)) for each in results)
        table.add_row(name, base, *(_figure(result.get(name)) for result in results))
    console.print(table)
    for name, result in zip(names, results, strict=True):
        console.print("adapter - base" if len(results) == 1 else f"{name} - base", style="bold")
        console.print(f"  {_loss_difference(result['difference'])}")
        for figure, difference in result.get("differences", {}).items():
            if figure != "perplexity":  # the loss says it
                console.print(f"  {figure} {_difference(difference)}")
        if "blank_images" in result:
            _print_blind(console, result["blank_images"])
        if result.get("groups"):
            _print_groups(console, result["groups"])
    way = results[0].get("answered_by")
    if way is not None:
        rows = results[0]["answered_rows"]
        console.print(f"answers: {way}, {rows} rows" + (f". {results[0]['note']}" if "note" in results[0] else ""))


def _print_blind(console: ResultConsole, blind: Mapping[str, Any]) -> None:
    """Print what the adapter gains by seeing the pictures."""
    console.print("adapter - adapter with every picture grey", style="bold")
    console.print(f"  {_loss_difference(blind['difference'])}")
    for figure, difference in blind.get("differences", {}).items():
        if figure != "perplexity":
            value = f"{figure} {_figure(blind['metrics'][figure]['value'])} with grey pictures"
            console.print(f"  {value}, {_difference(difference, ('with its pictures', 'with grey ones'))}")


def _print_groups(console: ResultConsole, groups: Mapping[str, Any]) -> None:
    """Print the figures of each group, a line for each figure."""
    table = Table(groups["by"], "answers", "", "base", "adapter", "adapter - base")
    for name, group in groups["values"].items():
        for number, (figure, found) in enumerate(group["metrics"].items()):
            base, difference = group["base"]["metrics"].get(figure), group["differences"].get(figure)
            table.add_row(
                *((printable(name), f"{group['answers']:,}") if number == 0 else ("", "")),
                figure,
                _figure(None if base is None else base["value"]),
                _figure(found["value"]),
                "-" if difference is None else f"{_signed(difference['value'])}: {difference['verdict']}",
            )
    console.print(table)


def _figures(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return every figure that any side has, in order."""
    sides = [side for result in results for side in (result.get("metrics", {}), result["base"].get("metrics", {}))]
    return [name for name in dict.fromkeys(name for side in sides for name in side) if name not in _LOSSES]


def _figure(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < _LONG else f"{value:.4g}"


def _loss_difference(difference: Mapping[str, Any]) -> str:
    text = f"eval_loss {difference['eval_loss']:+.4f} nats per token"
    if difference["low"] is not None:
        text += f", {_interval(difference)}"
    return f"{text}: {difference['verdict']}"


def _difference(difference: Mapping[str, Any], sides: tuple[str, str] = ("with the adapter", "without")) -> str:
    text = _signed(difference["value"])
    if difference["low"] is not None:
        text += f", {_interval(difference)}"
    test = difference.get("mcnemar")
    if test is not None:
        text += (
            f", right only {sides[0]} {test['only_adapter']}, only {sides[1]} {test['only_base']}, p {test['p']:.2g}"
        )
    return f"{text}: {difference['verdict']}"


def _interval(difference: Mapping[str, Any]) -> str:
    return f"{difference['level']:.0%} interval {_signed(difference['low'])} to {_signed(difference['high'])}"


def _signed(value: float) -> str:
    return f"{value:+.4f}" if abs(value) < _LONG else f"{value:+.4g}"
