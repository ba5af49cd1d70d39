"""What `plan` shows on a terminal: parameters, steps, tokens, memory by part, time, disk, and the verdict."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from loralab.cli.facts_text import INDENT, print_facts
from loralab.console import printable
from loralab.doctor.findings import render_bytes

_PARTS = {
    "weights": "frozen weights",
    "adapter": "adapter (float32)",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits of a chunk",
    "dequantization": "dequantized weight",
    "vision": "pictures",
    "kept_by_allocator": "freed, kept by the C library",
    "runtime": "threads and kernels",
    "data": "tokenizer and rows",
}


def print_plan(console: Console, result: dict[str, Any]) -> None:
    """Print a plan.

    Args:
        console: where to.
        result: of the workflow.
    """
    print_facts(console, "choices", {k: f"{c['value']} ({c['reason']})" for k, c in result["choices"].items()})
    _print_parameters(console, result["parameters"])
    print_facts(console, "steps", _schedule(result["schedule"]))
    print_facts(console, "tokens", _tokens(result["tokens"], result["schedule"]))
    print_facts(console, "memory", _memory(result["memory"]))
    print_facts(console, "time", _time(result["time"]))
    print_facts(console, "disk", _disk(result["disk"]))
    _print_verdict(console, result)


def _print_parameters(console: Console, parameters: Mapping[str, Any]) -> None:
    total, trainable = parameters["total"], parameters["trainable"]
    facts = {"total": f"{total:,}", "trainable": f"{trainable:,} ({trainable / total:.2%})"}
    for kind in parameters["by_layer"]:
        shapes = " + ".join(
            f"{part['count']} x {part['part']} {' x '.join(map(str, part['shape']))}" for part in kind["parts"]
        )
        facts[f"  {kind['kind']}"] = f"{shapes} = {kind['parameters']:,}"
    quantized = parameters["quantized"]
    if quantized:
        facts["quantized"] = (
            f"{quantized['weights']:,} in {quantized['layers']} layers, {render_bytes(quantized['bytes'])} "
            f"({quantized['bits_per_weight']} bits each)"
        )
    print_facts(console, "parameters", facts)


def _schedule(schedule: Mapping[str, Any]) -> dict[str, str]:
    sizes = f"B {schedule['per_device_train_batch_size']} x K {schedule['gradient_accumulation_steps']}"
    total, epoch = f"{schedule['total_steps']:,}", f"{schedule['steps_per_epoch']:,} an epoch"
    return {
        "rows per step": f"{schedule['rows_per_step']} ({sizes} x D {schedule['processes']})",
        "steps": f"{total} ({epoch}, {schedule['epochs']:g} epochs)",
        "warm-up": f"{schedule['warmup_steps']:,} steps",
        "evaluations": f"{schedule['evaluations']:,} while training",
        "checkpoints": f"{schedule['checkpoints']:,}",
    }


def _tokens(tokens: Mapping[str, Any], schedule: Mapping[str, Any]) -> dict[str, str]:
    whole = tokens["laid_out_steps"] == tokens["steps"]
    counted = "" if whole else f" (by {tokens['laid_out_steps']} of {tokens['steps']:,} steps)"
    layouts = ", ".join(f"{name} {count:,}" for name, count in tokens["epoch"].items())
    share = tokens["laid_out"] / max(tokens["rows"], 1)
    within = schedule["total_steps"] < schedule["steps_per_epoch"]
    return {
        "layout": f"{tokens['layout']}, at most {tokens['token_budget']:,} tokens at once",
        "the steps" if within else "an epoch": f"{layouts}, padding included{counted}",
        "in all": f"{tokens['laid_out']:,} laid out of {tokens['rows']:,} ({share:.1%}){counted}",
        "supervised": f"{tokens['supervised']:,}",
        "micro-batches": f"{tokens['micro_batches']:,} in {schedule['total_steps']:,} steps{counted}",
    }


def _memory(memory: Mapping[str, Any]) -> dict[str, str]:
    if memory["predicted_bytes"] is None:
        return {"peak": f"unknown: {memory['why']}", "free": render_bytes(memory["free_bytes"])}
    facts = {_PARTS[name]: render_bytes(memory["parts"][name]) for name in _PARTS if memory["parts"].get(name)}
    if memory["parts"].get("evaluation"):
        facts["evaluation"] = f"{render_bytes(memory['parts']['evaluation'])}, in the place of a step"
    facts["while loading"] = render_bytes(memory["loading_bytes"])
    probe = memory.get("probe")
    how = f"measured by the probe; counted: {render_bytes(memory['counted_bytes'])}" if probe else "counted"
    facts["peak"] = f"{render_bytes(memory['predicted_bytes'])} above the level after imports ({how})"
    if memory["mapped_bytes"]:
        facts["mapped weights"] = f"{render_bytes(memory['mapped_bytes'])}, pages of their file"
    facts["free"] = f"{render_bytes(memory['free_bytes'])} on {memory['device']}"
    return facts


def _time(time: Mapping[str, Any]) -> dict[str, str]:
    if time["seconds"] is None:
        return {"training": f"unknown ({time['why']})"}
    rate = f"{time['laid_out_tokens_per_second']:,.0f} laid-out tokens/s"
    return {"training": f"{_clock(time['seconds'])} ({time['seconds_per_step']:g} s a step, {rate})"}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _disk(disk: Mapping[str, Any]) -> dict[str, str]:
    each, kept = render_bytes(disk["checkpoint_bytes"]), disk["checkpoints_kept"]
    trunk = disk["frozen_trunk_bytes"]
    facts = {
        "adapter": render_bytes(disk["adapter_bytes"]),
        "checkpoints": f"{kept} kept of {disk['checkpoints_written']} written, {each} each",
        "all of these": f"{render_bytes(disk['run_folder_bytes'])} at most, {render_bytes(disk['free_bytes'])} free",
        "tokenized rows": f"{render_bytes(disk['token_cache_bytes'])} in the cache",
    }
    if trunk is not None:
        facts["frozen layers"] = f"{render_bytes(trunk)} while the run is under way, which then takes less time"
    return facts


def _print_verdict(console: Console, result: Mapping[str, Any]) -> None:
    memory, fits = result["memory"], result["fits"]
    if fits is None:
        console.print(Text("whether it fits is not known", style="bold yellow"))
        return
    compared = f"needs {render_bytes(memory['needed_bytes'])}, {render_bytes(memory['free_bytes'])} are free"
    if fits:
        console.print(Text(f"fits: {compared}", style="bold green"))
        return
    console.print(Text(f"does not fit: {compared}", style="bold red"))
    for step in result["advice"]:
        mark = "fits" if step["fits"] else "not yet"
        line = f"{step['set']}: {render_bytes(step['needed_bytes'])}, {mark}; costs {step['costs']}"
        console.print(Padding(Text(printable(line), overflow="fold"), (0, 0, 0, INDENT), expand=False))
    if not result["advice"] or not result["advice"][-1]["fits"]:
        console.print(Text("  with all of these it still does not fit: take a smaller base", style="bold"))
