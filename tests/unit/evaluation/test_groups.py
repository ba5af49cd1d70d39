"""Figures by group: those of the group's questions measured alone, with counts, differences and confusion."""

from typing import Any

import pytest

from loralab.evaluation.answers import Answered, Evidence
from loralab.evaluation.groups import measure_groups
from loralab.evaluation.metrics.measure import compare, measure
from loralab.evaluation.metrics.table import resolve_metrics
from unit.evaluation.asking import question

REFERENCES = ["yes", "no", "red", "Yes ", "blue", "3", "3", "no"]
ADAPTER = ["yes", "no", "red", "no", "red", "3", "4", "perhaps"]
BASE = ["no", "no", "blue", "no", "blue", "4", "4", "no"]
# Two turns in the last row but one, in one group.
UNITS = [0, 1, 2, 3, 4, 5, 5, 6]
NAMES = ["closed", "closed", "open", "closed", "open", "open", "open", "closed"]


def evidence(answers: list[str], places: list[int] | None = None) -> Evidence:
    chosen = list(range(len(answers))) if places is None else places
    units = {unit: number for number, unit in enumerate(dict.fromkeys(UNITS[place] for place in chosen))}
    asked = [question([place], unit=units[UNITS[place]], reference_text=REFERENCES[place]) for place in chosen]
    found = [Answered(each, answers[place], stopped=True) for each, place in zip(asked, chosen, strict=True)]
    return Evidence(len(units), "generate", found)


def grouped(*metrics: str) -> dict[str, Any]:
    return measure_groups(resolve_metrics(metrics), evidence(ADAPTER), evidence(BASE), NAMES, resamples=50)


@pytest.mark.parametrize("name", ["closed", "open"])
def test_a_group_is_measured_as_its_rows_alone(name: str) -> None:
    places = [place for place, each in enumerate(NAMES) if each == name]
    metrics = resolve_metrics(["exact_match", "label_accuracy"])
    ours, theirs = (measure(metrics, evidence(side, places), resamples=50) for side in (ADAPTER, BASE))
    found = grouped("exact_match", "label_accuracy")[name]
    assert found["metrics"] == {figure: each.as_dict() for figure, each in ours.figures.items()}
    assert found["base"]["metrics"] == {figure: each.as_dict() for figure, each in theirs.figures.items()}
    assert found["differences"] == compare(ours, theirs, resamples=50)
    assert (found["rows"], found["answers"]) == ((4, 4) if name == "closed" else (3, 4))


def test_groups_add_up_to_the_whole() -> None:
    whole = measure(resolve_metrics(["exact_match"]), evidence(ADAPTER), resamples=0).values["exact_match"]
    parts = [(each["metrics"]["exact_match"]["value"], each["answers"]) for each in grouped("exact_match").values()]
    assert sum(value * count for value, count in parts) == pytest.approx(whole * len(ADAPTER))


def test_confusion_counts_references_by_answers() -> None:
    assert grouped("exact_match")["closed"]["confusion"] == {
        "references": ["no", "yes"],
        "answers": ["no", "yes"],
        "counts": [[1, 0], [1, 1]],
        "other": [1, 0],
    }


def test_no_confusion_of_more_than_twenty_references() -> None:
    asked = [question([number], unit=number, reference_text=str(number)) for number in range(21)]
    side = Evidence(21, "generate", [Answered(each, "1", stopped=True) for each in asked])
    metrics = resolve_metrics(["exact_match"])
    assert "confusion" not in measure_groups(metrics, side, side, ["all"] * 21, resamples=0)["all"]
    fewer = Evidence(20, "generate", side.answers[:20])
    table = measure_groups(metrics, fewer, fewer, ["all"] * 20, resamples=0)["all"]["confusion"]
    assert len(table["references"]) == 20


def test_a_metric_that_has_no_sense_in_a_group_is_left_out_of_it_with_the_reason() -> None:
    found = grouped("exact_match", "yes_no")
    assert "yes_no" not in found["closed"].get("left_out", {})
    assert list(found["open"]["left_out"]) == ["yes_no"]
    assert list(found["open"]["metrics"]) == ["exact_match"]


def test_the_largest_group_stands_first() -> None:
    names = ["b", "a", "c", "c", "a", "c", "b", "b"]
    found = measure_groups(resolve_metrics(["exact_match"]), evidence(ADAPTER), evidence(BASE), names, resamples=0)
    assert list(found) == ["b", "c", "a"]
