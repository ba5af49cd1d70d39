"""Closed labels: scores are those of one plain forward per label, and prompts are read once."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from loralab.config.schema import LoraConfig
from loralab.errors import DataError, ModelError
from loralab.evaluation.answers import Answered, Evidence, Question
from loralab.evaluation.forwards import Interrupted
from loralab.evaluation.generate import GenerationSettings, answer_questions
from loralab.evaluation.metrics.measure import measure
from loralab.evaluation.metrics.texts import EXACT_MATCH
from loralab.evaluation.score import label_ids, score_labels
from loralab.layout.planner import Planner
from loralab.models.adapters import build_adapter
from loralab.models.supervised import SupervisedPeftModel
from loralab.progress import Reporter
from loralab.training.distributed import Processes
from support.families import build_family, lora_targets
from support.layouts import CPU, draw_adapter
from unit.data.prompters import CHATML, build_prompter
from unit.evaluation.asking import count_forwards, in_two_processes, question

PROMPTER = build_prompter(CHATML)
STOP = PROMPTER.stop.ids[0]
PLANNERS = [
    Planner(4096, layout="padded"),
    Planner(40, layout="padded"),
    Planner(4096, layout="packed"),
    Planner(40, layout="packed"),
    Planner(4096),
    Planner(40),
]
ONE_TOKEN = {"yes": (11,), "no": (12,), "maybe": (13,)}
SEVERAL = {"yes": (11, 30), "no": (11, 31, 40), "maybe": (13,), "other": (14, 15, 16, 17)}


def build(family: str = "llama") -> SupervisedPeftModel:
    base = build_family(family, vocabulary=len(PROMPTER.tokenizer))
    model, _ = build_adapter(base, LoraConfig(r=2, dropout=0.5, target_modules=lora_targets(family)), seed=0)
    draw_adapter(model, seed=1)
    model.tree_kernel = "per_tree"
    return model


@pytest.fixture(scope="module")
def model() -> SupervisedPeftModel:
    return build()


def asked(*, passages: int = 3, passage: int = 20, each: int = 4) -> list[Question]:
    """Return questions that share passages, in mixed order, one of them twice."""
    draw = np.random.default_rng(0)
    heads = [draw.integers(3, 200, passage).tolist() for _ in range(passages)]
    questions = [
        question([*heads[number % passages], *draw.integers(3, 200, draw.integers(2, 6)).tolist()], unit=number)
        for number in range(passages * each)
    ]
    return [*questions, question(questions[1].prompt_ids, unit=len(questions))]


def score(
    model: Any,
    questions: list[Question],
    labels: Mapping[str, tuple[int, ...]],
    *,
    planner: Planner = PLANNERS[4],
    batch_size: int = 4,
    **options: Any,
) -> list[Answered]:
    options = {"device": CPU, "reporter": Reporter(), **options}
    return score_labels(model, questions, labels=labels, planner=planner, batch_size=batch_size, **options)


def brute_force(model: SupervisedPeftModel, asked: Question, labels: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    """Return the log-probability of each label: its own forward, full logits, sums in float64."""
    model.eval()
    found = {}
    for label, ids in labels.items():
        start = len(asked.prompt_ids)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*asked.prompt_ids, *ids]])).logits[0].double()
        likely = logits.log_softmax(dim=-1)
        found[label] = float(sum(likely[start + place - 1, token] for place, token in enumerate(ids)))
    return found


@pytest.mark.parametrize("planner", PLANNERS, ids=lambda planner: f"{planner.layout}-{planner.token_budget}")
@pytest.mark.parametrize("labels", [ONE_TOKEN, SEVERAL], ids=["one-token", "several"])
@pytest.mark.parametrize("batch_size", [1, 4, 99])
def test_scores_are_those_of_a_forward_per_label(
    model: SupervisedPeftModel, planner: Planner, labels: dict[str, tuple[int, ...]], batch_size: int
) -> None:
    questions = asked()
    found = score(model, questions, labels, planner=planner, batch_size=batch_size)
    assert [each.question for each in found] == questions
    for each in found:
        wanted = brute_force(model, each.question, labels)
        assert each.label_scores == pytest.approx(wanted, abs=1e-5)
        assert list(each.label_scores or ()) == list(labels)
        assert each.text == max(wanted, key=lambda label: wanted[label])
        assert (each.ids, each.stopped) == ((), None)
    assert labels is SEVERAL or len({each.text for each in found}) > 1


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "mistral-window", "gemma2"])
@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_scores_of_other_families(family: str, layout: Any) -> None:
    model, questions = build(family), asked(each=2)
    for each in score(model, questions, SEVERAL, planner=Planner(4096, layout=layout)):
        assert each.label_scores == pytest.approx(brute_force(model, each.question, SEVERAL), abs=1e-5)


def test_scores_from_the_models_own_logits_are_the_same(model: SupervisedPeftModel) -> None:
    wanted = score(model, asked(), SEVERAL)
    other = build()
    other.full_logits_reason = "asked for"
    for mine, each in zip(score(other, asked(), SEVERAL), wanted, strict=True):
        assert mine.label_scores == pytest.approx(each.label_scores, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_half_precision_gives_numbers_however_far_the_head_goes(dtype: torch.dtype, scale: float) -> None:
    model = build().to(dtype)
    with torch.no_grad():
        model.head.weight.mul_(scale).clamp_(torch.finfo(dtype).min, torch.finfo(dtype).max)
    questions = asked()
    logits = model.eval()(input_ids=torch.tensor([questions[0].prompt_ids])).logits
    assert bool(logits.isinf().any()) == (dtype == torch.float16 and scale > 1)
    for planner in PLANNERS[::2]:
        found = score(model, questions, SEVERAL, planner=planner)
        assert all(math.isfinite(value) for each in found for value in (each.label_scores or {}).values())


def tokens_of(model: Any, questions: list[Question], labels: Any, **options: Any) -> int:
    """Return the tokens that go through the model, which are those that it says."""
    told: list[int] = []
    read = count_forwards(model)
    score(model, questions, labels, count_tokens=told.append, **options)
    if options["planner"].layout != "padded":
        assert sum(read) == sum(told)
    return sum(told)


@pytest.mark.parametrize("planner", PLANNERS, ids=lambda planner: f"{planner.layout}-{planner.token_budget}")
def test_labels_of_one_token_read_nothing_but_prompts(planner: Planner) -> None:
    questions = asked()
    distinct = {q.prompt_ids for q in questions}
    most = sum(map(len, distinct))
    assert tokens_of(build(), questions, ONE_TOKEN, planner=planner) <= most
    nested = {"good": (11, STOP), "good one": (11, 30, STOP)}
    assert tokens_of(build(), questions, nested, planner=planner) <= most + 2 * len(distinct)


@pytest.mark.parametrize("labels", [ONE_TOKEN, SEVERAL], ids=["one-token", "several"])
@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_prompts_are_read_once_for_all_labels(labels: dict[str, tuple[int, ...]], layout: Any) -> None:
    questions = [question([*range(20 + unit, 25 + unit)], unit=unit) for unit in range(6)]  # nothing to share
    paths = {q.prompt_ids + code[:place] for q in questions for code in labels.values() for place in range(len(code))}
    wanted = sum(len(q.prompt_ids) - 1 for q in questions) + len(paths)
    assert tokens_of(build(), questions, labels, planner=Planner(4096, layout=layout)) == wanted


@pytest.mark.parametrize("labels", [ONE_TOKEN, SEVERAL], ids=["one-token", "several"])
@pytest.mark.parametrize("batch_size", [2, 4, 16])
def test_it_reads_at_most_half_of_what_generation_reads_where_passages_are_shared(
    labels: dict[str, tuple[int, ...]], batch_size: int
) -> None:
    model, questions = build(), asked(passages=3, passage=60, each=4)
    read: list[int] = []
    model.embedding.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    longest = max(map(len, labels.values()))
    answer_questions(
        model,
        questions,
        prompter=PROMPTER,
        settings=GenerationSettings(longest),
        batch_size=1,  # nothing is padded
        reporter=Reporter(),
    )
    generated = sum(read)
    assert 2 * tokens_of(model, questions, labels, planner=Planner(4096), batch_size=batch_size) <= generated
    alone = [q for number, q in enumerate(questions) if number < 3]  # one question for each passage
    read.clear()
    answer_questions(
        model,
        alone,
        prompter=PROMPTER,
        settings=GenerationSettings(longest),
        batch_size=1,
        reporter=Reporter(),
    )
    generated = sum(read)
    assert tokens_of(model, alone, ONE_TOKEN, planner=Planner(4096), batch_size=batch_size) <= generated


def test_a_prompt_that_leaves_no_room_is_named() -> None:
    model = build("gpt2")  # 256 positions
    fits, long = question([5] * 253), question([5] * 254, unit=6)
    assert len(score(model, [fits], SEVERAL)) == 1
    with pytest.raises(ModelError, match="prompt of 254 tokens and label of 4, but the model has 256") as caught:
        score(model, [fits, long], SEVERAL)
    assert caught.value.problems[0].where == "row 7"


@pytest.mark.parametrize("training", [True, False])
def test_it_can_be_interrupted_and_leaves_the_mode_alone(model: SupervisedPeftModel, training: bool) -> None:
    model.train(training)
    answers = iter([False, True])
    with pytest.raises(Interrupted):
        score(model, asked(), ONE_TOKEN, batch_size=1, should_stop=lambda: next(answers))
    assert model.training is training
    score(model, asked()[:1], ONE_TOKEN)
    assert model.training is training


def test_processes_share_the_batches(model: SupervisedPeftModel) -> None:
    told: dict[int, list[int]] = {0: [], 1: []}

    def work(processes: Processes) -> list[Answered]:
        return score(
            model, asked(), SEVERAL, batch_size=2, processes=processes, count_tokens=told[processes.rank].append
        )

    first, second = in_two_processes(work)
    alone: list[int] = []
    assert first == second == score(model, asked(), SEVERAL, batch_size=2, count_tokens=alone.append)
    assert told[0]
    assert told[1]
    assert sum(told[0]) + sum(told[1]) == sum(alone)


def test_no_questions_no_answers(model: SupervisedPeftModel) -> None:
    assert score(model, [], ONE_TOKEN) == []


def test_labels_of_which_one_begins_another_are_refused(model: SupervisedPeftModel) -> None:
    with pytest.raises(ValueError, match="no label may begin as another one does"):
        score(model, asked(), {"a": (5,), "b": (5, 6)})


def ids(text: str) -> tuple[int, ...]:
    return tuple(PROMPTER.encode_answers([text])[0])


def written(*references: str) -> list[Question]:
    """Return questions with answers as a template writes them."""
    prompt = "the cat is"
    prompt_ids = PROMPTER.encode([prompt])[0]
    return [
        question(prompt_ids, [*ids(each), STOP], unit=unit, text=prompt, reference_text=each)
        for unit, each in enumerate(references)
    ]


def test_labels_are_tokenized_as_answers_without_stop_tokens() -> None:
    found = label_ids(["red", "blue"], PROMPTER)
    assert found.value == {"red": ids("red"), "blue": ids("blue")}
    assert found.reason == (
        "labels stand right behind the prompt: no references are there; "
        "stop tokens left out, which say nothing about the label"
    )
    assert label_ids(["red<|stop|>", " blue "], PROMPTER).value == {"red<|stop|>": ids("red"), " blue ": ids("blue")}


def test_a_label_that_begins_another_one_takes_the_stop_token_in() -> None:
    assert ids("red cat")[: len(ids("red"))] == ids("red")
    found = label_ids(["red cat", "red", "blue"], PROMPTER)
    assert found.value == {"red cat": (*ids("red cat"), STOP), "red": (*ids("red"), STOP), "blue": (*ids("blue"), STOP)}
    assert found.reason.endswith("each with its stop token, since 'red cat' begins with all tokens of 'red'")


@pytest.mark.parametrize(
    ("references", "lead", "reason"),
    [
        ((" red", " blue", " Red\n"), " ", "labels stand behind ' ', as in 3 of 3 references looked at"),
        (("red", "blue", " red"), "", "labels stand right behind the prompt, as in 2 of 3 references looked at"),
        (("a: red", "a: blue", "red"), "a: ", "labels stand behind 'a: ', as in 2 of 3 references looked at"),
        (("one red", "two blue", "the cat"), "", "no beginning is that of most of the 3 references looked at"),
        (("cat", "dog"), "", "no beginning is that of most of the 2 references looked at"),
    ],
)
def test_labels_stand_where_references_have_them(references: tuple[str, ...], lead: str, reason: str) -> None:
    found = label_ids(["red", "blue", "green"], PROMPTER, written(*references))
    assert found.value == {label: ids(lead + label) for label in ("red", "blue", "green")}
    assert reason in found.reason


def test_labels_are_written_in_the_case_of_the_references() -> None:
    found = label_ids(["red", "BLUE", "green"], PROMPTER, written("Red", "blue", "Red", "red"))
    assert found.value == {"red": ids("Red"), "BLUE": ids("blue"), "green": ids("green")}
    assert found.value.texts == {"red": "Red", "BLUE": "blue", "green": "green"}
    apart = label_ids(["red", "Red"], PROMPTER, written("Red", "red", "Red"))
    assert apart.value == {"red": ids("red"), "Red": ids("Red")}


@pytest.mark.parametrize("write", ["{}", " {}", "a: {}"])
def test_an_answer_is_spelled_as_it_was_scored(model: SupervisedPeftModel, write: str) -> None:
    """Labels are named in lower case, references begin with a capital: those that are right match exactly."""
    questions = written(*[write.format(each) for each in ("Red", "Blue", "Red", "Blue")])
    labels = label_ids(["red", "blue"], PROMPTER, questions).value
    found = score(model, questions, labels)
    assert {each.text for each in found} <= {write.format("Red").strip(), write.format("Blue").strip()}
    for each in found:
        assert each.label_scores is not None
        assert list(each.label_scores) == ["red", "blue"]
        assert each.text.lower().endswith(max(each.label_scores, key=each.label_scores.__getitem__))
    right = measure({"exact_match": EXACT_MATCH}, Evidence(units=4, way="score", answers=found), resamples=0)
    assert right.values["exact_match"] == 0.5  # one prompt, so one answer to all four


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["red"], r"not two or more different labels: \['red'\]"),
        ([], "not two or more different labels"),
        (["red", "blue", "red"], "not two or more different labels"),
        (["red", "  "], "label '  ' has no tokens"),
        (["red", "<|stop|>"], "has no tokens"),
        (["red", "red "], "labels 'red' and 'red ' are the same tokens"),
        (["red<|stop|>cat", "blue"], "holds a stop token"),
    ],
)
def test_labels_that_cannot_be_told_apart_are_named(labels: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        label_ids(labels, PROMPTER, written(" red", " blue"))
    assert caught.value.problems[0].where == "key evaluation.labels"


def test_every_model_is_asked_in_evaluation_mode(model: SupervisedPeftModel) -> None:
    """LoRA dropout is half here: it would show."""
    model.train()
    again = [score(model, asked(), SEVERAL), score(model, asked(), SEVERAL)]
    assert again[0] == again[1]
    with model.disable_adapter():
        base = score(model, asked(), SEVERAL)
    assert base != again[0]
