"""Proofs of pictures: silent on what is right, and by name and row on each way of being wrong."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loralab.config.schema import DataConfig
from loralab.data.dataset import PreparedData, prepare_data
from loralab.data.example import Branch
from loralab.data.images.processor import PictureProcessor
from loralab.data.proofs.findings import Finding
from loralab.data.proofs.prove import Prover, StoredRow
from loralab.data.proofs.reread import read_stored_rows
from loralab.data.proofs.survey import hash_split, survey_split
from loralab.progress import Reporter
from support.tiny import write_rows
from support.tiny_vision import VISION_FAMILIES, build_vision_model, draw_picture, vqa_rows


def talk(*names: str) -> dict[str, Any]:
    """Return a conversation with pictures in two turns, words between them."""
    parts: list[dict[str, str]] = [{"type": "text", "text": "the red"}]
    for name in names:
        parts += [{"type": "image", "image": name}, {"type": "text", "text": "and a bird"}]
    later = [{"type": "image", "image": names[0]}, {"type": "text", "text": "is it blue?"}]
    messages = [("user", parts), ("assistant", "one two"), ("user", later), ("assistant", "three")]
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


class World:
    """Prepared rows, their proofs and their folder."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]], family: Any = "qwen2_vl", **chosen: Any) -> None:
        self.pictures = PictureProcessor(build_vision_model(family)[1])
        data = DataConfig(
            train=str(write_rows(folder / "rows.json", rows)), cache_dir=str(folder / "cache"), num_workers=0, **chosen
        )
        tokenizer: Any = getattr(self.pictures.processor, "tokenizer")  # noqa: B009 - as in the processor
        self.data: PreparedData = prepare_data(data, tokenizer, reporter=Reporter(), pictures=self.pictures)
        self.prover = Prover(self.data.prompter, self.data.pools[0].workers[0].settings)

    def rows(self) -> list[StoredRow]:
        return [row for chunk in read_stored_rows(self.data) for row in chunk]

    def prove(self, rows: list[StoredRow] | None = None) -> list[Finding]:
        return self.prover.prove(self.rows() if rows is None else rows)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_what_this_program_stores_is_proven_and_each_picture_is_read_once(family: Any, tmp_path: Path) -> None:
    world = World(tmp_path, vqa_rows(tmp_path, 3), family)
    assert world.prove() == []
    assert world.prover.pictures == 3
    assert world.prover.spans == 9


@pytest.mark.parametrize("chosen", [{}, {"truncation": "left", "max_length": 40}, {"max_length": 44}])
@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_several_pictures_in_several_turns_are_proven(family: Any, chosen: dict[str, Any], tmp_path: Path) -> None:
    for number, size in enumerate(((48, 32), (64, 64))):
        draw_picture(tmp_path / f"{number}.png", number, size=size)
    rows = [talk("0.png", "1.png"), talk("1.png"), {"messages": talk("0.png")["messages"][2:]}]
    if family == "llava" and chosen:
        chosen = {**chosen, "max_length": chosen["max_length"] + 20}
    world = World(tmp_path, rows, family, on_bad_row="drop", max_dropped_fraction=0.9, **chosen)
    assert {finding.kind for finding in world.prove()} <= ({"cut", "turns_cut", "turns_dropped"} if chosen else set())
    assert world.prover.spans


def _other_ids(branch: Branch) -> Branch:
    ids = branch.prompt_ids.copy()
    ids[branch.images[0].start + 1] += 1
    return replace(branch, prompt_ids=ids)


def _shorter(branch: Branch) -> Branch:
    (image,) = branch.images
    ids = np.delete(branch.prompt_ids, image.start)
    return replace(branch, prompt_ids=ids, images=(replace(image, length=image.length - 1),))


def _shifted(branch: Branch) -> Branch:
    (image,) = branch.images
    return replace(branch, images=(replace(image, start=image.start + 1),))


def _none(branch: Branch) -> Branch:
    return replace(branch, images=())


@pytest.mark.parametrize(
    ("spoil", "kinds"),
    [
        (_other_ids, {"picture_differs"}),
        (_shorter, {"picture_differs"}),
        (_shifted, {"prompt_differs"}),
        (_none, {"picture_missing", "prompt_differs"}),
    ],
)
def test_a_falsified_span_is_found(spoil: Callable[[Branch], Branch], kinds: set[str], tmp_path: Path) -> None:
    world = World(tmp_path, vqa_rows(tmp_path, 2, questions=2))
    first, second, *others = world.rows()
    spoilt = replace(second, units=((spoil(second.branches[0]),),))
    found = world.prove([first, spoilt, *others])
    assert {finding.kind for finding in found} == kinds
    assert {finding.row for finding in found} == {2}


def test_pictures_of_one_size_are_told_apart(tmp_path: Path) -> None:
    for number in range(2):
        draw_picture(tmp_path / f"{number}.png", number)
    rows = [{"image": f"{number}.png", "question": "a cat?", "answer": "one"} for number in range(2)]
    world = World(tmp_path, rows)
    one, two = world.rows()
    assert one.branches[0].prompt_ids.tolist() == two.branches[0].prompt_ids.tolist()
    assert [finding.kind for finding in world.prove([replace(one, units=two.units), two])] == ["picture_missing"]


@pytest.mark.parametrize("gone", [False, True])
def test_a_picture_that_changed_since_is_found(gone: bool, tmp_path: Path) -> None:
    world = World(tmp_path, vqa_rows(tmp_path, 2, questions=1))
    if gone:
        (tmp_path / "images" / "1.png").unlink()
    else:
        draw_picture(tmp_path / "images" / "1.png", 9, size=(32, 32))
    (found,) = world.prove()
    assert (found.kind, found.row) == ("picture_changed", 2)
    assert "1.png" in found.what


def test_one_question_about_two_pictures_of_a_size_is_no_duplicate(tmp_path: Path) -> None:
    for number in range(2):
        draw_picture(tmp_path / f"{number}.png", number)
    rows = [
        {"image": "0.png", "question": "a cat?", "answer": "one"},
        {"image": "1.png", "question": "a cat?", "answer": "one"},
        {"image": "1.png", "question": "a cat?", "answer": "two"},
        {"image": "0.png", "question": "a cat?", "answer": "one"},
    ]
    world = World(tmp_path, rows)
    train = world.data.splits["train"]
    facts = survey_split(train, hash_split(train, stop_ids=world.data.prompter.stop.ids), names=["rows"])["duplicates"]
    assert [entry["row"] for entry in facts["same_row"]["rows"]] == [4]
    assert [entry["row"] for entry in facts["same_prompt_other_answer"]["rows"]] == [2, 3]


def test_the_data_report_counts_pictures(tmp_path: Path) -> None:
    world = World(tmp_path, vqa_rows(tmp_path, 2, questions=2))
    facts = world.data.report["splits"]["train"]["pictures"]
    tokens = [image.length for row in world.rows() for branch in row.branches for image in branch.images]
    assert (facts["distinct"], facts["uses"], facts["tokens"]) == (2, 4, sum(tokens))
    assert facts["tokens_percentiles"]["p100"] == max(tokens)
    assert (facts["width_percentiles"]["p0"], facts["height_percentiles"]["p100"]) == (32, 32)
    assert facts["largest"] == {"path": str(tmp_path / "images" / "0.png"), "width": 48, "height": 32}
