"""Teacher-forced answers: the argmax behind the reference's own tokens, by a plain forward, in every layout."""

from typing import Any

import numpy as np
import pytest
import torch

from loralab.config.schema import LoraConfig
from loralab.evaluation.answers import Answered, Question
from loralab.evaluation.forwards import Interrupted
from loralab.evaluation.generate import GenerationSettings, answer_questions
from loralab.evaluation.teacher_forced import WHY_IT_FLATTERS, force_answers
from loralab.layout.planner import Planner
from loralab.models.adapters import build_adapter
from loralab.models.supervised import SupervisedPeftModel
from loralab.progress import Reporter
from loralab.training.distributed import Processes
from support import tiny
from support.layouts import ALWAYS_SHARE, CPU, draw_adapter
from unit.data.prompters import CHATML, build_prompter
from unit.evaluation.asking import in_two_processes, question

PROMPTER = build_prompter(CHATML)
PLANNERS = [Planner(60, layout="padded"), Planner(60, layout="packed"), Planner(60, cost=ALWAYS_SHARE)]


@pytest.fixture(scope="module")
def model() -> SupervisedPeftModel:
    built, _ = build_adapter(tiny.build_model("llama", vocabulary=len(PROMPTER.tokenizer)), LoraConfig(r=2), seed=0)
    draw_adapter(built, seed=1)
    built.tree_kernel = "per_tree"
    return built


def asked() -> list[Question]:
    draw = np.random.default_rng(0)
    head = draw.integers(3, 200, 12).tolist()
    questions = []
    for unit in range(9):
        own = draw.integers(3, 200, draw.integers(1, 6)).tolist()
        reference = draw.integers(3, 200, draw.integers(1, 6)).tolist()
        questions.append(
            question([*(head if unit % 2 else ()), 3, *own], [*reference, PROMPTER.stop.ids[0]], unit=unit)
        )
    return questions


def force(model: Any, questions: list[Question], *, planner: Planner = PLANNERS[0], **options: Any) -> list[Answered]:
    options = {"batch_size": 4, "device": CPU, "reporter": Reporter(), **options}
    return force_answers(model, questions, prompter=PROMPTER, planner=planner, **options)


def argmax_ids(model: SupervisedPeftModel, asked: Question) -> list[int]:
    ids = [*asked.prompt_ids, *asked.reference_ids]
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([ids])).logits[0]
    return [int(token) for token in logits[len(asked.prompt_ids) - 1 : -1].argmax(dim=-1)]


@pytest.mark.parametrize("planner", PLANNERS, ids=lambda planner: planner.layout)
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_answers_are_the_argmax_behind_the_reference(
    model: SupervisedPeftModel, planner: Planner, batch_size: int
) -> None:
    questions = asked()
    found = force(model, questions, planner=planner, batch_size=batch_size)
    assert [each.question for each in found] == questions
    assert [each.text for each in found] == [PROMPTER.decode(argmax_ids(model, q)) for q in questions]
    assert {(each.ids, each.stopped, each.label_scores) for each in found} == {((), None, None)}
    assert len({each.text for each in found}) > 4


def test_text_ends_at_the_first_stop_token(model: SupervisedPeftModel) -> None:
    questions = [question([5, 6, 7], [8, 9, 10])]
    head = model.language_model.get_output_embeddings().weight
    kept = head.detach().clone()
    with torch.no_grad():  # the second prediction becomes the stop token
        ids = torch.tensor([[5, 6, 7, 8]])
        head[PROMPTER.stop.ids[1]] = model.language_model.base_model(input_ids=ids).last_hidden_state[0, -1] * 100
    changed = argmax_ids(model, questions[0])
    (found,) = force(model, questions)
    with torch.no_grad():
        head.copy_(kept)
    assert changed[1] == PROMPTER.stop.ids[1]
    assert found.text == PROMPTER.decode(changed[:1])


def test_it_flatters(model: SupervisedPeftModel) -> None:
    """What the model writes by itself is its own forced answer; a reference that it would not write lends it words."""
    asked = question([5, 6, 7], [8, 9, 10])
    settings = GenerationSettings(3)
    options = {"prompter": PROMPTER, "settings": settings, "batch_size": 1, "reporter": Reporter()}
    (own,) = answer_questions(model, [asked], **options)  # type: ignore[arg-type]
    itself = question([5, 6, 7], own.ids)
    assert force(model, [itself])[0].text == own.text
    assert force(model, [asked])[0].text != own.text
    assert "reference" in WHY_IT_FLATTERS


@pytest.mark.parametrize("training", [True, False])
def test_it_can_be_interrupted_and_leaves_the_mode_alone(model: SupervisedPeftModel, training: bool) -> None:
    model.train(training)
    answers = iter([False, True])
    with pytest.raises(Interrupted):
        force(model, asked(), should_stop=lambda: next(answers))
    assert model.training is training
    force(model, asked()[:1])
    assert model.training is training


def test_processes_share_the_batches(model: SupervisedPeftModel) -> None:
    def work(processes: Processes) -> list[Answered]:
        return force(model, asked(), processes=processes)

    first, second = in_two_processes(work)
    assert first == second == force(model, asked())


def test_no_questions_no_answers(model: SupervisedPeftModel) -> None:
    assert force(model, []) == []
