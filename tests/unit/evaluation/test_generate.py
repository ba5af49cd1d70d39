"""Answers: greedy is the argmax, stops stop, and padding changes nothing."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from loralab.config.schema import LoraConfig
from loralab.errors import DataError, ModelError
from loralab.evaluation.answers import Answered
from loralab.evaluation.forwards import Interrupted
from loralab.evaluation.generate import (
    Answer,
    GenerationSettings,
    answer_questions,
    build_generation_config,
    generate_answers,
    pad_left,
    tell_short_rooms,
)
from loralab.models.adapters import build_adapter
from loralab.models.supervised import SupervisedPeftModel
from loralab.progress import Reporter
from loralab.training.distributed import ALONE, Processes
from support import tiny
from support.families import build_family, lora_targets
from support.layouts import draw_adapter
from unit.data.prompters import CHATML, build_prompter
from unit.evaluation.asking import count_forwards, in_two_processes, question

PROMPTER = build_prompter(CHATML)
PROMPTS = [[5, 9, 77, 120, 33, 8], [44], [260, 261, 262], [90, 91]]


def build(family: Any = "llama") -> SupervisedPeftModel:
    model, _ = build_adapter(tiny.build_model(family, vocabulary=len(PROMPTER.tokenizer)), LoraConfig(r=2), seed=0)
    with torch.no_grad():
        # Wide logits: batched and single rows then never come near a tie.
        model.language_model.get_input_embeddings().weight.mul_(20)
        model.language_model.get_output_embeddings().weight.mul_(1 if family == "gpt2" else 20)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return model.eval()


def answer(
    model: SupervisedPeftModel, prompts: Any, *, batch_size: int = 4, most: int = 7, **chosen: Any
) -> list[Answer]:
    settings = GenerationSettings(most, **chosen)
    return generate_answers(
        model, prompts, prompter=PROMPTER, settings=settings, batch_size=batch_size, reporter=Reporter()
    )


def argmax_answer(model: SupervisedPeftModel, prompt: list[int], *, most: int = 7) -> list[int]:
    ids = list(prompt)
    for _ in range(most):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in PROMPTER.stop.ids:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_greedy_is_the_argmax_whatever_the_batch(family: str, batch_size: int) -> None:
    model = build(family)
    answers = answer(model, PROMPTS, batch_size=batch_size)
    wanted = [argmax_answer(model, prompt) for prompt in PROMPTS]
    assert [each.text for each in answers] == [PROMPTER.decode(ids) for ids in wanted]
    assert [each.tokens for each in answers] == [len(ids) for ids in wanted]
    assert len({each.text for each in answers}) > 1


class Unread:
    """In place of a language model whose forward nobody calls."""

    config = LlamaConfig(max_position_embeddings=256)

    def forward(self, input_ids: torch.Tensor) -> None:
        raise NotImplementedError


class Scripted(torch.nn.Module):
    """In place of a model's generate: returns what it was given and a fixed continuation."""

    def __init__(self, *tails: list[int]) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(2, 2)
        self.language_model = Unread()
        self.tails = torch.tensor(tails)
        self.calls: list[dict[str, Any]] = []

    def generate(self, **inputs: Any) -> torch.Tensor:
        self.calls.append(inputs)
        return torch.cat([inputs["input_ids"], self.tails], dim=1)


def test_answer_ends_at_its_first_stop_token() -> None:
    stop, end = PROMPTER.stop.ids
    a, b = PROMPTER.encode(["a"])[0], PROMPTER.encode(["b"])[0]
    model: Any = Scripted([*a, *b, stop, stop], [end, stop, stop, stop], [*a, *a, *a, *b], [*a, *a, *a, end])
    assert answer(model, [[1, 2], [2, 1], [3, 1], [4, 2]]) == [
        Answer("ab", True, 3),
        Answer("", True, 1),
        Answer("aaab", False, 4),
        Answer("aaa", True, 4),
    ]


