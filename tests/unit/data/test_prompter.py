"""The one place that prompts: serving ids, stop tokens, turns and the prompt contract."""

import json
from typing import Any

import pytest

from loralab.data.example import Message
from loralab.data.prompter import Prompter, apply_stop_setting
from loralab.data.templates import TEMPLATES
from loralab.errors import DataError, PromptContractError
from support import tiny
from unit.data.prompters import (
    CHATML,
    NO_STOP,
    TRIMMING,
    UNFAITHFUL,
    build_prompter,
    build_tokenizer,
    conversation,
)

ALL_TEMPLATES = {**TEMPLATES, "chatml": CHATML, "trimming": TRIMMING, "bos": "{{ bos_token }}" + CHATML}


@pytest.mark.parametrize("name", ALL_TEMPLATES)
@pytest.mark.parametrize(
    "turns",
    [["user: hi"], ["system: be kind", "user: Grüße, 世界 👋"], ["user: a", "assistant: b<|stop|>", "user: c\n\n"]],
)
def test_prompt_ids_are_those_of_transformers_own_call(name: str, turns: list[str]) -> None:
    tokenizer = build_tokenizer(ALL_TEMPLATES[name], bos=True)
    messages = conversation(*turns).messages
    theirs = tokenizer.apply_chat_template(
        [message.as_dict() for message in messages], tokenize=True, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert Prompter(tokenizer).encode_prompt(messages) == theirs


def test_encoding_adds_no_special_tokens() -> None:
    from tokenizers.processors import TemplateProcessing

    prompter = build_prompter(CHATML)
    plain = prompter.encode(["a b", ""])
    prompter.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", prompter.tokenizer.convert_tokens_to_ids("<|start|>"))]
    )
    assert prompter.tokenizer("a b")["input_ids"] != plain[0]
    assert prompter.encode(["a b", ""]) == plain
    assert prompter.encode([]) == []


@pytest.mark.parametrize(
    ("template", "end", "setting", "texts", "reason"),
    [
        ("chatml", True, None, ("<|stop|>", tiny.END), "the template writes <|stop|> after an answer; the tokenizer's"),
        ("chatml", False, None, ("<|stop|>",), "the template writes <|stop|> after an answer"),
        ("alpaca", True, None, (tiny.END,), f"the template writes {tiny.END} after an answer"),
        ("no_stop", True, None, (tiny.END,), "the tokenizer's end token (the template writes none)"),
        ("chatml", True, ["<|start|>", "a"], ("<|start|>", "a"), "set in data.stop_tokens"),
    ],
)
def test_stop_tokens(template: str, end: bool, setting: list[str] | None, texts: tuple[str, ...], reason: str) -> None:
    tokenizer = build_tokenizer({**ALL_TEMPLATES, "no_stop": NO_STOP}[template])
    if not end:
        tokenizer.eos_token = None
    stop = Prompter(tokenizer, setting).stop
    assert stop.texts == texts
    assert list(stop.ids) == tokenizer.convert_tokens_to_ids(list(texts))
    assert stop.reason.startswith(reason)


