"""What a run was made from, as plain values for a template: data, settings, choices, machine.

Owns the choice and order of these facts; what came out of the run is in `sections.py`.
"""

from loralab.reports.facts import (
    SPLITS,
    Facts,
    dig,
    dig_list,
    dig_number,
    dig_table,
    flatten_config,
    own_parameters,
)
from loralab.reports.wording import (
    MISSING,
    format_bytes,
    format_count,
    format_number,
    format_seconds,
    format_share,
    format_time,
    format_value,
)
from loralab.run import Json

LENGTH_NAMES = {"p0": "shortest", "p50": "median", "p90": "90 %", "p99": "99 %", "p100": "longest"}
COUNTED = {
    "rows_read": "Rows read",
    "rows_kept": "Rows kept",
    "truncated": "Truncated",
    "empty_answers": "Empty answers",
    "total_tokens": "Tokens",
    "supervised_tokens": "Supervised tokens",
}
PICTURES = {"distinct": "Different pictures", "uses": "Pictures in prompts", "tokens": "Tokens of pictures"}
# What rows may have been through, besides the two that are counted above.
NOTED = {
    "turns_dropped": "Oldest turns left out",
    "turns_cut": "Later turns left out at max_length",
    "end_left_out": "Messages behind the last answer left out",
    "answer_altered": "Answers altered by the template",
    "reasoning_left_out": "Reasoning left out by the template",
    "no_stop": "Answers without a stop token",
    "system_left_out": "System messages left out by the template",
    "question_altered": "Questions altered by the template",
    "tools_left_out": "Tools left out by the template",
}
MAX_LISTED_ROWS = 50


def describe_data(facts: Facts) -> Json | None:
    """Return what became of the rows, or None without `data.json`."""
    splits = dig_table(facts.data, "splits")
    names = [name for name in SPLITS if name in splits] + [name for name in splits if name not in SPLITS]
    if not facts.data:
        return None
    stop = dig_table(facts.data, "stop_tokens")
    texts = dig_list(stop, "texts")
    stop_rows = [(str(i), format_value(texts[at]) if at < len(texts) else MISSING)
                 for at, i in enumerate(dig_list(stop, "ids"))]  # fmt: skip
    return {
        "splits": [name.capitalize() for name in names],
        "counts": _count_rows([dig_table(splits, name) for name in names]),
        "lengths": [
            (name.capitalize(), [format_count(dig_number(splits, name, "length_percentiles", p)) for p in LENGTH_NAMES])
            for name in names
        ],
        "length_names": list(LENGTH_NAMES.values()),
        "dropped_rows": _dropped_rows(splits, names),
        "noted_rows": _noted_rows(splits, names),
        "system_prompt": str(facts.data.get("system_prompt") or ""),
        "sources": [format_value(dig(source, "name") or source) for source in dig_list(facts.data, "sources")],
        "format": _choice(dig_table(facts.data, "format")),
        "split": ", ".join(f"{key} {format_value(value)}" for key, value in dig_table(facts.data, "split").items()),
        "template": {key: str(dig(facts.data, "template", key) or "") for key in ("name", "text", "reason")},
        "stop_rows": stop_rows,
        "stop_reason": str(stop.get("reason") or ""),
    }


def _count_rows(splits: list[Json]) -> list[Json]:
    """Return one table row per count, with the dropped rows by reason behind those kept."""

    def line(name: str, values: list[float | None], wholes: list[float | None], *, part: bool = False) -> Json:
        cells = [(format_count(v), format_share(v, w)) for v, w in zip(values, wholes, strict=True)]
        return {"name": name, "cells": cells, "part": part}

    rows = []
    read, kept, tokens = ([dig_number(s, key) for s in splits] for key in ("rows_read", "rows_kept", "total_tokens"))
    none: list[float | None] = [None] * len(splits)
    wholes = {"rows_kept": read, "truncated": kept, "empty_answers": kept, "supervised_tokens": tokens}
    for key, name in COUNTED.items():
        if all(dig_number(split, key) is None for split in splits):
            continue
        rows.append(line(name, [dig_number(s, key) for s in splits], wholes.get(key, none)))
        if key == "rows_kept":
            reasons = list(dict.fromkeys(reason for s in splits for reason in dig_table(s, "dropped")))
            for reason in reasons:
                dropped = [dig_number(s, "dropped", reason) or 0 for s in splits]
                rows.append(line(f"Dropped: {reason}", list(dropped), read, part=True))
    for key, name in PICTURES.items():
        if any(dig_number(split, "pictures", key) for split in splits):
            rows.append(line(name, [dig_number(s, "pictures", key) or 0 for s in splits], none))
    for note, name in NOTED.items():
        counts: list[float | None] = [dig_number(split, "notes", note) or 0 for split in splits]
        if any(counts):
            rows.append(line(name, counts, kept))
    return rows


