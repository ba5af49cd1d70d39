"""What the page of a run says of its comparison: how far base and adapter are apart, and what was forgotten.

Owns the choice from `comparison.json`; the page of the comparison itself is `comparison_page.py`'s.
"""

from loralab.reports.facts import Facts, dig, dig_number, dig_table
from loralab.reports.wording import MISSING, format_count, format_interval, format_measured, format_perplexity
from loralab.run import Json

DISTANCES = {
    "kl_base_adapter": "KL(base \u2016 adapter), nats",
    "kl_adapter_base": "KL(adapter \u2016 base), nats",
    "jensen_shannon": "Jensen-Shannon, nats",
    "top1_agreement": "Same most likely token",
}
PLACES = {"last_prompt_token": "Last token of the prompt", "answer": "Tokens of the answer"}


def describe_comparison(facts: Facts) -> Json | None:
    """Return the totals of the comparison with intervals, and the probe; None where nothing was compared."""
    found = facts.comparison
    totals = dig_table(found, "totals")
    places = {name: words for name, words in PLACES.items() if dig_table(totals, name)}
    if not places:
        return None
    if list(places) == ["answer"]:  # of plain text nothing was asked
        places["answer"] = "Tokens of the text"
    page = facts.folder.comparison_page
    return {
        "split": str(found.get("split") or ""),
        "rows": format_count(dig_number(found, "examples")),
        "places": [
            f"{words} (n = {format_count(dig_number(totals, name, 'count'))})" for name, words in places.items()
        ],
        "distances": [
            (label, [_mean(dig_table(totals, place, key)) for place in places])
            for key, label in DISTANCES.items()
            if any(dig_table(totals, place, key) for place in places)
        ],
        "method": str(totals.get("method") or ""),
        "same": _same_answers(dig_table(found, "generation")),
        "probe": _probe(dig_table(found, "probe")),
        "page": page.name if page.is_file() else "",
    }


def _mean(figure: Json) -> tuple[str, str]:
    value, low, high = (dig_number(figure, key) for key in ("mean", "low", "high"))
    # JSON has no infinity and writes null; a distance is never anything else that is no number.
    shown = format_measured(value, low, high) if value is not None or not figure else "infinite"
    return shown, format_interval(low, high)


def _same_answers(generation: Json) -> str:
    share, prompts = dig_number(generation, "same_answer"), dig_number(generation, "prompts")
    if share is None or prompts is None:
        return ""
    return f"{format_count(share * prompts)} of {format_count(prompts)} prompts were answered alike."


def _probe(probe: Json) -> Json | None:
    reading = str(probe.get("reading") or "")
    if not reading:
        return None
    pairs = [
        ("Passages", format_count(dig_number(probe, "rows"))),
        ("Tokens", format_count(dig_number(probe, "tokens"))),
        ("Perplexity of the base", format_perplexity(dig_number(probe, "base_perplexity"))),
        ("Perplexity with the adapter", format_perplexity(dig_number(probe, "adapter_perplexity"))),
        ("Same most likely token", _mean(dig_table(probe, "top1_agreement"))[0]),
    ]
    return {
        "name": str(dig(probe, "name") or ""),
        "reading": reading[:1].upper() + reading[1:].rstrip(".") + ".",
        "outcome": "worse" if dig(probe, "difference", "verdict") == "worse" and not probe.get("note") else "none",
        "own": bool(probe.get("note")),
        "facts": [(name, value) for name, value in pairs if value != MISSING],
    }
