"""Go templates derived from Jinja ones: equal prompts for every shipped template, or a refusal."""

from collections.abc import Sequence

import pytest

from loralab.data.example import Message
from loralab.data.prompts.prompter import Prompter
from loralab.data.prompts.templates import SHIPPED, TEMPLATES
from loralab.errors import TemplateError
from loralab.export import ollama_prompt
from loralab.export.go_template import GoTemplate
from loralab.export.ollama_prompt import derive_prompt, render_ollama
from support.tiny import build_tokenizer

USER, ANSWER, LATER = Message("user", "One {{ two }}?"), Message("assistant", '"""Three"""'), Message("user", "Four {")
SYSTEM = Message("system", "Be brief.")
SHAPES = ([USER], [SYSTEM, USER], [USER, ANSWER, LATER], [SYSTEM, USER, ANSWER, LATER])


def build_prompter(template: str, tokens: tuple[str, ...] = ()) -> Prompter:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": list(tokens)})
    tokenizer.chat_template = template
    return Prompter(tokenizer)


@pytest.mark.parametrize("drops_bos", [False, True])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_template_is_written_alike(name: str, drops_bos: bool) -> None:
    shipped = SHIPPED[name]
    drop = "<s>" if drops_bos else ""
    text = TEMPLATES[name] if shipped.writes_bos or not drops_bos else "{{- bos_token -}}" + TEMPLATES[name]
    prompter = build_prompter(text, shipped.tokens)
    prompt = derive_prompt(lambda m: prompter.render(m, add_generation_prompt=True), drop=drop, golden=[[USER]])
    assert prompt.turns
    assert prompt.system == (name != "gemma")
    for messages in SHAPES:
        if messages[0] is SYSTEM and not prompt.system:
            continue
        served = prompter.render(messages, add_generation_prompt=True)
        assert render_ollama(GoTemplate(prompt.template), messages) == served.removeprefix(drop)


def test_a_bos_that_ollama_writes_and_the_template_does_not_is_refused() -> None:
    prompter = build_prompter(TEMPLATES["none"])
    with pytest.raises(TemplateError, match="does not begin with '<s>'"):
        derive_prompt(lambda m: prompter.render(m, add_generation_prompt=True), drop="<s>", golden=[])


def test_what_the_template_does_to_blanks_is_said() -> None:
    prompter = build_prompter(TEMPLATES["llama3"], SHIPPED["llama3"].tokens)
    prompt = derive_prompt(lambda m: prompter.render(m, add_generation_prompt=True), drop="", golden=[])
    assert any("blanks" in caveat for caveat in prompt.caveats)


def test_a_template_for_one_question_is_said_to_be_one() -> None:
    prompt = derive_prompt(_one_question, drop="", golden=[])
    assert not prompt.turns
    assert ".Messages" not in prompt.template


def _one_question(messages: Sequence[Message]) -> str:
    if len(messages) != 1:
        raise TemplateError("one question", where="here", fix="ask one")
    return f"Q: {messages[0].content}\nA:"


def test_an_irregular_template_is_refused() -> None:
    with pytest.raises(TemplateError, match="no Go template"):
        derive_prompt(lambda m: m[-1].content.upper(), drop="", golden=[])
    with pytest.raises(TemplateError, match="and the chat template"):
        derive_prompt(lambda m: "".join(x.content for x in m) + "!" * ("2 + 2" in m[-1].content), drop="", golden=[])


def test_turns_that_follow_no_rule_leave_a_template_for_one_question() -> None:
    prompt = derive_prompt(lambda m: " ".join(x.content for x in m) + "!" * (len(m) > 4), drop="", golden=[])
    assert not prompt.turns
    assert any("one question at a time" in caveat for caveat in prompt.caveats)


def test_a_proof_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    prompter = build_prompter(TEMPLATES["none"])
    monkeypatch.setattr(ollama_prompt, "quote_text", lambda text: text + " ")
    with pytest.raises(TemplateError, match="and the chat template"):
        derive_prompt(lambda m: prompter.render(m, add_generation_prompt=True), drop="", golden=[])