def test_prompts_are_padded_on_the_left_and_hidden() -> None:
    model: Any = Scripted([1], [1])
    answer(model, [[7, 8, 9], [PROMPTER.stop.ids[0]]])
    (call,) = model.calls
    pad = PROMPTER.stop.ids[0]
    assert call["input_ids"].tolist() == [[7, 8, 9], [pad, pad, pad]]
    assert call["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert call["generation_config"].eos_token_id == list(PROMPTER.stop.ids)
    assert call["generation_config"].max_new_tokens == 7


@pytest.mark.parametrize("number", [0, 1])
def test_generation_stops_at_every_stop_token(number: int) -> None:
    model = build()
    with torch.no_grad():  # every next token is the stop token: its row of the head follows the hidden state
        head = model.language_model.get_output_embeddings().weight
        hidden = model.language_model.base_model(input_ids=torch.tensor([PROMPTS[0]])).last_hidden_state[0, -1]
        head[PROMPTER.stop.ids[number]] = 1000 * hidden
    assert answer(model, PROMPTS[:1]) == [Answer("", True, 1)]


def test_sampling_follows_its_seed() -> None:
    model = build()
    with torch.no_grad():
        model.language_model.get_output_embeddings().weight.div_(20)
    first = answer(model, PROMPTS, temperature=2.0, seed=1)
    assert first == answer(model, PROMPTS, temperature=2.0, seed=1)
    assert first != answer(model, PROMPTS, temperature=2.0, seed=2)
    assert answer(model, PROMPTS, temperature=1.0, top_p=1e-6) == answer(model, PROMPTS)


@pytest.mark.parametrize("training", [True, False])
def test_mode_of_the_model_is_left_alone(training: bool) -> None:
    model = build().train(training)
    answer(model, PROMPTS[:1], most=1)
    assert model.training is training


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_random_state_is_left_alone(temperature: float) -> None:
    model = build()
    torch.manual_seed(11)
    wanted = torch.rand(3)
    torch.manual_seed(11)
    answer(model, PROMPTS, temperature=temperature, batch_size=2)
    assert torch.equal(torch.rand(3), wanted)


def test_training_goes_on_with_what_generation_cached() -> None:
    model = build("llama").train()
    answer(model, PROMPTS)
    model(input_ids=torch.tensor([PROMPTS[0]])).logits.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def test_prompts_of_about_one_length_are_asked_together_longest_first() -> None:
    model: Any = Scripted([1], [2])
    found = answer(model, [[7], [7, 8, 9, 4], [6], [5, 8, 9]], batch_size=2)
    assert [call["input_ids"].shape[1] for call in model.calls] == [4, 1]
    assert model.calls[0]["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    texts = [PROMPTER.decode([token]) for token in (1, 1, 2, 2)]
    assert [each.text for each in found] == texts


def test_the_same_prompt_is_asked_once_where_answers_are_greedy() -> None:
    model: Any = Scripted([1], [2])
    found = answer(model, [[7, 8], [9], [7, 8], [9], [9]])
    assert [call["input_ids"].shape[0] for call in model.calls] == [2]
    assert [each.text for each in found] == [PROMPTER.decode([token]) for token in (1, 2, 1, 2, 2)]
    model = Scripted([1], [2], [3])
    assert len(answer(model, [[7, 8], [9], [7, 8]], temperature=1.0)) == 3
    assert [call["input_ids"].shape[0] for call in model.calls] == [3]


def test_batches_draw_apart() -> None:
    model = build()
    with torch.no_grad():
        model.language_model.get_output_embeddings().weight.div_(20)
    first, second = answer(model, [PROMPTS[0]] * 2, temperature=3.0, batch_size=1)
    assert first != second


FAMILIES = ["gpt2", "llama", "qwen2", "mistral-window", "gemma3"]


def scores(model: SupervisedPeftModel, prompts: list[list[int]], *, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return generated ids (B, T) and the logits that they were chosen by (B, T, V)."""
    ids, mask = pad_left(prompts, pad=PROMPTER.stop.ids[0])
    config = build_generation_config(GenerationSettings(most), PROMPTER)
    config.output_logits = config.return_dict_in_generate = True
    config.eos_token_id = None  # to the end, whatever comes
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_logits_are_those_of_one_at_a_time(family: str) -> None:
    base = build_family(family, vocabulary=len(PROMPTER.tokenizer))
    model, _ = build_adapter(base, LoraConfig(r=2, target_modules=lora_targets(family)), seed=0)
    draw_adapter(model, seed=1)
    model.double().eval()  # in float32 the rounding of some processors alone is more than the bar
    prompts = [*PROMPTS, list(range(20, 60))]
    together, wide = scores(model, prompts, most=9)
    for prompt, row, logits in zip(prompts, together, wide, strict=True):
        alone, own = (found[0] for found in scores(model, [prompt], most=9))
        for place in range(9):
            torch.testing.assert_close(logits[place], own[place], rtol=0, atol=1e-5)
            top = own[place].topk(2).values
            if float(top[0] - top[1]) <= 1e-4:
                break  # what comes behind a tie is another text
            assert int(row[place]) == int(alone[place])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_numbers_behind_padding(family: str, dtype: torch.dtype) -> None:
    model, _ = build_adapter(build_family(family, vocabulary=len(PROMPTER.tokenizer)), LoraConfig(r=2), seed=0)
    _, logits = scores(model.to(dtype).eval(), PROMPTS, most=4)
    assert logits.isfinite().all()


def test_only_the_last_position_goes_through_the_head_and_the_cache_is_used() -> None:
    model = build()
    heads, read = [], []
    model.head.register_forward_hook(lambda module, inputs, output: heads.append(tuple(output.shape[:2])))
    model.embedding.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].shape[1]))
    (found,) = answer(model, PROMPTS[:1], most=5)
    assert heads == [(1, 1)] * found.tokens
    assert read == [len(PROMPTS[0])] + [1] * (found.tokens - 1)


def test_questions_get_their_ids_and_how_they_ended() -> None:
    stop, end = PROMPTER.stop.ids
    a, b = PROMPTER.encode(["a"])[0][0], PROMPTER.encode(["b"])[0][0]
    model: Any = Scripted([a, stop, end], [b, a, b])
    questions = [question([5, 6, 7], [a]), question([8, 9], [b])]
    found = answer_questions(
        model, questions, prompter=PROMPTER, settings=GenerationSettings(3), batch_size=2, reporter=Reporter()
    )
    assert found == [
        Answered(questions[0], "a", ids=(a,), stopped=True),
        Answered(questions[1], "bab", ids=(b, a, b), stopped=False),
    ]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_processes_share_the_batches(batch_size: int) -> None:
    models = [build(), build()]

    def work(processes: Processes) -> tuple[list[Answer], int]:
        model = models[processes.rank]
        calls = count_forwards(model)
        settings = GenerationSettings(4)
        found = generate_answers(
            model,
            PROMPTS,
            prompter=PROMPTER,
            settings=settings,
            batch_size=batch_size,
            reporter=Reporter(),
            processes=processes,
        )
        return found, sum(calls)

    (first, mine), (second, others) = in_two_processes(work)
    alone, everything = work(ALONE)
    assert first == second == alone
    assert 0 < mine < everything
    assert mine + others == everything


def test_no_prompts_no_answers() -> None:
    assert answer(build(), []) == []


def test_a_long_prompt_leaves_the_other_answers_alone() -> None:
    model = build("gpt2")  # 256 positions
    long = (PROMPTS[0] * 50)[:252]
    short = answer(model, PROMPTS, most=7)
    mixed = answer(model, [PROMPTS[0], long, *PROMPTS[1:]], batch_size=8, most=7)
    assert [mixed[0], *mixed[2:]] == short
    assert max(each.tokens for each in short) > 4
    assert mixed[1].text == PROMPTER.decode(argmax_answer(model, long, most=4))
    with pytest.raises(ModelError, match="prompt of 256 tokens, but the model has 256 positions"):
        answer(model, [PROMPTS[0], (PROMPTS[0] * 50)[:256]])


class Listening(Reporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_answers_with_less_room_are_told_of_in_one_line() -> None:
    model: Any = Scripted([1, 1, 1, 1])  # 256 positions
    settings, reporter = GenerationSettings(7), Listening()
    questions = [question([5] * length, unit=unit) for unit, length in enumerate([252, 9, 254, *[253] * 9])]
    tell_short_rooms(model, questions, settings=settings, reporter=reporter)
    assert reporter.said == [
        "max_new_tokens 7 -> 2 at the least for 11 of 12 prompts (row 1, row 3, row 4, row 5, row 6, row 7, row 8, "
        "row 9, ...): the model has 256 positions"
    ]
    tell_short_rooms(model, questions[1:2], settings=settings, reporter=reporter)
    options: Any = {"prompter": PROMPTER, "settings": settings, "batch_size": 1, "reporter": reporter}
    answer_questions(model, questions[:1], **options)  # for both sides, at every evaluation
    assert len(reporter.said) == 1
    generate_answers(model, [questions[0].prompt_ids], **options)
    assert reporter.said[1] == (
        "max_new_tokens 7 -> 4 at the least for 1 of 1 prompts (prompt 1): the model has 256 positions"
    )


def test_a_question_without_room_is_named_by_its_row() -> None:
    model: Any = Scripted([1])
    with pytest.raises(ModelError, match="prompt of 256 tokens, but the model has 256 positions") as caught:
        tell_short_rooms(model, [question([5] * 256, unit=6)], settings=GenerationSettings(7), reporter=Reporter())
    assert caught.value.problems[0].where == "row 7"


def test_prompt_without_tokens_is_named() -> None:
    with pytest.raises(DataError, match="empty prompt") as caught:
        answer(build(), [PROMPTS[0], []])
    assert caught.value.problems[0].where == "prompt 2"


@pytest.mark.parametrize("training", [True, False])
def test_generation_can_be_interrupted_between_batches(training: bool) -> None:
    model: Any = Scripted([1], [1]).train(training)
    asked = []

    def should_stop() -> bool:
        asked.append(len(model.calls))
        return len(asked) == 2

    with pytest.raises(Interrupted):
        generate_answers(
            model,
            PROMPTS,
            prompter=PROMPTER,
            settings=GenerationSettings(2),
            batch_size=2,
            reporter=Reporter(),
            should_stop=should_stop,
        )
    assert asked == [0, 1]
    assert model.training is training
