"""What the page of a run says, as plain values for its template: how it ended and what came out.

Owns the choice and order of facts; what the run was made from is in `provenance.py`. Wording of
numbers is `wording.py`'s, looks are the template's.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loralab.reports.comparison_section import describe_comparison
from loralab.reports.curve_sections import describe_plots, describe_reading
from loralab.reports.examples import describe_examples
from loralab.reports.facts import Facts, dig, dig_list, dig_number, dig_table, early_end
from loralab.reports.group_sections import describe_blank, describe_groups
from loralab.reports.metric_sections import describe_details, describe_metrics, measured_figures
from loralab.reports.pictures import PictureBook, images_in, pictures_folder, shown_images, thumbnails_in
from loralab.reports.preference_section import describe_preference
from loralab.reports.provenance import describe_choices, describe_data, describe_machine, describe_settings
from loralab.reports.usage import describe_usage
from loralab.reports.verdict import assess
from loralab.reports.wording import (
    MISSING,
    format_bytes,
    format_count,
    format_loss,
    format_number,
    format_parameters,
    format_perplexity,
    format_seconds,
    format_share,
    format_time,
)
from loralab.run import Json

Pairs = list[tuple[str, str]]

STATUS_WORDS = {
    "completed": "Completed",
    "interrupted": "Interrupted",
    "failed": "Failed",
    "running": "Running, or ended without notice",
}
# Answers shown on the page; the others are in samples.json.
SHOWN_SAMPLES = 12
EVALUATED_ON = {
    "num_examples": "Rows",
    "supervised_tokens": "Supervised tokens",
    "batch_size": "Batch size",
    "max_length": "Longest example, in tokens",
}
# What every loss brings along; with an interval of their own they stand among the metrics.
LOSS_FIGURES = {
    "perplexity": "Perplexity",
    "token_accuracy": "Token accuracy",
    "token_entropy": "Entropy, nats per token",
}


def report_context(facts: Facts, *, picture: Callable[[Path], str | None]) -> dict[str, Any]:
    """Return the variables of `report.html.jinja`.

    Args:
        facts: the run.
        picture: returns the address under which a picture file is shown, None where it is missing.
    """
    examples, samples = describe_examples(facts), describe_samples(facts)
    records = _pictured(examples, samples)
    book = PictureBook(thumbnails_in(pictures_folder(facts.folder)), shown_images(records))
    for record in records:
        record["images"] = book.show(record["images"])
    return {
        "held": book.held,
        "title": facts.name,
        "status": describe_status(facts),
        "overview": describe_overview(facts),
        "verdict": assess(facts),
        "scores": describe_scores(facts),
        "metrics": describe_metrics(facts),
        "groups": describe_groups(facts),
        "blank": describe_blank(facts),
        "details": describe_details(facts),
        "examples": examples,
        "comparison": describe_comparison(facts),
        "preference": describe_preference(facts),
        "reading": describe_reading(facts),
        "plots": describe_plots(facts, picture),
        "samples": samples,
        "data": describe_data(facts),
        "settings": describe_settings(facts),
        "choices": describe_choices(facts),
        "events": describe_events(facts),
        "machine": describe_machine(facts),
        "usage": describe_usage(
            facts,
            base=facts.base_model or "BASE_MODEL",
            revision=dig(facts.record, "model", "revision"),
            run=str(facts.folder.path),
            adapter=str(facts.folder.adapter),
        ),
        "has_adapter": facts.folder.adapter.is_dir(),
        "version": str(facts.record.get("loralab_version") or ""),
    }


def report_images(facts: Facts) -> list[Json]:
    """Return what the records of the page say of the pictures that it shows."""
    return shown_images(_pictured(describe_examples(facts), describe_samples(facts)))


def _pictured(examples: Json | None, samples: Json | None) -> list[Json]:
    """Return the records of the page that may have pictures."""
    groups = [] if examples is None else examples["groups"]
    return [*(row for group in groups for row in group["rows"]), *([] if samples is None else samples["rows"])]


def describe_status(facts: Facts) -> Json:
    """Return how the run ended."""
    status = str(facts.record.get("status") or "")
    return {
        "kind": status if status in STATUS_WORDS else "unknown",
        "words": STATUS_WORDS.get(status, status or "Status unknown"),
        "reason": early_end(facts),
        "finished": format_time(facts.record.get("finished_at")) if facts.record.get("finished_at") else "",
    }


def describe_overview(facts: Facts) -> Pairs:
    """Return the run in a few facts."""
    trainable = dig_number(facts.record, "model", "trainable_parameters")
    share = format_share(trainable, dig_number(facts.record, "model", "parameters"))
    steps, epochs = dig_number(facts.record, "steps"), dig_number(facts.record, "epochs")
    kept = dig_number(facts.data, "splits", "train", "rows_kept")
    pairs = [
        ("Base model", facts.base_model or MISSING),
        ("Trained parameters", format_parameters(trainable) + (f" ({share})" if share else "")),
        ("Training rows", format_count(kept)),
        ("Steps", format_count(steps) + (f" ({format_number(epochs)} epochs)" if epochs is not None else "")),
        ("Training time", format_seconds(dig_number(facts.record, "train_seconds"))),
        ("Peak memory", format_bytes(dig_number(facts.record, "peak_memory_bytes"))),
    ]
    return [(name, value) for name, value in pairs if value != MISSING]


def describe_events(facts: Facts) -> Pairs:
    """Return what happened while training: when, by step or time, and what."""
    events = [event for event in dig_list(facts.record, "events") if isinstance(event, dict)]
    return [(_moment(event), str(event.get("what") or "")) for event in events]


def _moment(event: Json) -> str:
    step = dig_number(event, "step")
    return format_time(event.get("at")) if step is None else f"step {format_count(step)}"


def describe_scores(facts: Facts) -> Json | None:
    """Return the losses of base and adapter, or None where neither was measured."""
    evaluation = facts.evaluation
    sides = [("Base model", dig_table(evaluation, "base")), ("Adapter", evaluation)]
    losses = [dig_number(side, "eval_loss") for _, side in sides]
    largest = max((loss for loss in losses if loss is not None), default=0.0)
    if largest <= 0:
        return None
    elsewhere = measured_figures(facts)
    extra = [
        key
        for key in LOSS_FIGURES
        if key not in elsewhere and any(_loss_figure(side, key) != MISSING for _, side in sides)
    ]
    rows = [
        {
            "name": name,
            "loss": format_loss(loss),
            "batch_mean": format_loss(dig_number(side, "eval_loss_batch_mean")),
            "extra": [_loss_figure(side, key) for key in extra],
            "share": round(100 * (loss or 0) / largest, 1),
        }
        for (name, side), loss in zip(sides, losses, strict=True)
    ]
    names = [LOSS_FIGURES[key] for key in extra]
    return {"rows": rows, "extra": names, "details": _evaluation_details(evaluation)}


def _loss_figure(side: Json, key: str) -> str:
    if key != "perplexity":
        return format_loss(dig_number(side, key))
    return "\u221e" if side.get("perplexity") == math.inf else format_perplexity(dig_number(side, "perplexity"))


def _evaluation_details(evaluation: Json) -> Pairs:
    pairs = [("Split", str(dig(evaluation, "split") or MISSING))]
    pairs += [(name, format_count(dig_number(evaluation, key))) for key, name in EVALUATED_ON.items()]
    pairs.append(("Interval", str(dig(evaluation, "difference", "method") or MISSING)))
    return [(name, value) for name, value in pairs if value != MISSING]


def describe_samples(facts: Facts) -> Json | None:
    """Return the answers side by side, or None where there are none."""
    sides = (("base", "Base model"), ("adapter", "Adapter"))
    rows = [row for row in dig_list(facts.samples, "samples") if isinstance(row, dict)]
    if not rows:
        return None
    samples = [
        {
            "prompt": _text(row, "prompt"),
            "reference": _text(row, "reference"),
            "images": images_in(row),
            "answers": [
                {
                    "name": name,
                    "side": side,
                    "text": _text(row, f"{side}_output"),
                    "stopped": row.get(f"{side}_stopped"),
                }
                for side, name in sides
            ],
        }
        for row in rows[:SHOWN_SAMPLES]
    ]
    stopped = {side: sum(row.get(f"{side}_stopped") is True for row in rows) for side, _ in sides}
    return {
        "rows": samples,
        "count": len(rows),
        "split": str(dig(facts.samples, "split") or ""),
        "limit": format_count(dig_number(facts.samples, "max_new_tokens")),
        "stopped": stopped,
        "shares": {side: format_share(count, len(rows)) or "none" for side, count in stopped.items()},
    }


def _text(row: Json, key: str) -> str:
    value = row.get(key)
    return "" if value is None else str(value)
