"""The one place that prompts: serving ids and stop tokens."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from loralab.data.prompts.prompter import Prompter, apply_stop_setting
from loralab.data.prompts.templates import SHIPPED, TEMPLATES
from loralab.errors import DataError
from support import tiny
from unit.data.prompters import (
    CHATML,
    NO_STOP,
    TRIMMING,
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
    if name in SHIPPED:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|stop|>", *SHIPPED[name].tokens]})
    messages = conversation(*turns).messages
    if name == "gemma" and messages[0].role == "system":  # as published, it has no place for one
        messages = messages[1:]
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
    messages = conversation("user: a", "assistant: b").messages
    assert (
        Prompter(tokenizer, ["<|stop|>", tiny.END]).render(messages, add_generation_prompt=False).endswith("b<|stop|>")
    )


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


def test_word_as_stop_token_is_read_as_the_saved_tokenizer_reads_it(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(TEMPLATES["alpaca"])
    apply_stop_setting(tokenizer, ["Ġhouse"])
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    text = "a house, two houses, a Ġhouse"
    assert tokenizer(text)["input_ids"] == saved(text)["input_ids"]
    # What the template writes behind an answer is that one token.
    prompter = Prompter(tokenizer, ["Ġhouse"])
    assert prompter.encode_answers(["blue" + prompter.stop.texts[0]])[0][-1] == prompter.stop.ids[0]


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{% for %}",
        "{{ nothing.at.all }}",
        "{{ '%c' | format(55296) }}",  # half of a surrogate pair, which no tokenizer takes
    ],
)
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
