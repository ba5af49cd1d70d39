"""The space of a sweep: which settings vary, over which values, and the points that are trained.

Owns the grammar of `--grid` and the drawing of random points. Values are read as overrides are, when a point is loaded.
"""

import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from loralab.errors import ConfigError

# Two numbers with two dots between, and how to draw between them.
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"(?P<low>{_NUMBER})\.\.(?P<high>{_NUMBER})(?::(?P<scale>log|linear))?")
_WHOLE = re.compile(r"[+-]?\d+")
_OPENS, _CLOSES = "[{(", "]})"
# From this ratio on, the ends of a range are of different orders of magnitude.
_LOG_FROM = 10.0
_TRIES = 100
_DIGITS = 4
# What a folder, and a repository on the Hub, is not named with.
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+|\.{2,}|-{2,}")
_MOST_POINTS = 1000
_LONGEST_NAME = 60


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers between two ends.

    Attributes:
        low: the lower end.
        high: the upper end, which is drawn too.
        whole: whether only whole numbers are drawn.
        log: whether equal ratios are equally likely, not equal distances.
    """

    low: float
    high: float
    whole: bool
    log: bool

    def draw(self, source: random.Random) -> str:
        """Return a value, as an override has it."""
        if self.whole and not self.log:
            return str(source.randint(int(self.low), int(self.high)))
        if self.log:
            value = math.exp(source.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = source.uniform(self.low, self.high)
        if self.whole:
            return str(min(max(round(value), int(self.low)), int(self.high)))
        return f"{value:.{_DIGITS}g}"

    def __str__(self) -> str:
        kind = "whole numbers" if self.whole else "numbers"
        return f"{kind} from {self.low:g} to {self.high:g}, {'log-uniform' if self.log else 'uniform'}"


@dataclass(frozen=True, slots=True)
class Axis:
    """A setting that varies.

    Attributes:
        key: dotted key.
        values: what it takes, each as an override has it, or a range.
    """

    key: str
    values: tuple[str, ...] | Range

    def __str__(self) -> str:
        return str(self.values) if isinstance(self.values, Range) else ", ".join(self.values)


@dataclass(frozen=True, slots=True)
class Point:
    """What one run of a sweep is trained with.

    Attributes:
        number: from 1.
        settings: value of each varied key, as an override has it.
    """

    number: int
    settings: dict[str, str]

    @property
    def overrides(self) -> list[str]:
        """The settings as overrides."""
        return [f"{key}={value}" for key, value in self.settings.items()]

    @property
    def name(self) -> str:
        """Name of the run folder: the number, and what varies in short."""
        short = "-".join(f"{key.rpartition('.')[2]}{value}" for key, value in self.settings.items())
        return f"{self.number:03}-{_UNSAFE.sub('_', short)[:_LONGEST_NAME].strip('_.-')}"

    def __str__(self) -> str:
        return f"run {self.number:03} ({', '.join(self.overrides)})"


def read_space(grid: Sequence[str], given: Sequence[str]) -> tuple[list[Axis], list[str]]:
    """Tell what varies from what holds for every run.

    Args:
        grid: `KEY=V1,V2` or `KEY=LOW..HIGH` of the option.
        given: further arguments; those with several values or a range vary, the others are overrides.

    Returns:
        The settings that vary, and the overrides.

    Raises:
        ConfigError: nothing varies, a key stands twice, or a text cannot be read.
    """
    axes = [_read_axis(text) for text in grid]
    overrides = []
    for text in given:
        key, equals, raw = text.partition("=")
        if equals and key.strip() and (len(split_values(raw)) > 1 or _RANGE.fullmatch(raw.strip())):
            axes.append(_read_axis(text))
        else:
            overrides.append(text)
    if not axes:
        raise ConfigError("nothing varies", where="option --grid", fix="give values: --grid lora.r=4,8,16")
    keys = [axis.key for axis in axes]
    fixed = [text.partition("=")[0].strip() for text in overrides]
    for key in keys:
        if keys.count(key) > 1 or key in fixed:
            raise ConfigError(f"{key!r} is given twice", where="command line", fix="give all its values in one place")
    return axes, overrides


def split_values(raw: str) -> list[str]:
    """Return the parts of a text between its commas, but for those within brackets or quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for place, sign in enumerate(raw):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        elif sign in _OPENS:
            depth += 1
        elif sign in _CLOSES:
            depth -= 1
        elif sign == "," and depth == 0:
            parts.append(raw[start:place])
            start = place + 1
    return [part.strip() for part in [*parts, raw[start:]]]


