"""Numbers and verdicts in words."""

from pathlib import Path
from typing import Any

import pytest

from loralab.reports.facts import load_facts
from loralab.reports.wording import (
    Verdict,
    assess,
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
from unit.reports import run_folders
from unit.reports.run_folders import build_whole_run, evaluation


def judge(path: Path, **changes: Any) -> Verdict:
    return assess(load_facts(build_whole_run(path, **changes)))


def plain(verdict: Verdict) -> str:
    return verdict.sentence.replace("\u00a0", " ")


def test_a_lower_loss_is_better(tmp_path: Path) -> None:
    verdict = judge(tmp_path)
    assert verdict.outcome == "better"
    assert plain(verdict) == "Loss is lower by 1.32 nats per token (95 % interval 1.25 to 1.39, 99 rows)."
    assert verdict.caveats == ()


def test_a_higher_loss_is_worse(tmp_path: Path) -> None:
    verdict = judge(tmp_path, evaluation=evaluation(change=0.02, low=0.01, high=0.03))
    assert verdict.outcome == "worse"
    assert verdict.headline.startswith("No")
    assert "higher by 0.020 nats per token (95 % interval 0.010 to 0.030" in plain(verdict)


@pytest.mark.parametrize(("low", "high"), [(-0.05, 0.03), (0.0, 0.03), (-0.05, 0.0), (0.0, 0.0)])
def test_an_interval_that_holds_zero_is_no_difference(tmp_path: Path, low: float, high: float) -> None:
    verdict = judge(tmp_path, evaluation=evaluation(change=(low + high) / 2, low=low, high=high))
    assert (verdict.outcome, verdict.headline) == ("none", "No difference seen")


def test_no_difference_names_the_interval(tmp_path: Path) -> None:
    verdict = judge(tmp_path, evaluation=evaluation(change=-0.01, low=-0.05, high=0.03))
    assert "interval of the change from -0.050 to +0.030" in plain(verdict)


def test_a_test_that_disagrees_is_no_difference(tmp_path: Path) -> None:
    content = evaluation(change=0.015, low=0.01, high=0.02)
    why = "the interval leaves out 0, but the swap test has p = 1 (2 rows differ)"
    content["difference"] |= {"verdict": "no difference seen at n = 2", "reason": why}
    verdict = judge(tmp_path, evaluation=content)
    assert (verdict.outcome, verdict.headline) == ("none", "No difference seen")
    assert plain(verdict) == (
        f"Loss is higher by 0.015 nats per token, which may be chance: {why}; 95 % interval of the change from +0.010 "
        "to +0.020, 99 rows."
    )


def test_a_record_without_a_verdict_is_not_judged_by_its_interval(tmp_path: Path) -> None:
    content = evaluation()
    del content["difference"]["verdict"]
    verdict = judge(tmp_path, evaluation=content)
    assert (verdict.outcome, verdict.headline[:4]) == ("unknown", "Loss")
    assert "was not judged" in verdict.headline


@pytest.mark.parametrize("bound", [None, float("nan")])
def test_without_an_interval_nothing_is_promised(tmp_path: Path, bound: float | None) -> None:
    verdict = judge(tmp_path, evaluation=evaluation(low=bound, high=bound))
    assert verdict.outcome == "unknown"
    assert "no interval" in verdict.sentence
    assert "Yes" not in verdict.headline


@pytest.mark.parametrize("content", [{}, {"eval_loss": 1.0}, evaluation(change=float("nan"))])
def test_without_a_difference_it_is_not_measured(tmp_path: Path, content: dict[str, Any]) -> None:
    assert judge(tmp_path, evaluation=content).outcome == "missing"


def test_a_run_without_held_out_data_says_why_nothing_was_measured(tmp_path: Path) -> None:
    config = run_folders.config_values()
    config["data"]["validation"] = None
    assert "no validation and no test data" in judge(tmp_path, evaluation={}, config=config).sentence


@pytest.mark.parametrize(
    ("change", "caveat"),
    [({"split": "train"}, "trained on"), ({"split": "validation"}, "same rows"), ({"num_examples": 7}, "Few rows (7)")],
)
def test_what_weakens_a_result_is_said(tmp_path: Path, change: dict[str, Any], caveat: str) -> None:
    verdict = judge(tmp_path, evaluation=evaluation() | change)
    assert len(verdict.caveats) == 1
    assert caveat in verdict.caveats[0]


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
