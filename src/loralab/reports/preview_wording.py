"""The words of a preview, for terminal and page alike.

Owns labels and sentences about rows, splits, epochs and proofs, made of the preview's data alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_SHOWN_ROWS = 8
_DUPLICATES = {
    "same_row": "copies of an earlier row",
    "same_prompt_other_answer": "rows whose prompt has another answer too",
}

# Of bad rows, so many are told why they are bad; `--json` has all that are listed.
_EXPLAINED = 20


def describe_row(row: Mapping[str, Any]) -> str:
    """Return where a row stands and what became of it."""
    where = f"{row['source']} row {row['row']}"
    if row["status"] == "dropped":
        return f"{where}: dropped, {row['reason'] or 'with its split'}"
    notes = f"; {', '.join(row['notes'])}" if row["notes"] else ""
    return f"{where}: {row['split']}, {row['length']:,} tokens, {row['supervised']:,} carry loss{notes}"


def describe_turn(turn: Mapping[str, Any], number: int) -> str:
    """Return the lengths of one answer of several and its prompt."""
    seen = f", of which {turn['seen_tokens']:,} stand above" if turn["seen_tokens"] else ""
    return f"answer {number}: prompt {turn['prompt_tokens']:,} tokens{seen}, answer {turn['answer_tokens']:,}"


def split_table(splits: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Return the figures of all splits: a label, and the figure of each split."""
    rows = [
        ("rows read", "rows_read"),
        ("rows kept", "rows_kept"),
        ("tokens", "total_tokens"),
        ("tokens that carry loss", "supervised_tokens"),
        ("answers", "answers"),
    ]
    table = [(label, [f"{facts[key]:,}" for facts in splits.values()]) for label, key in rows]
    table.append(("end with a stop token", [f"{facts['stop_token_share']:.1%}" for facts in splits.values()]))
    names = list(dict.fromkeys(name for facts in splits.values() for name in facts["length_percentiles"]))
    for name in names:
        table.append((f"length {name}", [f"{facts['length_percentiles'].get(name, 0):,}" for facts in splits.values()]))
    return table


def describe_epoch(epoch: dict[str, Any]) -> list[str]:
    """Return what is said of an epoch."""
    alone, shared = epoch["tokens_without_sharing"], epoch["tokens_with_sharing"]
    sampled = epoch["laid_out_steps"] < epoch["steps"]
    basis = f"from {epoch['laid_out_steps']:,} of {epoch['steps']:,} steps" if sampled else "all steps laid out"
    basis = f"{basis}, sampling {epoch['sampling']}, token budget {epoch['token_budget']:,}"
    return [
        f"an epoch: {epoch['rows']:,} rows in {epoch['steps']:,} steps of {epoch['rows_per_step']}, "
        f"{epoch['supervised_tokens']:,} tokens carry loss; the run: {epoch['total_steps']:,} steps",
        f"tokens of an epoch: {alone:,} without sharing, {shared:,} with shared prefixes "
        f"({shared / max(alone, 1):.0%}; {basis})",
    ]


def describe_lists(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each kind of rows that a person may want to look up."""
    for name, facts in report["splits"].items():
        for reason, count in facts["dropped"].items():
            rows = [entry for entry in facts["dropped_rows"] if entry["reason"] == reason]
            yield f"{name}: dropped, {reason} ({count:,}): {list_places(rows, count)}"
            for entry in [entry for entry in rows if entry.get("why")][:_EXPLAINED]:
                yield f"{name}: {entry['source']} row {entry['row']}: {entry['why']}"
        for note, rows in facts["noted_rows"].items():
            yield f"{name}: {note} ({facts['notes'][note]:,}): {list_places(rows, facts['notes'][note])}"
        for kind, words in _DUPLICATES.items():
            found = facts["duplicates"][kind]
            if found["count"]:
                yield f"{name}: {words} ({found['count']:,}): {list_places(found['rows'], found['count'])}"
    for overlap in report["overlaps"]:
        first, second = overlap["splits"]
        for kind, words in (("same_row", "rows that"), ("same_prompt", "rows whose prompt")):
            count = overlap[kind]["count"]
            more = f": {list_places(overlap[kind]['rows'], count)}" if count else ""
            yield f"{second}: {words} {first} has too ({count:,} of {overlap['rows']:,}){more}"


def describe_pictures(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line on the pictures of each split that has any."""
    for name, facts in report["splits"].items():
        pictures = facts.get("pictures")
        if not pictures or not pictures["uses"]:
            continue
        sizes = [_spread(pictures[f"{side}_percentiles"], side) for side in ("width", "height")]
        each = _spread(pictures["tokens_percentiles"], "each")
        distinct, uses = _counted(pictures["distinct"], "picture"), _counted(pictures["uses"], "time")
        largest = pictures["largest"]
        yield (
            f"{name}: {distinct}, used {uses}, {pictures['tokens']:,} tokens in all, {each}; {'; '.join(sizes)}; "
            f"the largest is {largest['width']} x {largest['height']}: {largest['path']}"
        )


def _spread(percentiles: Mapping[str, int], name: str) -> str:
    low, middle, high = (percentiles[place] for place in ("p0", "p50", "p100"))
    return f"{name} {low:,}" if low == high else f"{name} {low:,} to {high:,} (median {middle:,})"


def list_places(rows: Sequence[Mapping[str, Any]], count: int) -> str:
    """Return the first rows of a list as text, their source said once.

    Args:
        rows: with source and row.
        count: how many there are in all.
    """
    parts: list[str] = []
    last = None
    shown = list({(row["source"], row["row"]): row for row in rows}.values())[:_SHOWN_ROWS]
    for row in shown:
        parts.append(str(row["row"]) if row["source"] == last else f"{row['source']} row {row['row']}")
        last = row["source"]
    return ", ".join(parts) + (", ..." if count > len(shown) else "")


def describe_finding(entry: Mapping[str, Any]) -> str:
    """Return place and sight of one finding."""
    place = f" row {entry['row']}" if entry["row"] else ""
    return f"{entry['source']}{place}: {entry['what']}"


def describe_proofs(proofs: Mapping[str, Any]) -> str:
    """Return the verdict over all proofs, and how much was proven."""
    part = "all" if proofs["rows"] == proofs["stored_rows"] else f"{proofs['rows']:,} of {proofs['stored_rows']:,}"
    read = proofs.get("pictures", 0)
    pictures = f"{_counted(read, 'picture')} read by the model's processor, " if read else ""
    verdict = f"{_counted(proofs['errors'], 'failed proof')}" if proofs["errors"] else "no proof failed"
    return (
        f"{verdict}, {_counted(proofs['warnings'], 'warning')}; {part} rows proven ({proofs['spans']:,} spans, "
        f"{pictures}{proofs['rows_per_second']:,} rows/s)"
    )


def _counted(count: int, name: str) -> str:
    return f"{count:,} {name}{'' if count == 1 else 's'}"
