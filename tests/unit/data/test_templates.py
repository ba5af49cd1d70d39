"""Prompt templates: their exact text, and the choice among them."""

from pathlib import Path
from typing import Any

import pytest

from loralab.config.schema import Config
from loralab.data.example import Message
from loralab.data.formats import FORMATS
from loralab.data.prompter import Prompter, adds_bos
from loralab.data.templates import TEMPLATES, check_template_name, resolve_template
from loralab.errors import DataError
from support import tiny
from unit.data.prompters import CHATML, build_prompter, build_tokenizer, conversation

# Stanford Alpaca, train.py: PROMPT_DICT; the line break at the end is loralab's (and most others').
STANFORD = {
    True: "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    False: "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:",
}


@pytest.mark.parametrize("context", ["", "3, 1, 2", "a\n\nb"])
def test_alpaca_is_the_plain_stanford_string(context: str) -> None:
    row = {"instruction": "Sort <these> & 'those'", "input": context, "output": "1, 2, 3"}
    example: Any = FORMATS["alpaca"].build(row)
    prompt = STANFORD[bool(context)].format_map(row) + "\n"
    assert build_prompter().split_turn(example.messages, 1) == (prompt, f"1, 2, 3{tiny.END}")


def test_alpaca_of_several_turns() -> None:
    messages = conversation("user: a", "assistant: b", "user: c", "assistant: d").messages
    whole = build_prompter().render(messages, add_generation_prompt=False)
    head = STANFORD[False].format(instruction="a")
    assert whole == f"{head}\nb{tiny.END}\n\n### Instruction:\nc\n\n### Response:\nd{tiny.END}"


def test_alpaca_system_message_takes_the_place_of_the_preamble() -> None:
    messages = conversation("system: Be brief.", "user: a").messages
    assert build_prompter().render(messages, add_generation_prompt=True) == (
        "Be brief.\n\n### Instruction:\na\n\n### Response:\n"
    )


@pytest.mark.parametrize("turns", [["user: a", "tool: b"], ["user: a", "system: b"]])
def test_alpaca_refuses_roles_that_it_has_no_place_for(turns: list[str]) -> None:
    with pytest.raises(DataError, match="the alpaca template has no place for role"):
        build_prompter().render(conversation(*turns).messages, add_generation_prompt=False)


def test_none_is_the_contents_and_the_end_token() -> None:
    prompter = build_prompter(TEMPLATES["none"])
    messages = conversation("user:  a\n", "assistant: b", "user: c ").messages
    assert prompter.render(messages, add_generation_prompt=True) == f" a\nb{tiny.END}c "
    assert prompter.split_turn(messages, 1) == (" a\n", f"b{tiny.END}")


@pytest.mark.parametrize("name", TEMPLATES)
def test_named_templates_extend_their_own_prompt(name: str) -> None:
    prompter = build_prompter(TEMPLATES[name])
    messages = conversation("system: s", "user: a", "assistant: b", "user: c", "assistant: d").messages
    for turn in (2, 4):
        prompt, answer = prompter.split_turn(messages, turn)
        assert answer == messages[turn].content + tiny.END
        assert prompter.render(messages, add_generation_prompt=False).startswith(prompt + answer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_bos_is_written_once_where_the_tokenizer_adds_it(name: str) -> None:
    tokenizer = build_tokenizer(bos=True)
    chosen = resolve_template(name, own=None, fallback=None, own_first=True, bos_prefix="{{- bos_token -}}")
    tokenizer.chat_template = chosen.text
    ids = Prompter(tokenizer).encode_prompt([Message("user", "a")])
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert chosen.text.endswith(TEMPLATES[name])


def test_adds_bos_looks_at_what_the_tokenizer_does() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer(bos=True)
    assert not adds_bos(tokenizer)
    assert not adds_bos(build_tokenizer())
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    assert adds_bos(tokenizer)


@pytest.mark.parametrize(
    ("setting", "own", "fallback", "own_first", "name", "reason"),
    [
        ("auto", CHATML, "alpaca", True, "tokenizer", "the tokenizer has a chat template of its own"),
        ("auto", None, "alpaca", True, "alpaca", "the tokenizer has no chat template"),
        ("auto", CHATML, "none", False, "none", "rows of this format are used as they stand"),
        ("auto", CHATML, None, True, "none", "rows of this format are used as they stand"),
        ("tokenizer", CHATML, "alpaca", True, "tokenizer", "set in data.template"),
        ("alpaca", CHATML, "none", True, "alpaca", "set in data.template"),
        ("none", CHATML, "alpaca", True, "none", "set in data.template"),
    ],
)
def test_choice_of_template(
    setting: str, own: str | None, fallback: str | None, own_first: bool, name: str, reason: str
) -> None:
    chosen = resolve_template(setting, own=own, fallback=fallback, own_first=own_first, bos_prefix="")
    assert (chosen.name, chosen.reason) == (name, reason)
    assert chosen.text == (own if name == "tokenizer" else TEMPLATES[name])


def resolve(setting: str) -> Any:
    return resolve_template(setting, own=None, fallback="alpaca", own_first=True, bos_prefix="{{- bos_token -}}")


def test_tokenizer_without_template_cannot_be_asked_for_one() -> None:
    with pytest.raises(DataError, match="no chat template of its own") as caught:
        resolve("tokenizer")
    assert "alpaca, none" in caught.value.problems[0].fix


def test_template_file_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("\ufeff" + CHATML, encoding="utf-8")
    assert resolve(str(path)).text == CHATML


@pytest.mark.parametrize(("content", "message"), [(b" \n", "empty template file"), (b"\xff\xfe", "cannot read")])
def test_unusable_template_file(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        resolve(str(path))
    with pytest.raises(DataError, match="cannot read the template file"):
        resolve(str(tmp_path / "gone.jinja"))


@pytest.mark.parametrize(
    ("name", "what", "fix"),
    [
        ("alpacca", "no such template: 'alpacca'", "did you mean 'alpaca'?"),
        ("my/t.jinja", "no such template file: 'my/t.jinja'", "path of a Jinja file"),
        ("t.j2", "no such template file: 't.j2'", "path of a Jinja file"),
    ],
)
def test_unknown_template_is_found_before_any_data_is_read(name: str, what: str, fix: str) -> None:
    (finding,) = check_template_name(_config(name))
    assert (finding.key, finding.what) == ("data.template", what)
    assert fix in finding.fix


def test_known_templates_give_no_finding(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text(CHATML)
    assert [name for name in ["auto", "tokenizer", *TEMPLATES, str(path)] if check_template_name(_config(name))] == []


def _config(template: str) -> Config:
    return Config.model_validate({"model": {"name": "m"}, "data": {"train": "f", "template": template}})
