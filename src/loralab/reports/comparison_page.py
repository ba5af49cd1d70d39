"""The page of a comparison: figures, the probe, and every prompt with both answers and what differs in them.

Owns what the page shows and how differing words are found. All of it comes from `comparison.json`'s data.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from loralab.reports.html import render_page
from loralab.reports.pictures import Address, PictureBook, images_in, no_pictures, shown_images
from loralab.reports.wording import MISSING, format_number, format_perplexity

TEMPLATE = "comparison.html.jinja"
# With more prompts than this a page is no use to anybody; the file has all.
_SHOWN_PROMPTS = 300
# Finding differences takes the product of both lengths, in words.
_MARKED_WORDS = 3000
_LINE = 110
# A word with the blanks behind it; of scripts without blanks, each character.
_ALONE = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_ALONE}]\s*|[^\W{_ALONE}]+\s*|\W\s*")

_NAMES = {
    "kl_base_adapter": "KL(base ‖ adapter), nats",
    "kl_adapter_base": "KL(adapter ‖ base), nats",
    "jensen_shannon": "Jensen-Shannon, nats",
    "l2_logits": "L2 of logits",
    "l2_logits_centred": "L2 of logits, constant taken off",
    "l2_probabilities": "L2 of probabilities",
    "top1_agreement": "Same most likely token",
}
Piece = tuple[str, bool]


def render_comparison(result: Mapping[str, Any], address: Address = no_pictures) -> str:
    """Return the page of a comparison.

    Args:
        result: the content of `comparison.json`.
        address: gives the data URI of a picture by the hash of its file, or None.
    """
    return render_page(TEMPLATE, comparison_context(result, address))


def shown_prompts(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the records that the page shows, in its order."""
    return sorted(result["prompts"], key=lambda record: -_sortable(record["kl_divergence"]))[:_SHOWN_PROMPTS]


def comparison_context(result: Mapping[str, Any], address: Address = no_pictures) -> dict[str, Any]:
    """Return the variables of the page's template."""
    shown = shown_prompts(result)
    book = PictureBook(address, shown_images(shown))
    totals = result["totals"]
    tokens = "Tokens of the answer" if totals["last_prompt_token"] is not None else "Tokens of the text"
    return {
        "split": result["split"],
        "examples": f"{result['examples']:,} of {result['of_examples']:,} rows",
        "measured_at": result["measured_at"],
        "asked": totals["last_prompt_token"] is not None,
        "columns": [
            (name, f"{totals[part]['count']:,}")
            for part, name in (("last_prompt_token", "Last prompt token"), ("answer", tokens))
            if totals[part] is not None
        ],
        "distances": [
            (label, [_interval(totals[part][key]) for part in ("last_prompt_token", "answer") if totals[part]])
            for key, label in _NAMES.items()
        ],
        "method": totals["method"],
        "generation": _generation(result["generation"]),
        "max_new_tokens": result["max_new_tokens"],
        "probe": _probe(result["probe"]),
        "prompts": [
            _prompt(record, number) | {"beginning": own, "images": book.show(images_in(record))}
            for number, (record, own) in enumerate(zip(shown, own_parts(_texts(shown)), strict=True), 1)
        ],
        "held": book.held,
        "more": len(result["prompts"]) - len(shown),
    }


def mark_differences(base: str, adapter: str) -> tuple[list[Piece], list[Piece]] | None:
    """Return two texts in pieces, each with whether it differs from the other text; None where they are too long.

    Args:
        base: one text.
        adapter: the other.
    """
    words = _WORD.findall(base), _WORD.findall(adapter)
    if max(map(len, words)) > _MARKED_WORDS:
        return None
    sides: tuple[list[Piece], list[Piece]] = ([], [])
    # autojunk would leave words out that occur often.
    for kind, *spans in SequenceMatcher(None, *words, autojunk=False).get_opcodes():
        for side, own, start, end in zip(sides, words, spans[::2], spans[1::2], strict=True):
            if start < end:
                side.append(("".join(own[start:end]), kind != "equal"))
    return sides


def _sortable(value: float | None) -> float:
    return math.inf if value is None else value  # JSON has no infinity and writes null


def _interval(figure: Mapping[str, float | None]) -> tuple[str, str]:
    low, high = figure["low"], figure["high"]
    interval = "" if low is None or high is None else f"{_number(low)} to {_number(high)}"
    return _number(figure["mean"]), interval


def _number(value: float | None) -> str:
    # Distances are never nan: what JSON could not hold was infinite.
    return format_number(value, 3) if value is not None and math.isfinite(value) else "infinite"


