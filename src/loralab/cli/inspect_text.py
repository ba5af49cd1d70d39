"""What `inspect` shows on a terminal: the adapter's facts, its layers by kind, findings."""

from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from loralab.cli.doctor_text import print_finding
from loralab.cli.facts_text import INDENT, print_facts
from loralab.console import printable
from loralab.doctor.findings import render_bytes

_SHOWN_PROMPT = 80


def print_adapter(console: Console, result: dict[str, Any]) -> None:
    """Print what an adapter is.

    Args:
        console: where to.
        result: of the workflow.
    """
    print_facts(console, "adapter", _adapter_facts(result))
    _print_kinds(console, result["kinds"])
    if result["saved_whole"]:
        rows = {tensor["name"]: f"{_shape(tensor['shape'])} {tensor['dtype']}" for tensor in result["saved_whole"]}
        print_facts(console, "layers saved whole", rows)
    loading = result["loading"]
    state = f"frozen: {loading['trainable_parameters']} of {loading['trainable_when_asked']:,} parameters train"
    loaded = {"state": state, "why": loading["why"], "to train": loading["how"]}
    print_facts(console, "as PEFT loads it", loaded)
    if result["contract"]:
        print_facts(console, "prompt contract", _contract_facts(result))
    if result["run"]:
        print_facts(console, "run", _run_facts(result["run"]))
    if result["attached"]:
        print_facts(console, "on the base", _attached_facts(result["attached"]))
    for finding in result["findings"]:
        print_finding(console, finding)


def _adapter_facts(result: dict[str, Any]) -> dict[str, str]:
    base = result["base"]
    revision = f" at {base['revision']}" if base["revision"] else ""
    recorded = ((result["run"] or {}).get("model") or {}).get("revision")
    if recorded and not base["revision"]:
        revision = f" at {recorded}"
    facts = {"folder": result["path"], "base": f"{base['name'] or 'not named'}{revision}", "variant": result["variant"]}
    if result["rank"] is not None:
        scale = f", scale {result['scale']:g}" if result["scale"] is not None else ""
        alpha = f", alpha {result['alpha']}" if result["alpha"] is not None else ""
        facts["rank"] = f"{result['rank']}{alpha}{scale}"
    targets = result["target_modules"]
    facts["targets"] = ", ".join(sorted(targets)) if isinstance(targets, list) else str(targets)
    facts["parameters"] = (
        f"{result['parameters']:,} in {result['tensors']} tensors, {render_bytes(result['file_bytes'])}"
    )
    facts["sha256"] = result["adapter_sha256"]
    return facts


def _print_kinds(console: Console, kinds: list[dict[str, Any]]) -> None:
    if not kinds:
        return
    lora = any("lora_B" in kind["norms"] for kind in kinds)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("layer", "count", "part", "shape", "type", "norm", "least", *(["update"] if lora else [])):
        words = name in ("layer", "part", "shape", "type")
        table.add_column(name, justify="left" if words else "right", overflow="fold")
    for kind in kinds:
        for number, row in enumerate(_part_rows(kind)):
            first = [kind["kind"], str(kind["count"])] if number == 0 else ["", ""]
            last = [_mean(kind["update_norm"]) if number == 0 else ""] if lora else []
            table.add_row(*(Text(printable(cell)) for cell in [*first, *row, *last]))
    update = "; update: scale x ||B A||" if lora else ""
    console.print(Text(f"--- layers (norm: mean per kind{update})", style="bold"))
    console.print(Padding(table, (0, 0, 0, INDENT), expand=False))


def _part_rows(kind: dict[str, Any]) -> list[list[str]]:
    """Return part, shapes, types, mean norm and least norm of each part of a kind of layer."""
    rows = []
    for part, shapes in kind["shapes"].items():
        norm = kind["norms"][part]
        rows.append(
            [part, ", ".join(map(_shape, shapes)), ", ".join(kind["dtypes"]), _mean(norm), f"{norm['min']:.3g}"]
        )
    if kind["untrained"]:
        rows.append([f"{len(kind['untrained'])} never trained", "", "", "", ""])
    return rows


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _mean(spread: dict[str, float] | None) -> str:
    return "" if spread is None else f"{spread['mean']:.3g}"


def _contract_facts(result: dict[str, Any]) -> dict[str, str]:
    contract, run = result["contract"], result["run"] or {}
    template = run.get("template") or {}
    named = f"{template['name']}, " if isinstance(template, dict) and template.get("name") else ""
    system = contract["system_prompt"]
    if isinstance(system, str) and len(system) > _SHOWN_PROMPT:
        system = f"{system[: _SHOWN_PROMPT - 3]}..."
    return {
        "template": f"{named}sha256 {str(contract['template_sha256'])[:16]}...",
        "stop tokens": ", ".join(map(repr, contract["stop_tokens"] or ())) or "none",
        "system prompt": repr(system) if system is not None else "none",
        "golden prompts": str(contract["golden_prompts"]),
    }


def _run_facts(run: dict[str, Any]) -> dict[str, str]:
    facts = {"folder": run["path"], "status": str(run["status"]), "started": str(run["started_at"])}
    if run["steps"] is not None:
        facts["steps"] = str(run["steps"])
    return {**facts, "loralab": str(run["loralab_version"])}


def _attached_facts(attached: dict[str, Any]) -> dict[str, str]:
    kinds = {kind: f"{share['attached']} of {share['in_base']}" for kind, share in attached["kinds"].items()}
    return {"base": attached["base"], **kinds, "matching nothing": str(len(attached["unmatched"]))}
