"""The vision demo's claim: the adapter answers questions about held-out pictures that the base model cannot."""

import json
from pathlib import Path

import pytest

from support.demo import right_answers, run_demo_command

# Seen: base 0, adapter 136 of 150. The margin leaves room for other processors' rounding.
LEAST_BY_ADAPTER, MOST_BY_BASE, QUESTIONS = 105, 15, 150


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("demo") / "run"
    return output, run_demo_command(output, "--vision")


def test_adapter_answers_what_the_base_cannot(demo: tuple[Path, str]) -> None:
    output, said = demo
    adapter, base = right_answers(output, questions=QUESTIONS)
    assert base <= MOST_BY_BASE
    assert adapter >= LEAST_BY_ADAPTER
    assert f"answered word for word: base {base}, adapter {adapter}" in said


def test_no_picture_stands_in_training_and_among_the_questions(demo: tuple[Path, str]) -> None:
    output, _ = demo
    sources = [source["name"] for source in json.loads((output / "data.json").read_text())["sources"]]
    shown = []
    for source in sources:
        folder = Path(source).parent
        names = {json.loads(line)["image"] for line in Path(source).read_text().splitlines()}
        shown.append({(folder / name).read_bytes() for name in names})
    assert len(shown) == 2
    assert not shown[0] & shown[1]


def test_every_kind_of_question_has_its_figure(demo: tuple[Path, str]) -> None:
    output, _ = demo
    evaluation = json.loads((output / "evaluation.json").read_text())
    groups = evaluation["groups"]["values"]
    assert set(groups) == {"yes_no", "count", "color", "size"}
    assert sum(group["answers"] for group in groups.values()) == QUESTIONS
    assert json.loads((output / "run.json").read_text())["resolved"]["cache_features"]["value"] == "on"
