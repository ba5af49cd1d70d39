"""The page of a sweep: one table, the metric against each setting, and all validation losses.

Owns what the page shows; all of it comes from `sweep.json` and the runs' `metrics.jsonl`.
"""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralab.reports.html import render_page
from loralab.reports.sweep_plots import draw_curves, draw_map, draw_setting
from loralab.reports.sweep_reading import as_number, read_sweep
from loralab.reports.wording import (
    MISSING,
    format_bytes,
    format_count,
    format_interval,
    format_measured,
    format_seconds,
)
from loralab.run import write_text

TEMPLATE = "sweep.html.jinja"
PAGE = "sweep.html"


def write_sweep_page(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write the page of a sweep as it stands.

    Args:
        folder: of the sweep.
        content: of `sweep.json`.

    Returns:
        The page.
    """
    path = folder / PAGE
    write_text(path, render_page(TEMPLATE, sweep_context(folder, content)))
    return path


def sweep_context(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables of the page's template."""
    reading = read_sweep(content)
    order = {name: place for place, name in enumerate(reading["order"])}
    entries = sorted(content["runs"], key=lambda entry: (order.get(entry["name"], len(order)), entry["number"]))
    return {
        "name": folder.absolute().name,
        "metric": content["metric"],
        "split": content["split"],
        "better": "lower" if content["mode"] == "min" else "higher",
        "search": content["search"],
        "seed": content["seed"],
        "space": list(content["space"].items()),
        "keys": [key.rpartition(".")[2] for key in content["space"]],
        "has_test": (content.get("config", {}).get("data") or {}).get("test") is not None,
        "done": len(order),
        "of": len(entries),
        "best": reading["best"],
        "goes_on": any(entry["status"] not in ("completed", "failed") for entry in entries),
        "best_settings": next((e["settings"] for e in entries if e["name"] == reading["best"]), {}),
        "cautions": reading["cautions"],
        "runs": [_row(entry, list(content["space"]), best=reading["best"]) for entry in entries],
        "plots": _plots(folder, content, reading["best"]),
    }


def _row(entry: Mapping[str, Any], keys: list[str], *, best: str | None) -> dict[str, Any]:
    low, high = entry.get("interval") or (None, None)
    return {
        "number": f"{entry['number']:03}",
        "name": entry["name"],
        "values": [
            {"text": value, "number": as_number(value) is not None}
            for value in (entry["settings"].get(key, MISSING) for key in keys)
        ],
        "status": entry["status"],
        "reason": entry["reason"],
        "log": f"logs/{entry['name']}.log" if entry["status"] in ("failed", "interrupted") else None,
        "completed": entry["status"] == "completed",
        "best": entry["name"] == best,
        "metric": format_measured(entry.get("metric"), low, high),
        "interval": format_interval(low, high),
        "time": format_seconds(entry.get("train_seconds")),
        "memory": format_bytes(entry.get("peak_memory_bytes")),
        "trainable": format_count(entry.get("trainable_parameters")),
        "steps": format_count(entry.get("steps")),
    }


def _plots(folder: Path, content: Mapping[str, Any], best: str | None) -> list[tuple[str, str]]:
    """Return a caption and a data URI for each picture."""
    runs = [entry for entry in content["runs"] if entry["status"] == "completed"]
    if best is None or not runs:
        return []
    metric, keys = content["metric"], list(content["space"])
    pictures: list[tuple[str, bytes | None]] = []
    if len(keys) == 2:
        lower = content["mode"] == "min"
        caption = f"{metric} over both settings; darker is better, grey has no result"
        pictures.append((caption, draw_map(content["runs"], (keys[0], keys[1]), metric=metric, lower=lower)))
    for key in keys:
        caption = f"{metric} against {key}: the best run in orange, lines are 95 % intervals; equal values side by side"
        pictures.append((caption, draw_setting(runs, key, metric=metric, best=best)))
    pictures.append(("Validation loss of every run while training", draw_curves(folder, runs, best=best)))
    return [
        (caption, "data:image/png;base64," + base64.b64encode(picture).decode("ascii"))
        for caption, picture in pictures
        if picture is not None
    ]
