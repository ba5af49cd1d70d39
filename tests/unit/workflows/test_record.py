"""The record of a run: which changes of the machine are worth a warning."""

from typing import Any

import pytest

from loralab.workflows.record import environment_changes

BEFORE: dict[str, Any] = {
    "versions": {"torch": "2.11.0+cpu", "peft": "0.21.0", "numpy": "2.0.0"},
    "hardware": {"processor": "x", "gpu": None, "threads": 2, "cores": 8},
}


@pytest.mark.parametrize(
    ("part", "now", "said"),
    [
        ("versions", {"torch": "2.11.1"}, []),
        ("versions", {"torch": "2.12.0"}, ["torch was 2.11.0+cpu, now 2.12.0"]),
        ("versions", {"peft": "0.22.0"}, ["peft was 0.21.0, now 0.22.0"]),
        ("versions", {"numpy": "3.0.0"}, []),
        ("versions", {"transformers": "5.17.0"}, []),  # an older record did not have it
        ("hardware", {"threads": 1}, ["threads was 2, now 1"]),
        ("hardware", {"processor": "y", "cores": 4}, ["processor was x, now y"]),
    ],
)
def test_changes_of_the_machine(part: str, now: dict[str, Any], said: list[str]) -> None:
    assert environment_changes(BEFORE, BEFORE | {part: BEFORE[part] | now}) == said