def _read_axis(text: str) -> Axis:
    key, equals, raw = text.partition("=")
    key, raw = key.strip(), raw.strip()
    if not equals or not key:
        raise ConfigError(f"not a setting with values: {text!r}", where="option --grid", fix="write lora.r=4,8,16")
    found = _RANGE.fullmatch(raw)
    if found is not None:
        return Axis(key, _read_range(text, found))
    values = split_values(raw)
    if not all(values):
        raise ConfigError(f"a value is missing: {text!r}", where="option --grid", fix="write lora.r=4,8,16")
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ConfigError(f"{key} takes {twice} twice: {text!r}", where="option --grid", fix="give each value once")
    return Axis(key, tuple(values))


def _read_range(text: str, found: re.Match[str]) -> Range:
    low, high = float(found["low"]), float(found["high"])
    if not low < high:
        raise ConfigError(f"the range is empty: {text!r}", where="option --grid", fix="give the lower end first")
    whole = bool(_WHOLE.fullmatch(found["low"]) and _WHOLE.fullmatch(found["high"]))
    log = found["scale"] == "log" or (found["scale"] is None and not whole and low > 0 and high / low >= _LOG_FROM)
    if log and low <= 0:
        what = f"a log scale has no {low:g}: {text!r}"
        raise ConfigError(what, where="option --grid", fix="begin above 0, or write :linear behind the range")
    return Range(low, high, whole, log)


def grid_points(axes: Sequence[Axis]) -> list[Point]:
    """Return every combination of values, the last setting changing fastest.

    Raises:
        ConfigError: a setting has a range, of which a grid cannot take all values, or they are too many.
    """
    sides: list[tuple[str, ...]] = []
    for axis in axes:
        if isinstance(axis.values, Range):
            raise ConfigError(
                f"{axis.key} has a range ({axis}), and a grid takes listed values",
                where="option --grid",
                fix="list its values, or draw points with --random 10",
            )
        sides.append(axis.values)
    _check_count(math.prod(map(len, sides)), "option --grid", "give fewer values, or draw points with --random 10")
    combined = itertools.product(*sides)
    keys = [axis.key for axis in axes]
    return [Point(number, dict(zip(keys, values, strict=True))) for number, values in enumerate(combined, 1)]


def random_points(axes: Sequence[Axis], count: int, *, seed: int) -> list[Point]:
    """Draw different points; with the same seed, more points begin with the same ones.

    Args:
        axes: what varies; of listed values one is drawn, each as likely.
        count: points.
        seed: of the drawing.

    Raises:
        ConfigError: the space has fewer points, or they are too many.
    """
    _check_count(count, "option --random", f"set --random {_MOST_POINTS} at most")
    source = random.Random(seed)
    found: list[dict[str, str]] = []
    for _ in range(count * _TRIES):
        if len(found) == count:
            break
        drawn = {
            axis.key: axis.values.draw(source) if isinstance(axis.values, Range) else source.choice(axis.values)
            for axis in axes
        }
        if drawn not in found:
            found.append(drawn)
    if len(found) < count:
        raise ConfigError(
            f"{count} different points were asked for, and only {len(found)} were found",
            where="option --random",
            fix=f"set --random {len(found)}, or widen the space",
        )
    return [Point(number, settings) for number, settings in enumerate(found, 1)]


def _check_count(count: int, where: str, fix: str) -> None:
    if count > _MOST_POINTS:
        raise ConfigError(f"{count:,} runs; a sweep has {_MOST_POINTS:,} at most", where=where, fix=fix)