def _dropped_rows(splits: Json, names: list[str]) -> Json:
    found = [
        (name.capitalize(), format_value(dig(row, "row")), str(dig(row, "why") or dig(row, "reason") or ""))
        for name in names
        for row in dig_list(splits, name, "dropped_rows")
    ]
    return {"rows": found[:MAX_LISTED_ROWS], "more": max(0, len(found) - MAX_LISTED_ROWS)}


def _noted_rows(splits: Json, names: list[str]) -> list[Json]:
    """Return, for each note, the first rows that have it, so that they can be looked at."""
    notes = []
    for note, name in {"truncated": "Truncated", "empty_answer": "Empty answers", **NOTED}.items():
        rows = [
            f"{split} {format_value(dig(row, 'row'))}"
            for split in names
            for row in dig_list(splits, split, "noted_rows", note)
        ]
        if rows:
            shown = ", ".join(rows[:MAX_LISTED_ROWS])
            notes.append({"name": name, "rows": shown, "more": max(0, len(rows) - MAX_LISTED_ROWS)})
    return notes


def describe_settings(facts: Facts) -> list[Json]:
    """Return every configuration value with its origin, by section."""
    origin = dig_table(facts.record, "origin")
    groups: dict[str, list[Json]] = {}
    for key, value in flatten_config(facts.config, origin).items():
        section, _, field = key.partition(".")
        source = str(origin.get(key) or MISSING)
        groups.setdefault(section, []).append(
            {"key": field or section, "value": format_value(value), "origin": source, "default": source == "default"}
        )
    return [{"section": section, "rows": rows} for section, rows in groups.items()]


def describe_choices(facts: Facts) -> list[tuple[str, str, str]]:
    """Return what was chosen automatically: name, value, reason."""
    budget = facts.record.get("token_budget")
    resolved = dig_table(facts.record, "resolved") | ({"token_budget": budget} if budget else {})
    return [
        (name, *_choice(entry if isinstance(entry, dict) else {"value": entry})) for name, entry in resolved.items()
    ]


def _choice(entry: Json) -> tuple[str, str]:
    return (format_value(entry["value"]) if "value" in entry else MISSING, str(entry.get("reason") or ""))


def _laid_out(record: Json) -> str:
    """Return how many tokens went through the model for those of the rows: fewer where prefixes were shared."""
    tokens = dig_table(record, "layout_tokens")
    laid_out, rows = dig_number(tokens, "laid_out"), dig_number(tokens, "rows")
    return MISSING if not laid_out or not rows else f"{laid_out:,.0f} of {rows:,.0f} ({laid_out / rows:.0%})"


def describe_machine(facts: Facts) -> Json:
    """Return speed, machine, versions and hashes."""
    record, model, hardware = facts.record, dig_table(facts.record, "model"), dig_table(facts.record, "hardware")
    speed = [
        ("Started", format_time(record.get("started_at"))),
        ("Finished", format_time(record.get("finished_at"))),
        ("Training time", format_seconds(dig_number(record, "train_seconds"))),
        (
            "Training time, predicted after its first steps",
            format_seconds(dig_number(record, "time", "predicted_seconds")),
        ),
        ("Tokens per second", format_number(dig_number(record, "tokens_per_second"))),
        ("Tokens laid out, of the rows' tokens", _laid_out(record)),
        ("Examples per second", format_number(dig_number(record, "examples_per_second"))),
        ("Peak memory", format_bytes(dig_number(record, "peak_memory_bytes"))),
    ]
    machine = [
        (key.removesuffix("_bytes").capitalize(),
         format_bytes(dig_number(hardware, key)) if key.endswith("_bytes") else format_value(value))
        for key, value in hardware.items()
        if value is not None
    ]  # fmt: skip
    hashes = [
        ("Adapter", record.get("adapter_sha256")),
        ("Base model", model.get("sha256")),
        ("Revision of the base model", model.get("revision")),
        ("Data", record.get("data_fingerprint")),
    ]
    parameters = [
        ("Architecture", str(model.get("architecture") or MISSING)),
        ("Parameters of the base", format_count(own_parameters(facts))),
        ("Trained parameters", format_count(dig_number(model, "trainable_parameters"))),
    ]
    seeds = [(f"Seed: {name}", format_value(value)) for name, value in dig_table(record, "seeds").items()]
    tables = {"Speed": speed, "Machine": machine, "Model": parameters + seeds}
    return {
        "tables": {title: [pair for pair in pairs if pair[1] != MISSING] for title, pairs in tables.items()},
        "versions": [(name, str(value)) for name, value in dig_table(record, "versions").items()],
        "hashes": [(name, str(value)) for name, value in hashes if value],
    }
