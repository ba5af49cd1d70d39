"""Numbers in words, for every report.

Owns units and rounding. Whether the adapter helped is `verdict.py`'s.
"""

import json
import math
from datetime import UTC, datetime
from typing import Any

MISSING = "\u2013"
SPACE = "\u00a0"
ROUND_FROM = 1000
MINUTE, HOUR, DAY = 60, 3600, 86400
# From here on a number is written as 6.3e8.
SCIENTIFIC_FROM = 1e7


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
    if value == 0:
        return "0"  # never -0
    if 1e-3 <= abs(value) < SCIENTIFIC_FROM:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
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
    if max(abs(value), abs(low), abs(high)) >= SCIENTIFIC_FROM:
        plus = "+" if signed and value > 0 else ""
        return plus + format_number(value, 2)
    # Of shares, three decimals in any case, as logs have them; of others a digit more than the interval needs.
    share = max(abs(value), abs(low), abs(high)) <= 1
    decimals = decimals_of(high - low, least=3) if share else decimals_of((high - low) / 10, least=0)
    return format_signed(value, decimals) if signed else _without_minus_zero(f"{value:,.{decimals}f}")


def format_signed(value: float, decimals: int) -> str:
    """Return a change with its sign; what rounds to 0 has none."""
    text = f"{value:+,.{decimals}f}"
    return text if any(digit in text for digit in "123456789") else text[1:]


def _without_minus_zero(text: str) -> str:
    return text if any(digit in text for digit in "123456789") else text.lstrip("-")


def format_interval(low: float | None, high: float | None, *, signed: bool = False) -> str:
    """Return the bounds of an interval, rounded as its figure is; empty where there is none."""
    if low is None or high is None:
        return ""
    return " to ".join(format_measured(bound, low, high, signed=signed) for bound in (low, high))


def format_loss(value: float | None) -> str:
    """Return a loss: three decimals where they say enough, else four digits."""
    if value is None:
        return MISSING
    if value == 0:
        return "0.000"
    return f"{value:.3f}" if 0.01 <= abs(value) < ROUND_FROM else format_number(value)


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


def decimals_of(width: float, *, least: int = 2) -> int:
    """Return how many decimals show an interval of this width with two digits."""
    return 3 if width <= 0 else min(max(1 - math.floor(math.log10(width)), least), 6)
