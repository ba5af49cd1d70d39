"""Numbers and results in words, for every report.

Owns units, rounding and the sentence that says whether the adapter helped.
"""

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from loralab.reports.facts import Facts, dig, dig_number
from loralab.run import Json

MISSING = "\u2013"
SPACE = "\u00a0"
FEW_ROWS = 30
ROUND_FROM = 1000
MINUTE, HOUR, DAY = 60, 3600, 86400

Outcome = Literal["better", "worse", "none", "unknown", "missing"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the adapter is better than the base model.

    Attributes:
        outcome: `none` when no difference was seen, `unknown` without an interval or a verdict, `missing` without an
            evaluation.
        headline: the answer in a few words.
        sentence: the difference with its interval.
        caveats: what weakens the result.
    """

    outcome: Outcome
    headline: str
    sentence: str
    caveats: tuple[str, ...] = ()


def format_count(value: float | None) -> str:
    """Return a count with separators: 12,345."""
    return MISSING if value is None else f"{value:,.0f}"


def format_parameters(value: float | None) -> str:
    """Return a large count in three digits: 134 million."""
    if value is None:
        return MISSING
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g}{SPACE}{name}"
    return format_count(value)


def format_bytes(value: float | None) -> str:
    """Return a size in binary units: 3.2 GiB."""
    if value is None:
        return MISSING
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log2(value) // 10), len(units) - 1) if value >= 1 else 0
    digits = 0 if power == 0 else 1
    return f"{value / 1024**power:,.{digits}f}{SPACE}{units[power]}"


def format_seconds(value: float | None) -> str:
    """Return a duration in its two largest units: 3 h 12 min."""
    if value is None:
        return MISSING
    if value < 10:
        return f"{value:.2f}{SPACE}s"
    if round(value) < MINUTE:
        return f"{value:.0f}{SPACE}s"
    total = round(value)
    for size, name, small, small_name in ((DAY, "d", HOUR, "h"), (HOUR, "h", MINUTE, "min"), (MINUTE, "min", 1, "s")):
        if total >= size:
            return f"{total // size}{SPACE}{name} {total % size // small}{SPACE}{small_name}"
    return f"{total}{SPACE}s"


def format_share(part: float | None, whole: float | None) -> str:
    """Return `part / whole` in percent, never rounded up to all; empty where it says nothing."""
    if not part or not whole:
        return ""
    percent = 100 * part / whole
    if percent < 10:
        return f"{percent:.2g}{SPACE}%"
    text = f"{percent:.0f}" if percent <= 99 or part == whole else f"{min(percent, 99.99):.4g}"
    return f"{text}{SPACE}%"


def format_number(value: float | None, digits: int = 4) -> str:
    """Return a number with `digits` significant digits and separators; small ones as 2e-5."""
    if value is None:
        return MISSING
    if value == 0 or 1e-3 <= abs(value) < 1e7:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
        text = f"{value:,.{decimals}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def format_measured(
    value: float | None, low: float | None = None, high: float | None = None, *, signed: bool = False
) -> str:
    """Return a figure with as many decimals as its interval is worth; in four digits without an interval.

    Args:
        value: the figure.
        low: lower bound of its interval.
        high: upper bound.
        signed: write the plus of a difference.
    """
    if value is None:
        return MISSING
    if low is None or high is None or high <= low or max(abs(value), high - low) < 1e-4:
        plus = "+" if signed and value > 0 else ""
        return plus + format_number(value)
    # Of shares, three decimals in any case, as logs have them; of others a digit more than the interval needs.
    share = max(abs(value), abs(low), abs(high)) <= 1
    decimals = _decimals(high - low, least=3) if share else _decimals((high - low) / 10, least=0)
    return f"{value:{'+' if signed else ''},.{decimals}f}"


def format_interval(low: float | None, high: float | None, *, signed: bool = False) -> str:
    """Return the bounds of an interval, rounded as its figure is; empty where there is none."""
    if low is None or high is None:
        return ""
    return " to ".join(format_measured(bound, low, high, signed=signed) for bound in (low, high))


def format_loss(value: float | None) -> str:
    """Return a loss: three decimals where they say enough, else four digits."""
    if value is None:
        return MISSING
    return f"{value:.3f}" if 0.01 <= abs(value) < ROUND_FROM or value == 0 else format_number(value)


def format_perplexity(value: float | None) -> str:
    """Return a perplexity: two decimals below 1000, else four digits."""
    if value is None:
        return MISSING
    return f"{value:.2f}" if abs(value) < ROUND_FROM else format_number(value)


def format_time(value: Any) -> str:
    """Return an ISO time as `2025-01-31 13:28 UTC`; other text as it stands."""
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        return str(value) if value else MISSING
    if moment.tzinfo is None:
        return f"{moment:%Y-%m-%d %H:%M}"
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def format_value(value: Any) -> str:
    """Return a configuration value as YAML would show it in one line."""
    if isinstance(value, str):
        return value if value and value.isprintable() else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}" if abs(value) < 1e7 else f"{value:g}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return json.dumps(value, ensure_ascii=False, default=str)


def assess(facts: Facts) -> Verdict:
    """Return whether the adapter helped, by the loss of both on the same rows."""
    evaluation = facts.evaluation
    change = dig_number(evaluation, "difference", "eval_loss")
    if change is None:
        return _not_measured(facts)
    low, high = dig_number(evaluation, "difference", "low"), dig_number(evaluation, "difference", "high")
    split = dig(evaluation, "split")
    where = f"on the {split} split" if split else "on the evaluated rows"
    rows = dig_number(evaluation, "num_examples")
    counted = f", {format_count(rows)} row{'' if rows == 1 else 's'}" if rows is not None else ""
    caveats = tuple(_caveats(facts, rows))
    direction = "lower" if change < 0 else "higher"
    if low is None or high is None:
        sentence = f"Loss is {direction} by {format_loss(abs(change))} nats per token; there is no interval{counted}."
        return Verdict("unknown", f"Loss {where} is {direction}; how sure that is was not measured", sentence, caveats)
    return _judged(evaluation, change, low, high, where=where, counted=counted, caveats=caveats)


def _judged(
    evaluation: Json, change: float, low: float, high: float, *, where: str, counted: str, caveats: tuple[str, ...]
) -> Verdict:
    """Return the verdict that the evaluation holds, in words; it is not judged again here."""
    level = f"{100 * (dig_number(evaluation, 'difference', 'level') or 0.95):.4g}{SPACE}% interval"
    decimals = _decimals(high - low)
    direction = "lower" if change < 0 else "higher"
    said = f"Loss is {direction} by {abs(change):.{decimals}f} nats per token"
    judged = str(dig(evaluation, "difference", "verdict") or "")
    if judged in ("better", "worse"):
        near, far = sorted((abs(low), abs(high)))
        sentence = f"{said} ({level} {near:.{decimals}f} to {far:.{decimals}f}{counted})."
        headline = f"Yes: loss {where} is lower"
        if judged == "worse":
            headline = f"No: loss {where} is higher than the base model\u2019s"
        return Verdict("better" if judged == "better" else "worse", headline, sentence, caveats)
    span = f"{level} of the change from {low:+.{decimals}f} to {high:+.{decimals}f}{counted}"
    if low <= 0 <= high:
        return Verdict("none", "No difference seen", f"{said}, within chance: {span}.", caveats)
    if judged:
        why = str(dig(evaluation, "difference", "reason") or "the tests do not agree")
        return Verdict("none", "No difference seen", f"{said}, which may be chance: {why}; {span}.", caveats)
    # A record of an earlier version: an interval alone does not decide.
    headline = f"Loss {where} is {direction}; whether by more than chance was not judged"
    return Verdict("unknown", headline, f"{said}; {span}.", caveats)


def _decimals(width: float, *, least: int = 2) -> int:
    """Return how many decimals show an interval of this width with two digits."""
    return 3 if width <= 0 else min(max(1 - math.floor(math.log10(width)), least), 6)


def _caveats(facts: Facts, rows: float | None) -> list[str]:
    split = dig(facts.evaluation, "split")
    training = dig(facts.config, "training") or {}
    caveats = []
    if split == "train":
        caveats.append("These rows were trained on: this shows fit, not how new rows are answered.")
    if split == "validation" and (dig(training, "load_best_model_at_end") or dig(training, "early_stopping")):
        caveats.append(
            "The same rows chose when to stop or which checkpoint to keep, which flatters the adapter a bit."
        )
    if rows is not None and 1 < rows < FEW_ROWS:  # of one row there is no interval
        caveats.append(f"Few rows ({format_count(rows)}): the interval is rough.")
    return caveats


def _not_measured(facts: Facts) -> Verdict:
    status = facts.record.get("status")
    data = dig(facts.config, "data")
    if facts.evaluation:
        why = "The evaluation holds no finite difference between adapter and base model."
    elif status in ("interrupted", "failed", "running"):
        why = f"The run has no final evaluation; its status is \u201c{status}\u201d."
    elif data and dig(data, "validation") is None and dig(data, "test") is None:
        why = "The run has no validation and no test data."
    else:
        why = "There is no evaluation.json in the run folder; `loralab eval` writes one."
    return Verdict("missing", "Not measured", why)
