"""Streamed answers: the pieces are the whole, no piece is taken back, and a request stops them."""

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from loralab.config.schema import LoraConfig
from loralab.data.prompts.prompter import Prompter
from loralab.evaluation.generate import Answer, GenerationSettings, generate_answers
from loralab.evaluation.streaming import WholeText, stream_answer
from loralab.models.adapters import build_adapter
from loralab.models.supervised import SupervisedPeftModel
from loralab.progress import Reporter
from support import tiny
from unit.data.prompters import CHATML, build_prompter

BYTES = build_prompter(CHATML)
TEXTS = ["Grüße, 世界! 👋🏽 ok", " blank before", "\n\nlines\n", "👩‍👩‍👧", "a\ufffdb\ufffd", "世", "x  y\t", ""]


def build_blank_prompter() -> Prompter:
    """Return a prompter like Llama 2's: blanks as `▁`, one taken from the first token, rare characters as bytes."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abeginklmoprtuxy,!",
        "▁ok",
        "▁b",
    ]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "b")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
    return Prompter(tokenizer)


BLANKS = build_blank_prompter()


def stream(prompter: Prompter, ids: Sequence[int]) -> list[str]:
    text = WholeText(prompter)
    return [*(text.add(token) for token in ids), text.finish()]


def encode(prompter: Prompter, text: str) -> list[int]:
    return prompter.encode([text.replace(" ", "▁") if prompter is BLANKS else text])[0]


@pytest.mark.parametrize("prompter", [BYTES, BLANKS], ids=["bytes", "blanks"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_answer_wherever_it_ends(prompter: Prompter, text: str) -> None:
    ids = encode(prompter, text)
    for end in range(len(ids) + 1):
        assert "".join(stream(prompter, ids[:end])) == prompter.decode(ids[:end])


@pytest.mark.parametrize("prompter", [BYTES, BLANKS], ids=["bytes", "blanks"])
def test_pieces_of_anything_are_never_taken_back(prompter: Prompter) -> None:
    draw = random.Random(0)
    special = set(prompter.tokenizer.all_special_ids)
    usable = [token for token in range(len(prompter.tokenizer)) if token not in special]
    for _ in range(200):
        ids = [draw.choice(usable) for _ in range(12)]
        assert "".join(stream(prompter, ids)) == prompter.decode(ids)


def test_characters_come_whole_and_at_once() -> None:
    ids = encode(BYTES, "aß世b")
    assert [piece for piece in stream(BYTES, ids) if piece] == ["a", "ß", "世", "b"]
    assert len(ids) == 7
    assert stream(BYTES, ids)[-1] == ""
    assert stream(BYTES, encode(BYTES, "the cat"))[0] != ""


def test_first_blank_goes_and_the_others_stay() -> None:
    assert stream(BLANKS, encode(BLANKS, " b ok b")) == ["b", " ", "o", "k", " b", ""]


def test_decoder_that_takes_back_is_shown_to_do_so() -> None:
    texts = ["", "a", "ab", "xyz"]
    fickle: Any = SimpleNamespace(
        decode=lambda ids: texts[len(ids)], tokenizer=SimpleNamespace(convert_ids_to_tokens=str)
    )
    assert stream(fickle, [1, 2, 3]) == ["a", "b", "", "\nxyz"]


# --- with a model ------------------------------------------------------------------------------------------------

PROMPT = [5, 9, 77, 120, 33, 8]


@pytest.fixture(scope="module")
def model() -> SupervisedPeftModel:
    built, _ = build_adapter(tiny.build_model(vocabulary=len(BYTES.tokenizer)), LoraConfig(r=2), seed=0)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return built


def run(
    model: SupervisedPeftModel, count: int = 20, stop_after: int = 1000, **chosen: float
) -> tuple[Answer, list[str]]:
    pieces: list[str] = []
    asked: list[int] = []

    def should_stop() -> bool:
        asked.append(1)
        return len(asked) >= stop_after

    settings = GenerationSettings(count, **chosen)  # type: ignore[arg-type]
    answer = stream_answer(
        model, PROMPT, prompter=BYTES, settings=settings, write=pieces.append, should_stop=should_stop
    )
    return answer, pieces


def whole(model: SupervisedPeftModel, count: int = 20, **chosen: float) -> Answer:
    settings = GenerationSettings(count, **chosen)  # type: ignore[arg-type]
    (answer,) = generate_answers(model, [PROMPT], prompter=BYTES, settings=settings, batch_size=1, reporter=Reporter())
    return answer


def test_streamed_answer_is_the_generated_one(model: SupervisedPeftModel) -> None:
    answer, pieces = run(model)
    assert answer == whole(model)
    assert "".join(pieces) == answer.text
    assert len(pieces) > 5
    with model.disable_adapter():
        base, _ = run(model)
        assert base == whole(model)
    assert base.text != answer.text


def test_sampled_answer_is_the_generated_one(model: SupervisedPeftModel) -> None:
    torch.manual_seed(3)
    first, _ = run(model, temperature=2.0)
    assert first == whole(model, temperature=2.0, seed=3)
    assert run(model, temperature=2.0)[0] != first  # the next one goes on drawing


@pytest.mark.parametrize("number", [0, 1])
def test_stop_token_ends_it_and_is_not_written(number: int, model: SupervisedPeftModel) -> None:
    head = model.language_model.get_output_embeddings().weight
    kept = head.detach().clone()
    with torch.no_grad():  # every next token is the stop token: its row of the head follows the hidden state
        hidden = model.language_model.base_model(input_ids=torch.tensor([PROMPT])).last_hidden_state[0, -1]
        head[BYTES.stop.ids[number]] = 1000 * hidden
    answer, pieces = run(model)
    with torch.no_grad():
        head.copy_(kept)
    assert (answer, pieces) == (Answer("", True, 1), [])


def test_request_stops_it_with_what_was_written(model: SupervisedPeftModel) -> None:
    answer, pieces = run(model, stop_after=7)
    assert (answer.stopped, answer.tokens) == (False, 7)
    assert answer.text == "".join(pieces)
    assert whole(model).text.startswith(answer.text)
    assert 0 < len(answer.text) < len(whole(model).text)


@pytest.mark.parametrize("training", [True, False])
def test_mode_of_the_model_is_left_alone(training: bool, model: SupervisedPeftModel) -> None:
    run(model.train(training), 1)
    assert model.training is training
