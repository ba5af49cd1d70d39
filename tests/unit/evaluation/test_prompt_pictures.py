"""Answers about pictures: generated, scored and forced, in batches as one at a time, and as a plain loop has them."""

import pickle
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
from loralab.evaluation import prompt_pictures
from loralab.evaluation.answers import Question
from loralab.evaluation.distances import measure_branches
from loralab.evaluation.generate import GenerationSettings, answer_questions, generate_answers
from loralab.evaluation.prompt_pictures import PictureInputs
from loralab.evaluation.questions import as_example, questions_of, with_unit
from loralab.evaluation.score import score_labels
from loralab.evaluation.streaming import stream_answer
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


def test_a_picture_is_decoded_once_a_call_and_its_tensors_stand_for_every_occurrence(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    decode = processing.decode
    monkeypatch.setattr(processing, "decode", lambda file: (decoded.append(file.path), decode(file))[1])
    answered(world, world.questions, batch_size=4)
    shown = [image.file.path for question in world.questions for image in question.images]
    assert sorted(decoded) == sorted(set(shown))
    assert len(shown) > len(decoded)


def test_pixels_are_kept_within_their_bound(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    decode = processing.decode
    monkeypatch.setattr(processing, "decode", lambda file: (decoded.append(file.path), decode(file))[1])
    monkeypatch.setattr(prompt_pictures, "_KEPT_BYTES", 1)
    inputs = PictureInputs(world.model, world.pictures)
    two = next(question for question in world.questions if len(question.images) == 2)
    ids = torch.tensor([two.prompt_ids])
    first, again = (inputs.read(ids, [two.images]) for _ in range(2))
    assert decoded == [image.file.path for image in two.images] * 2
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_model_without_a_processor_is_asked_about_no_picture(world: World) -> None:
    shown = next(question for question in world.questions if question.images)
    with pytest.raises(ModelError, match="the model reads none"):
        PictureInputs(world.model, None).read(torch.tensor([shown.prompt_ids]), [shown.images])


def label_sums(world: World, question: Question, labels: dict[str, tuple[int, ...]]) -> dict[str, float]:
    """Return the log-probability of each label, token by token."""
    found = {}
    for name, code in labels.items():
        total = 0.0
        for place, token in enumerate(code):
            total += float(world.next_logits(question, list(code[:place])).double().log_softmax(-1)[token])
        found[name] = total
    return found


def test_labels_are_scored_behind_pictures(world: World) -> None:
    codes = world.data.prompter.encode_answers(["one cat", "two", "red bird"])
    labels = {name: tuple(code) for name, code in zip(("a", "b", "c"), codes, strict=True)}
    expected = [label_sums(world, question, labels) for question in world.questions]
    for planner in (
        world.planner(layout="padded"),
        world.planner(cost=ALWAYS_SHARE),
        world.planner(token_budget=60, layout="packed"),
    ):
        for size in (1, 4):
            options: dict[str, Any] = {"planner": planner, "batch_size": size, "device": CPU, "reporter": Reporter()}
            found = score_labels(world.model, world.questions, labels=labels, **options)
            for sums, each in zip(expected, found, strict=True):
                assert each.label_scores == pytest.approx(sums, abs=2e-4)


def test_answers_are_forced_behind_pictures(world: World) -> None:
    stop = world.data.prompter.stop.ids
    expected = []
    for question in world.questions:
        ids = [
            int(world.next_logits(question, list(question.reference_ids[:place])).argmax())
            for place in range(len(question.reference_ids))
        ]
        end = next((place for place, token in enumerate(ids) if token in stop), len(ids))
        expected.append(world.data.prompter.decode(ids[:end]))
    for size in (1, 5):
        found = force_answers(
            world.model,
            world.questions,
            prompter=world.data.prompter,
            planner=world.planner(cost=ALWAYS_SHARE),
            batch_size=size,
            device=CPU,
            reporter=Reporter(),
        )
        assert [each.text for each in found] == expected


def test_distances_are_measured_behind_pictures(world: World) -> None:
    branches = [branch for example in world.data.splits["train"] for branch in example.branches]
    options: dict[str, Any] = {"device": CPU, "reporter": Reporter(), "label": "x"}
    alone = measure_branches(world.model, branches, planner=world.planner(layout="padded"), batch_size=1, **options)
    together = measure_branches(
        world.model, branches, planner=world.planner(cost=ALWAYS_SHARE), batch_size=8, **options
    )
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.distances, other.distances, atol=1e-3)
        np.testing.assert_allclose(one.adapter_losses, other.adapter_losses, atol=1e-4)
    first = next(place for place, branch in enumerate(branches) if branch.images)
    question = world.questions[first]
    token = int(branches[first].answer_ids[0])
    loss = -float(world.next_logits(question, []).double().log_softmax(-1)[token])
    assert alone[first].adapter_losses[0] == pytest.approx(loss, abs=1e-4)


def test_questions_keep_their_pictures(world: World) -> None:
    question = next(question for question in world.questions if len(question.images) == 2)
    example = as_example(question, [question.reference_ids])
    assert example.branches[0].images == question.images
    assert pickle.loads(pickle.dumps(question)).images == question.images
    assert with_unit(question, 7).images == question.images


def test_a_streamed_answer_is_the_generated_one(world: World) -> None:
    for question in world.questions[-3:]:
        settings: dict[str, Any] = {"prompter": world.data.prompter, "settings": SETTINGS}
        pieces: list[str] = []
        streamed = stream_answer(
            world.model, question.prompt_ids, images=question.images, write=pieces.append, **settings
        )
        (generated,) = generate_answers(
            world.model,
            [question.prompt_ids],
            images=[question.images],
            batch_size=1,
            reporter=Reporter(),
            **settings,
        )
        assert streamed == generated
        assert "".join(pieces) == generated.text
