"""The examples that a reader of a run should see: where the adapter gained most, lost most, and its worst.

Owns which of `predictions.jsonl` are shown and how much of them.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.errors import RunFolderError
from loralab.reports.facts import Facts, dig, dig_number, dig_table
from loralab.reports.pictures import images_in
from loralab.reports.wording import format_count, format_number
from loralab.run import Json

SHOWN = 5
# Metrics whose scores in predictions.jsonl are minus what is measured, and what that is.
MINUS_SCORES = {"number": "absolute error", "calibration": "Brier score", "repetition": "repeated share of an answer"}
SIDES = (("base", "Base model"), ("adapter", "Adapter"))
# Characters shown of a prompt's beginning and end, and of an answer.
PROMPT_BEGINNING, PROMPT_END, ANSWER = 240, 560, 800


def read_predictions(path: Path) -> Iterator[Json]:
    """Yield the records of `predictions.jsonl`; a last line that a kill cut short is left out.

    Raises:
        RunFolderError: another line is no JSON object.
    """
    if not path.is_file():
        return
    # Not `splitlines`: texts may hold what Python takes for ends of lines.
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    last = max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            if number == last:
                return
            record = None
        if not isinstance(record, dict):
            raise RunFolderError(
                f"line {number} is no JSON object", where=str(path), fix="remove that line, or write the file again"
            )
        yield record


def describe_examples(facts: Facts) -> Json | None:
    """Return the examples to show, or None where no metric scores single answers.

    Args:
        facts: the run.

    Raises:
        RunFolderError: `predictions.jsonl` is broken.
    """
    records = list(read_predictions(facts.folder.predictions))
    metric = scoring_metric(records)
    if metric is None:
        return None
    scored = [(record, scores) for record in records if (scores := _scores(record, metric)) is not None]
    groups = choose_examples([scores for _, scores in scored])
    measured = _measured_as(facts, metric)
    return {
        "metric": metric,
        "measured": measured or "",
        "better": "higher" if measured is None else "smaller",
        "count": format_count(len(scored)),
        "groups": [
            {
                "title": title,
                "of": format_count(count),
                "rows": [_example(*scored[place], sign=1 if measured is None else -1) for place in places],
            }
            for title, count, places in groups
            if places
        ],
    }


def _measured_as(facts: Facts, metric: str) -> str | None:
    """Return what a metric's scores are minus of, or None where they are scores as they stand."""
    if metric in MINUS_SCORES:
        return MINUS_SCORES[metric]
    # A function of the user's own gives its figure the function's name.
    figure = metric.partition(":")[2]
    better = (dig(side, "metrics", figure, "better") for side in (facts.evaluation, dig(facts.evaluation, "base")))
    return "its value" if figure and "lower" in better else None


def scoring_metric(records: Iterable[Mapping[str, Any]]) -> str | None:
    """Return the first metric that has a score for some answer of both sides, or None."""
    names = dict.fromkeys(name for record in records for name in dig_table(record, "adapter", "scores"))
    return next((name for name in names if any(_scores(record, name) is not None for record in records)), None)


def _scores(record: Mapping[str, Any], metric: str) -> tuple[float, float] | None:
    base, adapter = (dig_number(record, side, "scores", metric) for side, _ in SIDES)
    return None if base is None or adapter is None else (base, adapter)


def choose_examples(scores: Sequence[tuple[float, float]]) -> list[tuple[str, int, list[int]]]:
    """Return groups of examples: title, how many examples are of that kind, places of those to show.

    No example stands in two groups. Of equal ones the first are taken.

    Args:
        scores: of base and adapter, higher is better (examples).
    """
    gains = [adapter - base for base, adapter in scores]
    gained = sorted((place for place, gain in enumerate(gains) if gain > 0), key=lambda place: -gains[place])
    lost = sorted((place for place, gain in enumerate(gains) if gain < 0), key=lambda place: gains[place])
    best = max((adapter for _, adapter in scores), default=math.inf)
    # Where all answers are equally good none is the worst.
    worst = sorted((p for p, (_, adapter) in enumerate(scores) if adapter < best), key=lambda place: scores[place][1])
    shown = {*gained[:SHOWN], *lost[:SHOWN]}
    rest = [place for place in worst if place not in shown]
    return [
        ("Where the adapter gained most over the base", len(gained), gained[:SHOWN]),
        ("Where it lost most", len(lost), lost[:SHOWN]),
        ("Its worst answers besides" if shown else "Its worst answers", len(rest), rest[:SHOWN]),
    ]


def _example(record: Json, scores: tuple[float, float], *, sign: int) -> Json:
    return {
        "row": str(record.get("row") if record.get("row") is not None else ""),
        "prompt": clip(_text(record.get("prompt")), PROMPT_BEGINNING, PROMPT_END),
        "reference": clip(_text(record.get("reference")), ANSWER),
        "images": images_in(record),
        "answers": [
            {
                "name": name,
                "side": side,
                "text": clip(_text(dig(record, side, "answer")), ANSWER),
                "stopped": dig(record, side, "stopped"),
                "score": format_number(sign * score),
                "labels": _labels(dig_table(record, side, "label_scores")),
            }
            for (side, name), score in zip(SIDES, scores, strict=True)
        ],
    }


def _labels(scores: Json) -> str:
    known = {label: dig_number(scores, label) for label in scores}
    finite = {label: score for label, score in known.items() if score is not None}
    if not finite:
        return ""
    best = max(finite.values())
    total = sum(math.exp(score - best) for score in finite.values())
    shares = {label: math.exp(score - best) / total for label, score in finite.items()}
    ordered = sorted(shares.items(), key=lambda pair: -pair[1])[:SHOWN]
    return ", ".join(f"{label} {share:.2f}" for label, share in ordered)


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def clip(text: str, beginning: int, end: int = 0) -> str:
    """Return a text with what is too much left out, and its length said there.

    Args:
        text: any text.
        beginning: characters kept of its beginning.
        end: characters kept of its end.
    """
    left_out = len(text) - beginning - end
    if left_out <= 40:  # the notice itself takes as much
        return text
    notice = f" [\u2026 {format_count(left_out)} characters \u2026] "
    return text[:beginning] + notice + (text[-end:] if end else "").lstrip()
