"""The page of a preview: rows as tokens to point at, the data report as pictures, and what the proofs found.

Owns what the page shows and the geometry of its charts. All of it comes from the preview's data.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.errors import StorageError
from loralab.reports.html import render_page
from loralab.reports.pictures import PictureBook
from loralab.reports.preview_wording import (
    describe_epoch,
    describe_lists,
    describe_pictures,
    describe_proofs,
    describe_row,
    describe_turn,
    list_places,
    split_table,
)
from loralab.run import write_text

TEMPLATE = "preview.html.jinja"
# A page of more tokens than this for one answer is no use to anybody; the JSON document has all.
_SHOWN_TOKENS = 20_000
_CHART_WIDTH, _CHART_HEIGHT = 360, 110


def write_preview(path: Path, result: Mapping[str, Any], pictures: Mapping[str, str] | None = None) -> Path:
    """Write the page of a preview and return its path.

    Args:
        path: file to write.
        result: of the workflow.
        pictures: data URIs of the rows' pictures, by the hash of their files.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        write_text(path, render_page(TEMPLATE, preview_context(result, pictures)))
    except OSError as error:
        raise StorageError(
            f"cannot write the page: {error.strerror or error}", where=str(path), fix="name another file with --html"
        ) from error
    return path


def preview_context(result: Mapping[str, Any], pictures: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the variables of the page's template."""
    report = result["report"]
    turns = [turn for row in result["rows"] for turn in row.get("turns", [])]
    book = PictureBook((pictures or {}).get, [image for turn in turns for image in _pictures(turn)])
    return {
        "title": result["name"],
        "failed": bool(result["proofs"]["errors"]),
        "verdict": describe_proofs(result["proofs"]),
        "findings": [_finding(group) for group in result["findings"]],
        "rows": [_row(row, book) for row in result["rows"]],
        "held": book.held,
        "choices": [
            ("Format", report["format"]["value"], report["format"]["reason"]),
            ("Template", report["template"]["name"], report["template"]["reason"]),
            ("Stop tokens", ", ".join(map(repr, report["stop_tokens"]["texts"])), report["stop_tokens"]["reason"]),
            ("System prompt", repr(report["system_prompt"]) if report["system_prompt"] else "none in common", ""),
        ],
        "template_text": report["template"]["text"],
        "splits": list(report["splits"]),
        "counts": split_table(report["splits"]),
        "charts": [chart for name, facts in report["splits"].items() for chart in _charts(name, facts)],
        "pictures": list(describe_pictures(report)),
        "lists": list(describe_lists(report)),
        "epoch": describe_epoch(report["epoch"]),
    }


def _finding(group: Mapping[str, Any]) -> dict[str, Any]:
    count, rows = group["count"], group["rows"]
    numbers = [row for row in rows if row["row"]]
    return {
        **group,
        "places": list_places(numbers, count) if numbers else "",
        "more": count - len(rows),
        "shown": [
            {**row, "place": f"{row['source']} row {row['row']}" if row["row"] else row["source"]} for row in rows
        ],
    }


def _pictures(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [token["picture"] for token in turn["tokens"] if "picture" in token]


def _row(row: Mapping[str, Any], book: PictureBook) -> dict[str, Any]:
    turns = row.get("turns", [])
    return {
        "heading": describe_row(row),
        "dropped": row["status"] == "dropped",
        "fields": list(row.get("fields", {}).items()),
        "turns": [
            {
                "heading": describe_turn(turn, number) if len(turns) > 1 else "",
                "tokens": [_token(token, place) for place, token in enumerate(turn["tokens"][:_SHOWN_TOKENS])],
                "images": book.show(_pictures(turn)),
                "more": max(len(turn["tokens"]) - _SHOWN_TOKENS, 0),
            }
            for number, turn in enumerate(turns, 1)
        ],
    }


def _token(token: Mapping[str, Any], place: int) -> dict[str, str]:
    if "picture" in token:
        return {
            "kind": "prompt special picture-token",
            "title": f"{_runs(token['ids'])}, no loss",
            "text": token["text"],
        }
    kind = "answer" if token["supervised"] else "prompt"
    kinds = [kind, *(["odd"] if place % 2 else []), *(name for name in ("special", "stop") if token[name])]
    ids = " + ".join(map(str, token["ids"]))
    loss = "the stop token, carries loss" if token["stop"] else "carries loss" if token["supervised"] else "no loss"
    return {"kind": " ".join(kinds), "title": f"{ids}: {token['text']!r}, {loss}", "text": _visible(token["text"])}


def _runs(ids: Sequence[int]) -> str:
    """Return ids with how often each stands one behind the other."""
    return " + ".join(f"{len(list(run))} x {token}" for token, run in itertools.groupby(ids))


def _visible(text: str) -> str:
    """Return text whose blanks and line breaks can be seen; a line may be broken behind a blank."""
    return text.replace("\t", "\u2192\t").replace(" ", "\u00b7\u200b").replace("\n", "\u21b5\n")


def _charts(name: str, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    lengths, coverage = facts["length_histogram"], facts["coverage_histogram"]
    if not any(lengths["counts"]):
        return []
    whole = [f"{edge:,.0f}" for edge in lengths["edges"]]
    last = [f"{edge - 1:,.0f}" for edge in lengths["edges"][1:]]
    shares = [f"{edge:.0%}" for edge in coverage["edges"]]
    return [
        _chart(f"{name}: length in tokens", lengths["counts"], whole[:-1], last),
        _chart(f"{name}: share of a row's tokens that carry loss", coverage["counts"], shares[:-1], shares[1:]),
    ]


def _chart(title: str, counts: Sequence[int], starts: Sequence[str], ends: Sequence[str]) -> dict[str, Any]:
    """Return a column chart: a bar for each bin, and the words that say the same."""
    step, most = _CHART_WIDTH / len(counts), max(counts)
    bars = []
    for place, (count, start, end) in enumerate(zip(counts, starts, ends, strict=True)):
        height = max(_CHART_HEIGHT * count / most, 1.5 if count else 0)
        bars.append(
            {
                "x": round(place * step + 1, 2),
                "y": round(_CHART_HEIGHT - height, 2),
                "width": round(max(step - 2, 1), 2),
                "height": round(height, 2),
                "title": f"{start} to {end}: {count:,} rows",
            }
        )
    spoken = "; ".join(str(bar["title"]) for bar in bars if bar["height"])
    shape = {"width": _CHART_WIDTH, "height": _CHART_HEIGHT}
    return {
        "title": title,
        "bars": bars,
        "first": starts[0],
        "last": ends[-1],
        "most": f"{most:,}",
        "text": spoken,
        **shape,
    }