def _percent(share: float | None) -> str:
    if share is None or not math.isfinite(share):
        return MISSING
    return f"{100 * share:.0f}\u00a0%"


def _generation(generation: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if generation is None:
        return []
    return [
        ("Prompts", f"{generation['prompts']:,}"),
        ("Same answer", _percent(generation["same_answer"])),
        ("Base ended by a stop token", _percent(generation["base_stopped"])),
        ("Adapter ended by a stop token", _percent(generation["adapter_stopped"])),
    ]


def _probe(probe: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if probe is None:
        return None
    return {
        "name": probe["name"],
        "reading": _sentence(probe["reading"]),
        "worse": probe["difference"]["verdict"] == "worse" and not probe.get("note"),
        "own": bool(probe.get("note")),
        "facts": [
            ("Passages", f"{probe['rows']:,}"),
            ("Tokens", f"{probe['tokens']:,}"),
            ("Perplexity of the base", format_perplexity(probe["base_perplexity"])),
            ("Perplexity with the adapter", format_perplexity(probe["adapter_perplexity"])),
            ("KL(base ‖ adapter)", _number(probe["kl_base_adapter"]["mean"])),
            ("Same most likely token", _percent(probe["top1_agreement"]["mean"])),
        ],
    }


def _sentence(reading: str) -> str:
    return f"{reading[:1].upper()}{reading[1:]}.".replace(" %", "\u00a0%")


def _prompt(record: Mapping[str, Any], number: int) -> dict[str, Any]:
    answered = record["base_output"] is not None
    marked = mark_differences(record["base_output"], record["adapter_output"]) if answered else None
    sides = marked or ([(record["base_output"], False)], [(record["adapter_output"], False)])
    return {
        "number": number,
        "row": record["row"] if record.get("window") is None else f"{record['row']}.{record['window']}",
        "title": _title(record),
        "prompt": record["prompt"],
        "reference": record["reference"],
        "figures": _record_figures(record),
        "kl": _number(record["kl_divergence"]),
        "l2": _number(record["l2_distance"]),
        "agreement": _agreement(record),
        "answered": answered,
        "same": answered and record["first_difference"] is None,
        "unmarked": answered and marked is None,
        "answers": [
            {"name": name, "kind": kind, "pieces": pieces, "stopped": record[f"{kind}_stopped"]}
            for name, kind, pieces in zip(("Base", "Adapter"), ("base", "adapter"), sides, strict=True)
        ],
    }


def _title(record: Mapping[str, Any]) -> str:
    window = record.get("window")
    return f"Row {record['row']}" + (f", window {window}" if window is not None else "")


def _agreement(record: Mapping[str, Any]) -> str:
    if record["last_prompt_token"] is None:
        return _percent(record["top1_agreement"])
    return "yes" if record["top1_agreement"] else "no"


def _record_figures(record: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    parts: Sequence[Mapping[str, Any]] = [
        part for part in (record["last_prompt_token"], record["answer"]) if part is not None
    ]
    return [(label, [_number(part[key]) for part in parts]) for key, label in _NAMES.items()]


def _texts(records: Sequence[Mapping[str, Any]]) -> list[str]:
    return [record["prompt"] or record["reference"] for record in records]


def own_parts(texts: Sequence[str]) -> list[str]:
    """Return of each text, on one short line, what is not a template's: what few others begin or end with.

    Args:
        texts: any number of them.
    """
    words = [text.split() for text in texts]
    before, behind = _common(words), _common([own[::-1] for own in words])
    parts = (own[start : max(len(own) - end, start)] for own, start, end in zip(words, before, behind, strict=True))
    return [_short(" ".join(part or own)) for part, own in zip(parts, words, strict=True)]


def _common(words: Sequence[Sequence[str]]) -> list[int]:
    """Return of how many words each text's longest beginning is that a quarter of all texts begin with."""
    enough = max(2, len(words) // 4)
    lengths = [0] * len(words)
    going = dict.fromkeys(range(len(words)), 0)  # which beginning each has: the same number for the same words
    while going:
        longer = {n: (start, words[n][lengths[n]]) for n, start in going.items() if lengths[n] < len(words[n])}
        counts = Counter(longer.values())
        numbers = {beginning: number for number, beginning in enumerate(counts)}
        going = {n: numbers[beginning] for n, beginning in longer.items() if counts[beginning] >= enough}
        for n in going:
            lengths[n] += 1
    return lengths


def _short(text: str) -> str:
    return text if len(text) <= _LINE else f"{text[: _LINE - 3]}..."
