"""Pictures from the command line: asked about, taken away, and figures by groups of rows."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loralab.data.images.blank import GREY
from support.command import read_problems, run_here, write_config
from support.tiny import write_rows
from support.tiny_vision import save_vision_base, vqa_rows

SHORT = ["--max-new-tokens", 5]


@dataclass(frozen=True)
class World:
    """A finished run on tiny pictures; read only."""

    folder: Path
    run: Path
    rows: list[dict[str, str]]
    predictions: list[dict[str, Any]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("asking")
    rows = vqa_rows(folder, 10)
    for number, row in enumerate(rows):
        row["answer"] = ["yes", "no", "2", "red"][number % 4]
        row["kind"] = ["shape", "colour"][number % 2]
    base, run = save_vision_base(folder / "base"), folder / "run"
    config: dict[str, Any] = {
        "model": {"name": str(base), "device": "cpu", "precision": "float32"},
        "data": {
            "train": str(write_rows(folder / "rows.json", rows)),
            "validation": 12,
            "split_method": "random",
            "num_workers": 0,
            "cache_dir": str(folder / "cache"),
        },
        "lora": {"r": 4},
        "training": {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.005},
        "evaluation": {
            "metrics": ["exact_match"],
            "strategy": "no",
            "max_new_tokens": 5,
            "num_samples": 0,
            "group_by": "kind",
            "bootstrap_samples": 100,
        },
        "output": {"dir": str(run)},
    }
    answer = run_here("train", write_config(folder / "config.yaml", config))
    assert answer.code == 0, answer.err
    lines = (run / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return World(folder, run, rows, [json.loads(line) for line in lines])


def evaluated(world: World, *options: object) -> dict[str, Any]:
    answer = run_here("eval", world.run, *options, "--json")
    assert answer.code == 0, answer.err
    return dict(json.loads(answer.out))


def picture_of(world: World, row: dict[str, str]) -> str:
    return str(world.folder / row["image"])


def test_generate_answers_a_row_as_the_evaluation_did(world: World) -> None:
    answers = set()
    for line in world.predictions[:4]:
        row = world.rows[line["row"] - 1]
        answer = run_here(
            "generate", world.run, "--image", picture_of(world, row), "-p", row["question"], "--base", "--json"
        )
        assert answer.code == 0, answer.err
        (found,) = json.loads(answer.out)["answers"]
        assert found["images"] == [picture_of(world, row)]
        assert [found[side]["text"] for side in ("adapter", "base")] == [
            line[side]["answer"] for side in ("adapter", "base")
        ]
        answers.add(found["base"]["text"])
    assert len(answers) > 1


def test_several_pictures_stand_before_the_text_in_their_order(world: World) -> None:
    pictures = [picture_of(world, world.rows[number]) for number in (0, 3)]
    texts = []
    for order in (pictures, pictures[::-1]):
        shown = [part for picture in order for part in ("--image", picture)]
        answer = run_here("generate", world.run, *shown, "-p", "which cat?", "--base", *SHORT, "--json")
        (found,) = json.loads(answer.out)["answers"]
        assert found["prompt_text"].count("<|image_pad|>") == 2
        assert found["prompt_text"].index("<|image_pad|>") < found["prompt_text"].index("which cat?")
        texts.append(found["base"]["text"])
    assert texts[0] != texts[1]


@pytest.mark.parametrize(("name", "what"), [("nothing.png", "no such file"), ("rows.json", "known kinds are JPEG")])
def test_a_picture_that_is_none_is_told_in_three_lines(name: str, what: str, world: World) -> None:
    answer = run_here("generate", world.run, "--image", world.folder / name, "-p", "what?")
    assert answer.code != 0
    (problem,) = read_problems(answer)
    assert what in problem.what
    assert problem.where == "option --image"


def test_chat_puts_a_picture_into_the_next_question_alone(world: World) -> None:
    row = world.rows[0]
    picture = picture_of(world, row)
    lines = ["/base", f"/image {picture}", row["question"], "/history", "/reset", row["question"], "/image", "/exit"]
    answer = run_here("chat", world.run, *SHORT, stdin="\n".join(lines) + "\n")
    assert answer.code == 0, answer.err
    texts = []
    for options in (["--image", picture], []):
        made = run_here("generate", world.run, *options, "-p", row["question"], "--base", *SHORT, "--json")
        texts.append(json.loads(made.out)["answers"][0]["base"]["text"])
    assert texts[0] != texts[1]
    assert answer.out == "".join(f"{text}\n" for text in texts)
    assert f"user: [{picture}] {row['question']}" in answer.err
    assert "no picture in the next question" in answer.err


def test_blank_pictures_are_what_grey_files_would_be(world: World) -> None:
    before = evaluated(world)
    found = evaluated(world, "--blank-images", "evaluation.bootstrap_samples=100")
    blind = found["blank_images"]
    grey = world.folder / "grey"
    for row in world.rows:
        target = grey / row["image"]
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(world.folder / row["image"]) as picture:
            Image.new("RGB", picture.size, GREY).save(target)
    kept = [world.rows[line["row"] - 1] for line in world.predictions]
    theirs = evaluated(world, "--data", write_rows(grey / "rows.json", kept))
    assert blind["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)
    assert blind["exact_match"] == theirs["exact_match"]
    assert found["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)
    assert abs(blind["eval_loss"] - found["eval_loss"]) > 1e-3
    assert blind["difference"]["eval_loss"] == pytest.approx(found["eval_loss"] - blind["eval_loss"], abs=1e-6)
    assert set(blind["differences"]) == set(found["differences"])


def test_blank_pictures_are_shown_as_a_table_and_refused_where_there_are_none(world: World) -> None:
    shown = run_here("eval", world.run, "--blank-images")
    assert "adapter - adapter with every picture grey" in shown.out
    rows = [{"question": "red?", "answer": "yes"}, {"question": "blue?", "answer": "no"}]
    answer = run_here("eval", world.run, "--data", write_rows(world.folder / "text.json", rows), "--blank-images")
    (problem,) = read_problems(answer)
    assert "has a picture" in problem.what
    assert problem.where == "option --blank-images"


def test_figures_stand_by_the_column_of_the_rows(world: World) -> None:
    evaluation = json.loads((world.run / "evaluation.json").read_text(encoding="utf-8"))
    groups = evaluation["groups"]
    kinds = Counter(world.rows[line["row"] - 1]["kind"] for line in world.predictions)
    assert len(kinds) == 2
    assert {name: each["answers"] for name, each in groups["values"].items()} == kinds
    for name, each in groups["values"].items():
        own = [line for line in world.predictions if world.rows[line["row"] - 1]["kind"] == name]
        for side, found in (("adapter", each), ("base", each["base"])):
            right = [line[side]["answer"].strip() == line["reference"].strip() for line in own]
            assert found["metrics"]["exact_match"]["value"] == pytest.approx(sum(right) / len(right))
    table = run_here("eval", world.run)
    assert "colour" in table.out
    assert "shape" in table.out


def test_answer_type_is_told_by_the_reference_where_no_column_has_it(world: World) -> None:
    groups = evaluated(world, "evaluation.group_by=answer_type")["groups"]
    kinds = Counter(
        {"yes": "yes/no", "no": "yes/no", "2": "number", "red": "other"}[p["reference"]] for p in world.predictions
    )
    assert {name: each["answers"] for name, each in groups["values"].items()} == kinds
    assert "told by the reference" in groups["reason"]


def test_a_column_that_is_not_there_is_named_with_those_that_are(world: World) -> None:
    answer = run_here("eval", world.run, "evaluation.group_by=kinds")
    (problem,) = read_problems(answer)
    assert problem.what == "no column 'kinds' in the rows"
    assert "did you mean 'kind'" in problem.fix
