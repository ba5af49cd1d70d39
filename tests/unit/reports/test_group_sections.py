"""Metrics by group, and with grey pictures, on the page and the card."""

from pathlib import Path
from typing import Any

from loralab.reports.facts import load_facts
from loralab.reports.group_sections import SHOWN_GROUPS, describe_blank, describe_groups
from loralab.reports.html import write_report
from loralab.reports.model_card import write_model_card
from loralab.run import RunFolder
from unit.reports import run_folders
from unit.reports.run_folders import HOSTILE, figure
from unit.reports.test_html import Page


def group(adapter: float, base: float, **more: Any) -> dict[str, Any]:
    difference = figure(adapter - base, 0.1, 0.4, verdict="better", reason="")
    return {
        "rows": 40,
        "answers": 42,
        "metrics": {"exact_match": figure(adapter, 0.7, 0.9, better="higher")},
        "base": {"metrics": {"exact_match": figure(base, 0.4, 0.6, better="higher")}},
        "differences": {"exact_match": difference},
        **more,
    }


def evaluation(**groups: Any) -> dict[str, Any]:
    return run_folders.task_evaluation() | {
        "groups": {"by": "kind", "reason": "a column of the rows", "values": groups}
    }


def confusion(names: list[str], counts: list[list[int]], other: list[int]) -> dict[str, Any]:
    return {"references": names, "answers": names, "counts": counts, "other": other}


def test_each_group_has_its_figures_and_its_matrix(tmp_path: Path) -> None:
    yes_no = group(0.8, 0.5, confusion=confusion(["no", "yes"], [[14, 3], [2, 19]], [0, 4]))
    colour = group(0.6, 0.5, confusion=confusion(["blue", "red"], [[5, 1], [0, 6]], [0, 0]), left_out={"bleu": "short"})
    folder = run_folders.build_whole_run(tmp_path, evaluation=evaluation(**{"yes/no": yes_no, "colour": colour}))
    found = describe_groups(load_facts(folder))
    assert found is not None
    assert [(row["name"], row["answers"]) for row in found["rows"]] == [("yes/no", "42"), ("colour", "42")]
    first, second = found["matrices"]
    assert first["columns"] == ["no", "yes", "another answer"]
    assert [cell["count"] for cell in first["rows"][1]["cells"]] == ["2", "19", "4"]
    assert [cell["right"] for cell in first["rows"][1]["cells"]] == [False, True, False]
    assert second["columns"] == ["blue", "red"]
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    assert "yes/no 42 answers" in text
    assert "exact_matchhigher0.5000.400 to 0.6000.8000.700 to 0.900" in text
    assert "A column of the rows." in text
    assert "colour: bleu is not measured: short." in text
    card = write_model_card(folder).read_text(encoding="utf-8")
    assert "| yes/no | `exact_match` | 0.500 (0.400 to 0.600) | 0.800 (0.700 to 0.900) |" in card


def test_without_groups_nothing_is_said(tmp_path: Path) -> None:
    folder = run_folders.build_whole_run(tmp_path, evaluation=run_folders.task_evaluation())
    assert describe_groups(load_facts(folder)) is None
    assert describe_blank(load_facts(folder)) is None
    assert "Does it look at the pictures?" not in write_report(folder).read_text(encoding="utf-8")


def test_many_hostile_and_broken_groups_break_nothing(tmp_path: Path) -> None:
    broken = group(0.8, 0.5, confusion={"references": ["a"], "answers": None, "counts": [[1, 2]], "other": "x"})
    groups = {HOSTILE: broken, "none": {}} | {f"kind {number}": group(0.8, 0.5) for number in range(30)}
    folder = run_folders.build_whole_run(tmp_path, evaluation=evaluation(**groups))
    found = describe_groups(load_facts(folder))
    assert found is not None
    assert (len(found["rows"]), found["more"], found["matrices"]) == (SHOWN_GROUPS, 32 - SHOWN_GROUPS, [])
    page = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "12 smaller groups stand in evaluation.json." in page
    write_model_card(RunFolder(folder.path))


def test_grey_pictures_stand_beside_the_real_ones(tmp_path: Path) -> None:
    values = run_folders.task_evaluation()
    values["metrics"]["exact_match"] = figure(0.9, 0.8, 0.95, better="higher")
    values["blank_images"] = {
        "note": "every picture grey",
        "metrics": {"exact_match": figure(0.4, 0.3, 0.5, better="higher")},
        "differences": {"exact_match": figure(0.5, 0.4, 0.6, verdict="better", reason="")},
    }
    folder = run_folders.build_whole_run(tmp_path, evaluation=values)
    text = Page(write_report(folder).read_text(encoding="utf-8")).text
    part = text[text.index("Does it look at the pictures?") :]
    assert "every picture grey" in part
    assert "exact_matchhigher0.4000.300 to 0.5000.9000.800 to 0.950+0.500+0.400 to +0.600better99" in part
