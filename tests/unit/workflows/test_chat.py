"""The model's side of a chat: what fits, which system message is sent, how an answer can end."""

import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loralab.config.schema import LoraConfig
from loralab.data.example import Message
from loralab.errors import DataError, ModelError
from loralab.evaluation.generate import GenerationSettings
from loralab.models.adapters import build_adapter
from loralab.progress import Reporter
from loralab.workflows.chat import SessionAnswerer
from loralab.workflows.generate import resolve_system
from support import tiny
from support.reporters import Notes
from unit.data.prompters import CHATML, build_prompter

POSITIONS = 256  # of the tiny model
# A template that passes over system messages, and one that refuses them.
DEAF = CHATML.replace(
    "{% for", "{% for message in messages if message['role'] != 'system' %}{% endfor %}{% for", 1
).replace("messages %}<|start|>", "messages if message['role'] != 'system' %}<|start|>")
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML


@pytest.fixture(scope="module")
def session() -> Any:
    prompter = build_prompter(CHATML)
    model, _ = build_adapter(tiny.build_model(vocabulary=len(prompter.tokenizer)), LoraConfig(r=2), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    config = SimpleNamespace(evaluation=SimpleNamespace(max_new_tokens=16))
    return SimpleNamespace(model=model.eval(), prompter=prompter, config=config, system_prompt=None)


def build(session: Any, most: int | None = None, *, interactive: bool = False) -> SessionAnswerer:
    return SessionAnswerer(session, GenerationSettings(most), interactive=interactive)


def turn_of(session: Any, tokens: int) -> list[Message]:
    """Return a conversation whose prompt has this many tokens."""
    length = len(session.prompter.encode_prompt([Message("user", "")]))
    messages = [Message("user", "\x01" * (tokens - length))]
    assert len(session.prompter.encode_prompt(messages)) == tokens
    return messages


@pytest.mark.parametrize(("most", "reserved"), [(None, 16), (10, 10), (64, 64), (5000, 64)])
def test_conversation_leaves_its_answer_room(most: int | None, reserved: int, session: Any) -> None:
    answerer = build(session, most)
    assert answerer.fits(turn_of(session, POSITIONS - reserved))
    assert not answerer.fits(turn_of(session, POSITIONS - reserved + 1))


def test_answer_that_is_cut_says_by_what(session: Any) -> None:
    pieces: list[str] = []
    reply = build(session).answer(turn_of(session, 20), base=False, write=pieces.append)
    assert reply.cut == "the answer ended at max_new_tokens (16), not by a stop token"
    assert reply.text == "".join(pieces)
    full = build(session).answer(turn_of(session, POSITIONS - 3), base=False, write=pieces.append)
    assert full.cut == "the answer ended at the last of 256 positions, not by a stop token"
    with pytest.raises(ModelError, match="prompt of 256 tokens, but the model has 256 positions"):
        build(session).answer(turn_of(session, POSITIONS), base=False, write=pieces.append)


def test_base_answers_without_the_adapter(session: Any) -> None:
    texts = {
        base: build(session).answer(turn_of(session, 20), base=base, write=lambda _: None).text
        for base in (True, False)
    }
    assert texts[True] != texts[False]
    assert build(session).answer(turn_of(session, 20), base=False, write=lambda _: None).text == texts[False]


def test_first_ctrl_c_stops_the_answer(session: Any) -> None:
    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    reply = build(session, 40, interactive=True).answer(turn_of(session, 20), base=False, write=write)
    assert reply.interrupted
    assert reply.text == "".join(pieces)
    assert len(pieces) == 4  # the token that was being computed still comes
    assert signal.getsignal(signal.SIGINT) is before


def test_second_ctrl_c_breaks_it_off(session: Any) -> None:
    def write(_: str) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build(session, 40, interactive=True).answer(turn_of(session, 20), base=False, write=write)


def test_ctrl_c_ends_a_script(session: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(session, 40).answer(turn_of(session, 20), base=False, write=lambda _: signal.raise_signal(signal.SIGINT))


@pytest.mark.parametrize(
    ("given", "trained", "sent", "said"),
    [
        (None, None, None, []),
        (None, "be", "be", ["system message, as trained: be (--system sends another, '' none)"]),
        ("mine", "be", "mine", []),
        ("", "be", None, []),
        ("mine", None, "mine", []),
    ],
)
def test_system_message_is_the_given_or_the_trained_one(
    given: str | None, trained: str | None, sent: str | None, said: list[str], session: Any
) -> None:
    notes = Notes()
    asked: Any = SimpleNamespace(prompter=session.prompter, system_prompt=trained)
    assert resolve_system(asked, given, notes) == sent
    assert notes.said == said


@pytest.mark.parametrize(
    ("template", "what"), [(DEAF, "leaves the system message out: 'mine'"), (REFUSING, "no system here")]
)
def test_system_message_that_cannot_be_sent_is_refused(template: str, what: str) -> None:
    asked: Any = SimpleNamespace(prompter=build_prompter(template), system_prompt=None)
    with pytest.raises(DataError, match=what):
        resolve_system(asked, "mine", Reporter())
    assert resolve_system(asked, None, Reporter()) is None