def test_longest_stop_token_is_taken() -> None:
    tokenizer = build_tokenizer(CHATML.replace("<|stop|>", "<|stop|><|start|>"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|stop|>", "<|stop|><|start|>"]})
    assert Prompter(tokenizer).stop.texts[0] == "<|stop|><|start|>"


def test_no_stop_token_is_an_error_that_names_the_key() -> None:
    tokenizer = build_tokenizer(NO_STOP)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end token and the template writes none") as caught:
        Prompter(tokenizer)
    assert caught.value.problems[0].where == "key data.stop_tokens"


def test_stop_setting_becomes_the_end_token_that_templates_write() -> None:
    tokenizer = build_tokenizer(TEMPLATES["alpaca"])
    apply_stop_setting(tokenizer, None)
    assert tokenizer.eos_token == tiny.END
    apply_stop_setting(tokenizer, ["<|stop|>", tiny.END])
    prompter = Prompter(tokenizer, ["<|stop|>", tiny.END])
    assert prompter.split_turn(conversation("user: a", "assistant: b").messages, 1)[1] == "b<|stop|>"


@pytest.mark.parametrize(
    ("setting", "message", "fix"),
    [
        ([], "no stop token given", "list at least one"),
        (["<|stopp|>"], "not a token of this tokenizer: '<|stopp|>'", "did you mean '<|stop|>'?"),
        ([tiny.END, "two words"], "not a token of this tokenizer: 'two words'", "known: "),
    ],
)
def test_unusable_stop_setting(setting: list[str], message: str, fix: str) -> None:
    with pytest.raises(DataError) as caught:
        apply_stop_setting(build_tokenizer(), setting)
    assert caught.value.problems[0].what == message
    assert fix in caught.value.problems[0].fix


def test_turns_are_the_serving_call_and_the_rest_up_to_the_stop() -> None:
    messages = conversation("system: s", "user: a", "assistant: b", "user: c", "assistant: d").messages
    prompter = build_prompter(CHATML)
    head = "<|start|>system\ns<|stop|>\n<|start|>user\na<|stop|>\n<|start|>assistant\n"
    # The line break behind the stop token is the template's, not the answer's.
    assert prompter.split_turn(messages, 2) == (head, "b<|stop|>")
    rest = "b<|stop|>\n<|start|>user\nc<|stop|>\n<|start|>assistant\n"
    assert prompter.split_turn(messages, 4) == (head + rest, "d<|stop|>")
    assert prompter.render(messages[:4], add_generation_prompt=True) == head + rest


@pytest.mark.parametrize(("template", "content"), [(CHATML, "b<|stop|>c"), (TRIMMING, " b<|stop|>c\n")])
def test_stop_text_inside_the_content_does_not_end_the_answer(template: str, content: str) -> None:
    messages = (Message("user", "a"), Message("assistant", content))
    assert build_prompter(template).split_turn(messages, 1)[1] == "b<|stop|>c<|stop|>"


@pytest.mark.parametrize("content", ["  b \n", "b", ""])
def test_content_that_the_template_trims(content: str) -> None:
    messages = (Message("user", "a"), Message("assistant", content))
    assert build_prompter(TRIMMING).split_turn(messages, 1)[1] == content.strip() + "<|stop|>"


def test_answer_without_a_stop_token_in_the_template_is_the_whole_rest() -> None:
    assert build_prompter(NO_STOP).split_turn(conversation("user: a", "assistant: b").messages, 1) == ("a\n", "b\n")


def test_template_that_does_not_extend_its_prompt_names_the_turn() -> None:
    messages = conversation("user: a", "assistant: b").messages
    with pytest.raises(DataError) as caught:
        build_prompter(UNFAITHFUL).split_turn(messages, 1)
    assert caught.value.problems[0].what == "the template does not extend its own prompt at turn 2 (assistant)"


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% for %}", "{{ nothing.at.all }}"])
def test_template_that_fails_is_a_data_error(template: str) -> None:
    with pytest.raises(DataError, match="the template cannot render user > assistant: ") as caught:
        build_prompter(template)
    assert caught.value.problems[0].where == "key data.template"


def test_decode_leaves_out_stop_tokens_at_the_end_only() -> None:
    prompter = build_prompter(CHATML)
    stop, end = prompter.stop.ids
    a = prompter.encode(["a , b"])[0]
    assert prompter.decode([*a, stop, end]) == "a , b"
    assert prompter.decode([*a, stop, *a]) == "a , b<|stop|>a , b"
    assert prompter.decode([]) == ""


@pytest.mark.parametrize("name", ALL_TEMPLATES)
def test_contract_holds_for_the_same_tokenizer_after_json(name: str) -> None:
    contract = json.loads(json.dumps(Prompter(build_tokenizer(ALL_TEMPLATES[name], bos=True)).contract()))
    Prompter(build_tokenizer(ALL_TEMPLATES[name], bos=True)).check_contract(contract, where="w")
    assert len(contract["golden"]) == 3


def _golden(contract: dict[str, Any]) -> None:
    contract["golden"][2]["ids"][-1] += 1


def _template(contract: dict[str, Any]) -> None:
    contract["template"] += " "


def _stops(contract: dict[str, Any]) -> None:
    contract["stop_token_ids"] = contract["stop_token_ids"][::-1]


def _no_stops(contract: dict[str, Any]) -> None:
    del contract["stop_token_ids"]


@pytest.mark.parametrize(
    ("damage", "part"),
    [(_golden, "Grüße"), (_template, "template is"), (_stops, "stop_token_ids is"), (_no_stops, "with None")],
)
def test_broken_contract_is_refused(damage: Any, part: str) -> None:
    prompter = build_prompter(CHATML)
    contract = prompter.contract()
    damage(contract)
    with pytest.raises(PromptContractError, match=part) as caught:
        prompter.check_contract(contract, where="adapter/prompt_contract.json")
    assert caught.value.problems[0].what.startswith("prompt contract broken: ")
    assert caught.value.problems[0].where == "adapter/prompt_contract.json"


def test_tokenizer_with_other_merges_breaks_the_contract() -> None:
    contract = build_prompter().contract()
    other = build_tokenizer(TEMPLATES["alpaca"])
    other.add_tokens(["capital"])
    with pytest.raises(PromptContractError, match="gives ids"):
        Prompter(other).check_contract(contract, where="w")
