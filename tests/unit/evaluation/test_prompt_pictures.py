"""Answers about pictures: generated, scored and forced, in batches as one at a time, and as a plain loop has them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loralab.config.schema import DataConfig, LoraConfig
from loralab.data.dataset import PreparedData, prepare_data
from loralab.data.example import Branch, TokenizedExample
from loralab.data.images import processor as processing
from loralab.data.images.processor import PictureProcessor
from loralab.data.images.reader import PictureReader
from loralab.errors import ModelError
from loralab.evaluation.answers import Question
from loralab.evaluation.distances import measure_branches
from loralab.evaluation.generate import GenerationSettings, answer_questions, generate_answers
from loralab.evaluation.prompt_pictures import PictureInputs
from loralab.evaluation.questions import as_example, questions_of
from loralab.evaluation.score import score_labels
from loralab.evaluation.teacher_forced import force_answers
from loralab.layout.planner import Planner
from loralab.models.adapters import build_adapter
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.vision import position_axes
from loralab.progress import Reporter
from loralab.training.loss import model_inputs
from support.layouts import ALWAYS_SHARE, CPU, draw_adapter
from support.tiny import write_rows
from support.tiny_vision import VISION_FAMILIES, build_vision_model, draw_picture, vqa_rows

MOST = 6
SETTINGS = GenerationSettings(MOST)


class World:
    """A tiny model, and rows about pictures: several on one, two in a turn, none, and equal words on another."""

    def __init__(self, family: Any, folder: Path, *, seed: int = 0) -> None:
        base, processor = build_vision_model(family, seed=seed)
        base.requires_grad_(False)
        self.model: SupervisedPeftModel
        self.model, _ = build_adapter(base, LoraConfig(r=4, vision="all"), seed=seed)
        draw_adapter(self.model, seed=seed + 1)
        self.model.tree_kernel = "per_tree"
        self.pictures = PictureProcessor(processor)
        self.data = _prepared(folder, self.pictures)
        self.questions = questions_of(self.data.splits["train"], self.data.prompter)
        self.reader = PictureReader(self.pictures, position_axes(self.model.language_model.config))

    def planner(self, **options: Any) -> Planner:
        return Planner(options.pop("token_budget", 100_000), pictures=self.reader, **options)

    def next_logits(self, question: Question, ids: list[int]) -> torch.Tensor:
        """Return what comes behind a prompt and some ids, by this program's own forward."""
        prompt = np.asarray([*question.prompt_ids, *ids], dtype=np.int32)
        example = TokenizedExample(1, 0, (Branch(prompt, np.asarray([0], dtype=np.int32), question.images),))
        (batch,) = self.planner(layout="padded")([example]).micro_batches
        inputs = model_inputs(batch)
        names = ("input_ids", "attention_mask", "position_ids", "pictures")
        with torch.no_grad():
            return self.model.eval().logits(**{name: inputs[name] for name in names if name in inputs})[0, -1]

    def greedy(self, question: Question) -> list[int]:
        ids: list[int] = []
        while len(ids) < MOST and (not ids or ids[-1] not in self.data.prompter.stop.ids):
            ids.append(int(self.next_logits(question, ids).argmax()))
        return [token for token in ids if token not in self.data.prompter.stop.ids]


def _prepared(folder: Path, pictures: PictureProcessor) -> PreparedData:
    def row(*content: Any, answer: str) -> dict[str, Any]:
        turns = [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}]
        return {"messages": turns}

    def shown(name: str) -> dict[str, str]:
        return {"type": "image", "image": name}

    rows = [row(shown(each["image"]), each["question"], answer=each["answer"]) for each in vqa_rows(folder, 3)]
    draw_picture(folder / "images/8.png", 8)  # of the size of the first, with the same words
    rows.append(row(shown("images/8.png"), "is the cat 0?", answer="one 0 0"))
    rows.append(row(shown("images/0.png"), shown("images/1.png"), "which cat?", answer="two"))
    rows.append(row("the bird sings", answer="one river"))
    section = DataConfig(train=str(write_rows(folder / "rows.json", rows)), cache_dir=str(folder / "cache"))
    return prepare_data(section, pictures.processor.tokenizer, reporter=Reporter(), pictures=pictures)


@pytest.fixture(scope="module", params=VISION_FAMILIES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(request.param, tmp_path_factory.mktemp(request.param))


def answered(world: World, questions: Any, *, batch_size: int) -> list[list[int]]:
    made = answer_questions(
        world.model,
        questions,
        prompter=world.data.prompter,
        settings=SETTINGS,
        batch_size=batch_size,
        reporter=Reporter(),
    )
    return [list(each.ids) for each in made]


def test_generated_answers_are_those_of_a_greedy_loop_however_rows_are_batched(world: World) -> None:
    expected = [world.greedy(question) for question in world.questions]
    assert len({tuple(each) for each in expected}) > len(expected) // 2  # pictures and words matter
    for size in (1, 3, 100):
        assert answered(world, world.questions, batch_size=size) == expected, size


def test_equal_words_about_another_picture_of_the_size_are_another_question(world: World) -> None:
    first = next(q for q in world.questions if q.images)
    other = next(q for q in world.questions if q.prompt_ids == first.prompt_ids and q.images != first.images)
    assert len(other.images) == 1
    logits = [world.next_logits(each, []) for each in (first, other)]
    assert float((logits[0] - logits[1]).abs().max()) > 0.1
    assert answered(world, [first, other], batch_size=2) == [world.greedy(first), world.greedy(other)]
