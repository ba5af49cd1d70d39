"""Answers: greedy is the argmax, stops stop, and padding changes nothing."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loralab.config.schema import LoraConfig
from loralab.errors import DataError, ModelError
from loralab.evaluation.generate import Answer, GenerationSettings, generate_answers
from loralab.evaluation.perplexity import Interrupted
from loralab.models.adapters import build_adapter
from loralab.models.supervised import SupervisedPeftModel
from loralab.progress import Reporter
from support import tiny
from unit.data.prompters import CHATML, build_prompter

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


class Scripted(torch.nn.Module):
    """In place of a model's generate: returns what it was given and a fixed continuation."""

    def __init__(self, *tails: list[int]) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(2, 2)
        self.language_model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=256))
        self.tails = torch.tensor(tails)
        self.calls: list[dict[str, Any]] = []

    def generate(self, **inputs: Any) -> torch.Tensor:
        self.calls.append(inputs)
        return torch.cat([inputs["input_ids"], self.tails], dim=1)


def test_answer_ends_at_its_first_stop_token() -> None:
    stop, end = PROMPTER.stop.ids
    a, b = PROMPTER.encode(["a"])[0], PROMPTER.encode(["b"])[0]
    model: Any = Scripted([*a, *b, stop, stop], [end, stop, stop, stop], [*a, *a, *a, *b], [*a, *a, *a, end])
    assert answer(model, PROMPTS) == [
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
