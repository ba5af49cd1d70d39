"""Numbers in words."""

from typing import Any

import pytest

from loralab.reports.wording import (
    format_bytes,
    format_interval,
    format_loss,
    format_measured,
    format_number,
    format_parameters,
    format_perplexity,
    format_seconds,
    format_share,
    format_time,
    format_value,
)


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        (format_bytes(0), "0 bytes"),
        (format_bytes(1023), "1,023 bytes"),
        (format_bytes(1024), "1.0 KiB"),
        (format_bytes(3_478_923_509), "3.2 GiB"),
        (format_bytes(2.0**60), "1,048,576.0 TiB"),
        (format_seconds(0.4), "0.40 s"),
        (format_seconds(42), "42 s"),
        (format_seconds(59.7), "1 min 0 s"),
        (format_seconds(3725), "1 h 2 min"),
        (format_seconds(200_000), "2 d 7 h"),
        (format_parameters(4_884_480), "4.88 million"),
        (format_parameters(7e9), "7 billion"),
        (format_parameters(1200), "1,200"),
        (format_share(4302, 4310), "99.81 %"),
        (format_share(10, 10), "100 %"),
        (format_share(999_999, 1_000_000), "99.99 %"),
        (format_share(1, 1000), "0.1 %"),
        (format_share(0, 10), ""),
        (format_share(1, None), ""),
        (format_number(0.0003), "3e-4"),
        (format_number(1873.2), "1,873"),
        (format_number(0), "0"),
        (format_number(100), "100"),
        (format_loss(1.6081), "1.608"),
        (format_loss(0.00042), "4.2e-4"),
        (format_perplexity(18.6771), "18.68"),
        (format_perplexity(51234.5), "51,234"),
        (format_time("2025-11-20T13:26:40+00:00"), "2025-11-20 13:26 UTC"),
        (format_time("2025-11-20T15:26:40+02:00"), "2025-11-20 13:26 UTC"),
        (format_time("yesterday"), "yesterday"),
        (format_value("a\nb"), '"a\\nb"'),
        (format_value(""), '""'),
        (format_value(None), "null"),
        (format_value(True), "true"),
        (format_value(1e-4), "0.0001"),
        (format_value(16.0), "16"),
        (format_value(["q", 1]), '["q", 1]'),
    ],
)
def test_numbers_and_values_are_readable(got: str, wanted: str) -> None:
    assert got.replace("\u00a0", " ") == wanted


@pytest.mark.parametrize("function", [format_bytes, format_seconds, format_parameters, format_number, format_loss])
def test_a_missing_number_is_a_dash(function: Any) -> None:
    assert function(None) == "\u2013"


@pytest.mark.parametrize(
    ("value", "low", "high", "shown", "interval"),
    [
        (0.6525, 0.6046, 0.6975, "0.652", "0.605 to 0.698"),
        (0.65254, 0.65201, 0.65301, "0.6525", "0.6520 to 0.6530"),
        (42.31, 37.25, 48.75, "42.3", "37.2 to 48.8"),
        (1312.5, 1100.2, 1599.4, "1,312", "1,100 to 1,599"),
        (1.0, 1.0, 1.0, "1", "1 to 1"),
        (-135_411_703.1, -633_920_892.1, -0.3124, "-1.4e8", "-6.3e8 to -0.31"),
        (-1e-9, -0.2, 0.1, "0.000", "-0.200 to 0.100"),
        (3e-7, 2e-7, 4e-7, "3e-7", "2e-7 to 4e-7"),
        (0.5, None, None, "0.5", ""),
        (None, None, None, "\u2013", ""),
    ],
)
def test_a_figure_is_as_exact_as_its_interval(
    value: float | None, low: float | None, high: float | None, shown: str, interval: str
) -> None:
    assert format_measured(value, low, high) == shown
    assert format_interval(low, high) == interval


def test_a_difference_has_its_sign() -> None:
    assert format_measured(0.0211, -0.0301, 0.0712, signed=True) == "+0.021"
    assert format_interval(-0.0301, 0.0712, signed=True) == "-0.030 to +0.071"
    assert format_measured(2.0, None, None, signed=True) == "+2"


def test_zero_has_no_sign() -> None:
    assert format_measured(-0.00001, -0.2, 0.00001, signed=True) == "0.000"
    assert format_interval(-0.2, 0.00001, signed=True) == "-0.200 to 0.000"
    assert format_interval(-33.2, -0.001) == "-33.2 to 0.0"
    assert format_number(-0.0) == "0"
    assert format_loss(-0.0) == "0.000"
    assert format_measured(-0.0, None, None, signed=True) == "0"
