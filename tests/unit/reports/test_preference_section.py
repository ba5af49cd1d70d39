"""The preference test on a run's page and model card, and the sentences that the terminal shares with them."""

import json
from pathlib import Path
from typing import Any

import pytest

from loralab.errors import RunFolderError
from loralab.evaluation.preference import Vote
from loralab.reports.facts import load_facts
from loralab.reports.html import write_report
from loralab.reports.model_card import render_model_card
from loralab.reports.preference_section import describe_preference, preference_lines, summarize_preference
from loralab.run import RunFolder
from loralab.workflows.judge_result import compute_result
from support.preference_tests import cast, cast_wishes, make_items
from unit.reports.run_folders import build_whole_run, record
from unit.reports.test_html import Page

HASH = "a" * 64


def _result(*wishes: list[Vote], count: int = 12, same: int = 0) -> dict[str, Any]:
    items = make_items(count, same=same)
    return compute_result(items, [cast_wishes(items, f"rater-{n}", each) for n, each in enumerate(wishes, 1)])


def _run(path: Path, result: dict[str, Any], *, digest: str = HASH) -> RunFolder:
    folder = build_whole_run(path, record=record() | {"adapter_sha256": digest})
    folder.preference.write_text(json.dumps(result), encoding="utf-8")
    return folder


FOR: Vote = "adapter"
AGAINST: Vote = "base"
ALL: list[Vote] = [FOR] * 12
MIXED: list[Vote] = [*[FOR] * 5, *[AGAINST] * 3, "tie", "tie", "tie", "both_bad"]


def test_page_shows_bars_and_what_may_be_said(tmp_path: Path) -> None:
    folder = _run(tmp_path, _result(ALL))
    write_report(folder)
    page = folder.report.read_text(encoding="utf-8")
    text = Page(page).text
    assert "Blind preference test" in text
    assert "Adapter preferred" in text
    assert "1 rater judged answers to 12 prompts in 12 votes, without knowing which was which." in text
    assert 'href="#preference"' in page
    assert 'aria-label="Adapter better: 12 of 12"' in page
    assert 'style="width:100.0%"' in page
    assert "verdict-better" in page
    assert "another adapter" not in text


def test_page_without_votes_has_no_section(tmp_path: Path) -> None:
    folder = build_whole_run(tmp_path)
    assert describe_preference(load_facts(folder)) is None
    write_report(folder)
    assert "preference" not in folder.report.read_text(encoding="utf-8").lower()
    assert "preference" not in render_model_card(folder)


def test_page_shows_where_the_base_was_better(tmp_path: Path) -> None:
    folder = _run(tmp_path, _result([*[AGAINST] * 10, FOR, "tie"]))
    write_report(folder)
    text = Page(folder.report.read_text(encoding="utf-8")).text
    assert "Where the base\u2019s answer was better (10; the first 8, all stand in preference.json)" in text
    assert "What is 7 + 7?" in text
    assert "It makes 14." in text
    assert "14, of course." in text
    assert "rater-1: base" in text
    assert "What is 8 + 8?" not in text


def test_names_of_raters_are_text(tmp_path: Path) -> None:
    items = make_items(12)
    votes = cast_wishes(items, "<b>anna</b>", MIXED)
    folder = _run(tmp_path, compute_result(items, [votes, cast_wishes(items, "bert", ALL)]))
    write_report(folder)
    page = folder.report.read_text(encoding="utf-8")
    assert "<b>anna</b>" not in page
    assert "&lt;b&gt;anna" in page


def test_model_card_has_the_result_and_no_names(tmp_path: Path) -> None:
    card = render_model_card(_run(tmp_path, _result(MIXED, ALL)))
    assert "**Blind preference test: No difference seen at n = 5 decided items.**" in card
    assert "2 raters judged answers to 12 prompts in 24 votes" in card
    assert "95 % interval 57 to 100 %, sign test p = 0.062" in card
    assert "rater-1" not in card


def test_votes_on_another_adapter_are_marked_and_stay_off_the_card(tmp_path: Path) -> None:
    folder = _run(tmp_path, _result(ALL), digest="b" * 64)
    write_report(folder)
    assert "These votes are on another adapter" in Page(folder.report.read_text(encoding="utf-8")).text
    assert "preference test" not in render_model_card(folder)


@pytest.mark.parametrize("change", [{"raters": None}, {"share": 3}, {"verdict": None}, {"adapter": "many"}])
def test_broken_result_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = _run(tmp_path, _result(ALL) | change)
    with pytest.raises(RunFolderError, match=r"preference\.json does not hold a result") as raised:
        describe_preference(load_facts(folder))
    assert "loralab judge RUN --result" in str(raised.value)


def test_sentences_of_a_result_without_a_difference() -> None:
    result = _result(MIXED, [*MIXED[:3], *[AGAINST] * 6], count=13, same=1)
    lines = preference_lines(result)
    assert lines[0] == "no difference seen at n = 6 decided items: the interval holds 50 %; the sign test has p = 1"
    assert lines[1] == ("to see a true share of 60 % with a chance of 80 % it takes 210 decided items; there are 6")
    assert "1 item with the same text twice: shown to nobody, counted as ties" in lines
    assert "1 item with two bad answers, among the ties" in lines
    assert any(line.startswith("agreement of 2 raters on 9 items: 67 % of pairs") for line in lines)
    assert "12 prompts in 21 votes" in summarize_preference(result)
    assert "; 1 more had the same answer twice." in summarize_preference(result)


def test_sentences_where_little_is_there() -> None:
    nothing = _result(count=2, same=2)
    assert summarize_preference(nothing) == "All 2 items have the same text twice, so nobody had to judge."
    ties = _result(["tie"] * 3, count=4)
    assert summarize_preference(ties).endswith("neither in 3.")
    assert "1 item judged by nobody: left out" in preference_lines(ties)
    apart = compute_result(
        items := make_items(4),
        [cast_wishes(items, "a", ["tie"]), cast(items, "b", {items.shown[-1].item: "tie"})],
        [cast_wishes(items, "c", ["base"])],
    )
    assert "agreement: there is no item that all 2 raters judged" in preference_lines(apart)
    assert "open sittings, not counted: c (1 votes)" in preference_lines(apart)
    same = _result(["adapter"] * 3, ["adapter"] * 3, count=3)
    assert any("Cohen's kappa is not defined" in line for line in preference_lines(same))


def test_habit_of_position_is_said_with_what_it_means() -> None:
    items = make_items(12)
    votes = cast(items, "anna", {item.item: "left" for item in items.shown})
    (line,) = [line for line in preference_lines(compute_result(items, [votes])) if "position" in line]
    assert line.startswith("rater anna chose the left answer in 12 of 12 decided votes (p = 0.00049)")
    assert "favours neither model" in line


def test_large_test_is_described_without_a_p_of_zero() -> None:
    even: list[Vote] = [FOR, AGAINST] * 600
    lines = preference_lines(_result(even, count=1200))
    assert lines[1] == (
        "a true share of 60 % would have been seen with a chance of 80 % or more: that takes 210 decided items, and "
        "there are 1200"
    )
    result = _result([FOR] * 1200, count=1200)
    assert result["sign_test_p"] < 1e-300
    assert "sign test p < 0.0001" in summarize_preference(result)
    assert preference_lines(result)[0].endswith("the sign test has p < 0.0001")
