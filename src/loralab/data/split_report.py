"""What `data.json` says of a split: rows read, kept, dropped and noted, with their numbers.

Owns the report of one split and the limit on dropped rows. Figures that need more than the store
(duplicates, overlap, layouts) are `survey.py`'s.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from loralab.config.schema import DataConfig
from loralab.data.reading.sources import Source
from loralab.data.splits import Indices
from loralab.data.tokens.packing import Integers
from loralab.data.tokens.store import TokenStore
from loralab.data.tokens.tokenize import NOTES
from loralab.errors import DataError

# How many rows are listed by number for each reason; their count is always whole.
LISTED_ROWS = 1000
_PERCENTILES = (0, 50, 90, 99, 100)
# What a person should hear of at once, and how it is said.
_SPOKEN = {
    "truncated": "cut at max_length: {count} (these do not learn to stop)",
    "turns_dropped": "oldest turns left out {count}",
    "turns_cut": "later turns left out at max_length {count}",
    "end_left_out": "messages behind the last answer left out {count}",
    "answer_altered": "answers that the template alters {count}",
    "reasoning_left_out": "reasoning that the template leaves out {count}",
    "system_left_out": "system messages that the template leaves out {count}",
    "question_altered": "questions that the template alters {count}",
    "tools_left_out": "tools that the template leaves out {count}",
    "no_stop": "answers without a stop token {count}",
    "empty_answer": "empty answers {count}",
}


def report_split(
    store: TokenStore, units: Indices, stored: dict[str, Any], *, sources: Sequence[Source]
) -> dict[str, Any]:
    """Return the report of one split.

    Args:
        store: the rows that were kept.
        units: numbers of all units of the split, dropped ones included.
        stored: the report of the store that the split is a part of.
        sources: of that store.
    """
    inside = np.zeros(int(stored["units"]), dtype=bool)
    inside[units] = True
    dropped = [entry for entry in stored["dropped"] if inside[entry[0]]]
    lengths = store.lengths() if len(store) else np.zeros(1, dtype=np.int64)
    counts = {note: store.count(note) for note in NOTES}
    return {
        "source_rows": stored["rows"],
        "rows_read": len(units),
        "rows_kept": len(store),
        "dropped": dict(Counter(reason for _, _, _, reason in dropped)),
        "dropped_rows": [
            {"source": sources[index].name, "row": row, "reason": reason}
            for _, index, row, reason in dropped[:LISTED_ROWS]
        ],
        "truncated": counts["truncated"],
        "empty_answers": counts["empty_answer"],
        "notes": {note: count for note, count in counts.items() if count},
        "noted_rows": {note: _list_rows(store, note, sources) for note, count in counts.items() if count},
        "supervised_tokens": int(store.supervised().sum()) if len(store) else 0,
        "total_tokens": int(lengths.sum()) if len(store) else 0,
        "length_percentiles": {f"p{p}": int(np.percentile(lengths, p)) for p in _PERCENTILES},
        **({"pictures": report_pictures(store)} if store.has_images else {}),
    }


def report_pictures(store: TokenStore) -> dict[str, Any]:
    """Return what is counted of a split's pictures.

    Args:
        store: the rows that were kept.

    Returns:
        `distinct` pictures, told by their bytes; `uses` of them in prompts and the `tokens` of all uses;
        percentiles of a use's tokens, and of the distinct pictures' width, height and pixels; the `largest`.
    """
    files, tokens = store.images(), store.image_tokens()
    if not files:
        return {"distinct": 0, "uses": 0, "tokens": 0}
    largest = max(files, key=lambda file: file.width * file.height)
    sizes: dict[str, Sequence[int] | Integers] = {
        "tokens": tokens,
        "width": [file.width for file in files],
        "height": [file.height for file in files],
        "pixels": [file.width * file.height for file in files],
    }
    return {
        "distinct": len(files),
        "uses": len(tokens),
        "tokens": int(tokens.sum()),
        **{f"{name}_percentiles": _percentiles(values) for name, values in sizes.items()},
        "largest": {"path": largest.path, "width": largest.width, "height": largest.height},
    }


def _percentiles(values: Sequence[int] | Integers) -> dict[str, int]:
    return {f"p{p}": int(np.percentile(values, p)) for p in _PERCENTILES}


def _list_rows(store: TokenStore, note: str, sources: Sequence[Source]) -> list[dict[str, Any]]:
    origins = store.select(store.noted(note)[:LISTED_ROWS]).origins
    return [{"source": sources[int(index)].name, "row": int(row)} for index, row in origins]


def check_dropped(name: str, report: dict[str, Any], data: DataConfig) -> None:
    """Check that no more of a split was dropped than may be.

    Raises:
        DataError: more than `data.max_dropped_fraction`, or everything.
    """
    read, kept = report["rows_read"], report["rows_kept"]
    share = (read - kept) / read if read else 1.0
    if kept and share <= data.max_dropped_fraction:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items()) or "no rows"
    first: Sequence[Any] = [entry["row"] for entry in report["dropped_rows"][:5]]
    listed = f"; first rows: {', '.join(map(str, first))}" if first else ""
    limit = "" if not kept else f" (at most {data.max_dropped_fraction:.0%} may be, data.max_dropped_fraction)"
    too_long = any("too_long" in reason for reason in report["dropped"])
    fix = f"raise data.max_length (now {data.max_length})" if too_long else "mend these rows"
    if too_long and report.get("pictures"):
        fix = f"set data.image.max_pixels, which makes pictures fewer tokens, or {fix}"
    elif "prompt_too_long" in report["dropped"]:
        fix += ", let conversations lose their oldest turns (data.truncation: left)"
    raise DataError(
        f"{read - kept} of {read} {name} rows dropped{limit}: {reasons}",
        where=f"split {name}{listed}",
        fix=f"{fix}{', or raise data.max_dropped_fraction' if kept else ''}",
    )


def describe_split(name: str, report: dict[str, Any]) -> str:
    """Return the line that a person reads on a split."""
    parts = [f"{name}: {report['rows_kept']:,} rows", f"{report['supervised_tokens']:,} supervised tokens"]
    if "pictures" in report:
        parts.append(describe_pictures(report["pictures"]))
    if report["dropped"]:
        parts.append("dropped " + ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items()))
    parts += [text.format(count=report["notes"][note]) for note, text in _SPOKEN.items() if note in report["notes"]]
    return ", ".join(parts)


def describe_pictures(pictures: dict[str, Any]) -> str:
    """Return in a few words how many pictures a split has, and what they take."""
    words = f"{pictures['distinct']:,} pictures used {pictures['uses']:,} times"
    if not pictures["uses"]:
        return "no pictures"
    low, high = (pictures["tokens_percentiles"][name] for name in ("p0", "p100"))
    return f"{words}, {low:,} to {high:,} tokens each" if low < high else f"{words}, {low:,} tokens each"
