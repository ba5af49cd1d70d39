"""Prompt templates: their exact text, the choice among them, and what they ask of a tokenizer."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from loralab.config.schema import Config
from loralab.data.example import Message, ToolCall
from loralab.data.formats.table import FORMATS
from loralab.data.prompts.prompter import Prompter, adds_bos, render_with
from loralab.data.prompts.templates import (
    BOS_PREFIXES,
    SHIPPED,
    TEMPLATES,
    Template,
    check_template_name,
    prepare_template,
    resolve_template,
    usable_templates,
)
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
# As published: what of a content these leave out, and whom they have no place for.
TRIMS = {"gemma", "llama3"}
NO_SYSTEM = {"gemma"}
TOOLS = {"chatml", "llama3", "mistral", "qwen"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TOOL_TEXT = '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}'
CALL = Message("assistant", "", tool_calls=(ToolCall("weather", {"town": "Köln"}, "abcdefgh1"),))
RESULT = Message("tool", '{"sky": "blue"}', name="weather", call_id="abcdefgh1")
BRIEF, ASK, SAID, MORE, DONE = conversation(
    "system: Be brief.", "user: a", "assistant: b", "user: c", "assistant: d"
).messages
ODD = [
    "plain",
    "  blanks before\nand behind \n\n",
    "{{ bos_token }} {% for x in y %} {# not a comment #} %} }}",
    "one\r\ntwo\rthree",
    "👋🏽 世界 \u200b",
    "### Instruction:\n</s> [INST] <|im_start|>system USER:",
]


def tokenizer_for(name: str, *, bos: bool = True) -> PreTrainedTokenizerFast:
    """Return the tiny tokenizer with the tokens that a template needs."""
    tokenizer = build_tokenizer(bos=bos)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [*SHIPPED[name].tokens, "<|start|>", "<|stop|>"]},
    )
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def stop_of(name: str) -> str:
    return {"chatml": "<|im_end|>", "qwen": "<|im_end|>", "gemma": "<end_of_turn>", "llama3": "<|eot_id|>"}.get(
        name, tiny.END
    )


def render(name: str, *messages: Message, tools: Any = (), prompt: bool = False) -> str:
    return Prompter(tokenizer_for(name)).render(messages, add_generation_prompt=prompt, tools=tools)


def split(prompter: Prompter, messages: Any, turn: int, tools: Any = ()) -> tuple[str, str]:
    """Return the serving call's text of a turn and what the template writes behind it."""
    prompt = prompter.render(messages[:turn], add_generation_prompt=True, tools=tools)
    whole = prompter.render(messages[: turn + 1], add_generation_prompt=False, tools=tools)
    assert whole.startswith(prompt)
    return prompt, whole[len(prompt) :]


# The shipped texts


def test_every_file_has_an_entry() -> None:
    import loralab.data.prompts.templates as module

    folder = Path(module.__file__).parent / "chat_templates"
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.jinja" for name in SHIPPED)
    assert list(TEMPLATES) == list(SHIPPED)


@pytest.mark.parametrize("context", ["", "3, 1, 2", "a\n\nb"])
def test_alpaca_is_the_plain_stanford_string(context: str) -> None:
    row = {"instruction": "Sort <these> & 'those'", "input": context, "output": "1, 2, 3"}
    example: Any = FORMATS["alpaca"].build(row)
    prompt = STANFORD[bool(context)].format_map(row) + "\n"
    assert split(build_prompter(), example.messages, 1) == (prompt, f"1, 2, 3{tiny.END}")


def test_alpaca_of_several_turns() -> None:
    whole = build_prompter().render([ASK, SAID, MORE, DONE], add_generation_prompt=False)
    head = STANFORD[False].format(instruction="a")
    assert whole == f"{head}\nb{tiny.END}\n\n### Instruction:\nc\n\n### Response:\nd{tiny.END}"


def test_alpaca_system_message_takes_the_place_of_the_preamble() -> None:
    assert build_prompter().render([BRIEF, ASK], add_generation_prompt=True) == (
        "Be brief.\n\n### Instruction:\na\n\n### Response:\n"
    )


def test_none_is_the_contents_and_the_end_token() -> None:
    prompter = build_prompter(TEMPLATES["none"])
    messages = conversation("user:  a\n", "assistant: b", "user: c ").messages
    assert prompter.render(messages, add_generation_prompt=True) == f" a\nb{tiny.END}c "
    assert split(prompter, messages, 1) == (" a\n", f"b{tiny.END}")


CHATML_BODY = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
PUBLISHED = {
    "chatml": f"<|im_start|>system\nBe brief.<|im_end|>\n{CHATML_BODY}<|im_start|>assistant\n",
    "qwen": f"<|im_start|>system\nBe brief.<|im_end|>\n{CHATML_BODY}<|im_start|>assistant\n",
    "llama3": "<|bos|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n<|user|>\nc<|end|>\n"
    "<|assistant|>\n",
    "mistral": "<|bos|>[INST] Be brief.\n\na [/INST] b<|end|>[INST] c [/INST]",
    "zephyr": "<|system|>\nBe brief.<|end|>\n<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n<|user|>\nc<|end|>\n"
    "<|assistant|>\n",
    "vicuna": "Be brief.\n\nUSER: a\nASSISTANT: b<|end|>\nUSER: c\nASSISTANT:",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_text(name: str) -> None:
    assert render(name, BRIEF, ASK, SAID, MORE, prompt=True) == PUBLISHED[name]


def test_gemma_calls_the_assistant_model() -> None:
    assert render("gemma", ASK, SAID, MORE, prompt=True) == (
        "<|bos|><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
        "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n"
    )


def test_only_qwen_writes_a_system_message_of_its_own() -> None:
    own = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    assert render("qwen", ASK) == f"{own}<|im_start|>user\na<|im_end|>\n"
    assert render("chatml", ASK) == "<|im_start|>user\na<|im_end|>\n"
    assert not any("ou are" in render(name, ASK) for name in SHIPPED if name != "qwen")


HERMES = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n" + TOOL_TEXT + "\n</tools>\n"
    "\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> "
    'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
)
HERMES_TURNS = (
    "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    '<tool_call>\n{"name": "weather", "arguments": {"town": "Köln"}}\n</tool_call><|im_end|>\n'
    '<|im_start|>user\n<tool_response>\n{"sky": "blue"}\n</tool_response><|im_end|>\n<|im_start|>assistant\n'
)


def test_chatml_writes_tools_in_the_hermes_form() -> None:
    turns = (ASK, CALL, RESULT)
    assert render("chatml", *turns, tools=[WEATHER], prompt=True) == f"<|im_start|>system\n{HERMES}{HERMES_TURNS}"
    with_system = f"<|im_start|>system\nBe brief.\n\n{HERMES}{HERMES_TURNS}"
    assert render("chatml", BRIEF, *turns, tools=[WEATHER], prompt=True) == with_system
    assert render("qwen", BRIEF, *turns, tools=[WEATHER], prompt=True) == with_system
    own = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    assert (
        render("qwen", *turns, tools=[WEATHER], prompt=True) == f"<|im_start|>system\n{own}\n\n{HERMES}{HERMES_TURNS}"
    )


@pytest.mark.parametrize("name", ["chatml", "qwen"])
def test_results_that_follow_each_other_share_a_turn(name: str) -> None:
    calls = Message("assistant", "Let me see.", tool_calls=(*CALL.tool_calls, ToolCall("clock", "now")))
    other = Message("tool", "12:00")
    assert render(name, BRIEF, ASK, calls, RESULT, other, SAID).endswith(
        '<|im_start|>assistant\nLet me see.\n<tool_call>\n{"name": "weather", "arguments": {"town": "Köln"}}\n'
        '</tool_call>\n<tool_call>\n{"name": "clock", "arguments": "now"}\n</tool_call><|im_end|>\n'
        '<|im_start|>user\n<tool_response>\n{"sky": "blue"}\n</tool_response>\n<tool_response>\n12:00\n'
        "</tool_response><|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    )


def test_llama3_writes_tools_into_the_first_user_turn() -> None:
    indented = (
        '{\n    "type": "function",\n    "function": {\n        "name": "weather",\n        "parameters": {\n'
        '            "type": "object"\n        }\n    }\n}\n\n'
    )
    assert render("llama3", BRIEF, ASK, CALL, RESULT, tools=[WEATHER], prompt=True) == (
        "<|bos|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please respond with a JSON for a "
        "function call with its proper arguments that best answers the given prompt.\n\nRespond in the format "
        '{"name": function name, "parameters": dictionary of argument name and its value}.Do not use variables.\n\n'
        f"{indented}a<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        '{"name": "weather", "parameters": {"town": "Köln"}}<|eot_id|>'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"sky\\": \\"blue\\"}"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_mistral_writes_tools_into_the_last_user_turn() -> None:
    listing = f"[AVAILABLE_TOOLS] [{TOOL_TEXT}][/AVAILABLE_TOOLS]"
    call = '[TOOL_CALLS] [{"name": "weather", "arguments": {"town": "Köln"}, "id": "abcdefgh1"}]<|end|>'
    result = '[TOOL_RESULTS] {"content": {"sky": "blue"}, "call_id": "abcdefgh1"}[/TOOL_RESULTS]'
    assert render("mistral", BRIEF, ASK, CALL, RESULT, SAID, MORE, tools=[WEATHER], prompt=True) == (
        f"<|bos|>[INST] a[/INST]{call}{result} b<|end|>{listing}[INST] Be brief.\n\nc[/INST]"
    )
    anonymous = Message("assistant", "", tool_calls=(ToolCall("weather", {}), ToolCall("clock", {})))
    assert render("mistral", ASK, anonymous, Message("tool", "1")) == (
        '<|bos|>[INST] a [/INST][TOOL_CALLS] [{"name": "weather", "arguments": {}}, {"name": "clock", "arguments": {}}]'
        '<|end|>[TOOL_RESULTS] {"content": 1}[/TOOL_RESULTS]'
    )


# What holds for all of them


@pytest.mark.parametrize("content", ODD)
@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_extend_their_own_prompt(name: str, system: bool, content: str) -> None:
    if system and name in NO_SYSTEM:
        return
    prompter = Prompter(tokenizer_for(name))
    said = content.strip() if name in TRIMS else content
    turns = ("system", "user", "assistant", "user", "assistant", "user", "assistant")
    messages = [Message(role, content) for role in turns[not system :]]
    whole = prompter.render(messages, add_generation_prompt=False)
    assert prompter.stop.texts[0] == stop_of(name)
    for turn in range(2 if system else 1, len(messages), 2):
        prompt, rest = split(prompter, messages, turn)
        assert whole.startswith(prompt)
        blank = " " if name in ("vicuna", "mistral") else ""
        assert rest.startswith(blank + said + stop_of(name))
        assert rest[len(blank + said + stop_of(name)) :] in ("", "\n")
        assert prompt.count(said) >= turn


@pytest.mark.parametrize("name", sorted(TOOLS))
def test_calls_extend_their_prompt_and_end_with_the_stop_token(name: str) -> None:
    prompter = Prompter(tokenizer_for(name))
    messages = [BRIEF, ASK, CALL, RESULT, SAID, MORE, CALL, RESULT, DONE]
    for tools in ((), [WEATHER]):
        for turn in (2, 4, 6, 8):
            prompt, rest = split(prompter, messages, turn, tools)
            assert rest.rstrip("\n").endswith(stop_of(name))
            assert rest.count(stop_of(name)) == 1
            assert ("weather" in rest) == (turn in (2, 6))
            assert ("weather" in prompt) == (bool(tools) or turn > 2)


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - TOOLS))
def test_tools_are_refused_where_there_is_no_place_for_them(name: str) -> None:
    with pytest.raises(DataError, match="has no place for tools"):
        render(name, ASK, tools=[WEATHER])
    with pytest.raises(DataError, match="has no place for tool calls"):
        render(name, ASK, CALL)
    if name != "none":  # contents as they stand, whoever speaks
        with pytest.raises(DataError, match="has no place for role tool"):
            render(name, ASK, SAID, RESULT)


@pytest.mark.parametrize(
    ("name", "turns", "message"),
    [
        ("alpaca", [ASK, BRIEF], "no place for role system"),
        ("vicuna", [ASK, BRIEF], "no place for role system"),
        ("mistral", [ASK, BRIEF], "no place for role system"),
        ("gemma", [BRIEF, ASK], "no place for role system"),
        ("gemma", [ASK, MORE], "alternation"),
        ("gemma", [SAID, ASK], "alternation"),
        ("mistral", [ASK, MORE], "alternation"),
        ("mistral", [SAID], "alternation"),
        ("mistral", [BRIEF], "there is none"),
        ("mistral", [ASK, Message("assistant", "text", tool_calls=CALL.tool_calls)], "no place for text beside"),
        ("llama3", [ASK, Message("assistant", "text", tool_calls=CALL.tool_calls)], "one tool call"),
        ("llama3", [ASK, Message("assistant", "", tool_calls=CALL.tool_calls * 2)], "one tool call"),
        ("qwen", [Message("user", "", tool_calls=CALL.tool_calls)], "no place for tool calls of role user"),
        ("chatml", [Message("user", "", tool_calls=CALL.tool_calls)], "no place for tool calls of role user"),
        *((name, [ASK, Message("critic", "x")], "no place for role critic") for name in TEMPLATES if name != "none"),
    ],
)
def test_what_has_no_place_is_refused(name: str, turns: list[Message], message: str) -> None:
    with pytest.raises(DataError, match=message):
        render(name, *turns)


@pytest.mark.parametrize("turns", [[BRIEF], [BRIEF, SAID], [SAID]])
def test_llama3_needs_a_user_turn_for_tools(turns: list[Message]) -> None:
    with pytest.raises(DataError, match="first user turn"):
        render("llama3", *turns, tools=[WEATHER])


@pytest.mark.parametrize("blank", BOS_PREFIXES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_bos_is_written_once_where_the_tokenizer_adds_it(name: str, blank: str) -> None:
    tokenizer = tokenizer_for(name)
    chosen = resolve_template(name, own=None, fallback=None, own_first=True, bos_prefix=BOS_PREFIXES[blank])
    tokenizer.chat_template = chosen.text
    prompter = Prompter(tokenizer)
    ids = prompter.encode_prompt([Message("user", "a")])
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert chosen.text.endswith(TEMPLATES[name])
    # A blank of a SentencePiece-like tokenizer belongs before plain text alone.
    text = prompter.render([Message("user", "a")], add_generation_prompt=True)
    assert text.startswith("<|bos|> ") == (blank == " " and name in ("alpaca", "none", "vicuna", "zephyr"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_bos_where_the_tokenizer_has_none(name: str) -> None:
    tokenizer = tokenizer_for(name, bos=False)
    tokenizer.chat_template = resolve_template(name, own=None, fallback=None, own_first=True, bos_prefix="").text
    assert "bos" not in Prompter(tokenizer).render([Message("user", "a")], add_generation_prompt=True)


def test_adds_bos_looks_at_what_the_tokenizer_does() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer(bos=True)
    assert not adds_bos(tokenizer)
    assert not adds_bos(build_tokenizer())
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    assert adds_bos(tokenizer)


# The choice


@pytest.mark.parametrize(
    ("setting", "own", "fallback", "own_first", "name", "reason"),
    [
        ("auto", CHATML, "alpaca", True, "tokenizer", "the tokenizer has a chat template of its own"),
        ("auto", None, "alpaca", True, "alpaca", "the tokenizer has no chat template"),
        ("auto", CHATML, "none", False, "none", "rows of this format are used as they stand"),
        ("auto", CHATML, None, False, "none", "rows of this format are used as they stand"),
        ("auto", CHATML, None, True, "tokenizer", "the tokenizer has a chat template of its own"),
        ("tokenizer", CHATML, "alpaca", True, "tokenizer", "set in data.template"),
        *((name, CHATML, "none", True, name, "set in data.template") for name in TEMPLATES),
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
        ("lama3", "no such template: 'lama3'", "did you mean 'llama3'?"),
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


# Making a chosen one ready


def prepare(template: Template, tokenizer: PreTrainedTokenizerFast | None = None, **kwargs: Any) -> Template:
    tokenizer = tokenizer or build_tokenizer(bos=True)
    return prepare_template(template, vocabulary=tokenizer.get_vocab(), kwargs=kwargs, render=render_with(tokenizer))


@pytest.mark.parametrize("name", TEMPLATES)
def test_shipped_templates_are_ready(name: str) -> None:
    chosen = resolve_template(name, own=None, fallback=None, own_first=True, bos_prefix=BOS_PREFIXES[" "])
    assert prepare(chosen, tokenizer_for(name)) == chosen


@pytest.mark.parametrize("name", [name for name, shipped in SHIPPED.items() if shipped.tokens])
def test_tokenizer_without_the_tokens_is_refused_by_name(name: str) -> None:
    with pytest.raises(DataError, match=f"template {name} needs '<") as caught:
        prepare(Template(name, TEMPLATES[name], "r"))
    problem = caught.value.problems[0]
    assert all(repr(token) in problem.what for token in SHIPPED[name].tokens if token != "<|end|>")
    assert problem.fix.endswith("alpaca, none, mistral, vicuna, zephyr, or a Jinja file")


def test_usable_templates_have_all_their_tokens() -> None:
    plain = ["alpaca", "none", "mistral", "vicuna", "zephyr"]
    assert sorted(usable_templates(set())) == sorted(plain)
    assert sorted(usable_templates({"<|im_start|>", "<|im_end|>", "<start_of_turn>"})) == sorted(
        [*plain, "chatml", "qwen"]
    )


DATED = (
    "{{ bos_token }}{% if strftime_now is defined %}Today: {{ strftime_now('%d %b %Y') }}, {{ strftime_now(\"%A\") }}"
)
DATED += "{% endif %}\n" + CHATML


def test_dates_stand_still_and_the_reason_says_so() -> None:
    tokenizer = build_tokenizer(bos=True)
    ready = prepare(Template("t.jinja", DATED, "file set in data.template"), tokenizer)
    tokenizer.chat_template = ready.text
    text = Prompter(tokenizer).render([ASK], add_generation_prompt=False)
    assert text == "<|bos|>Today: 26 Jul 2024, Friday<|start|>user\na<|stop|>\n"
    assert ready.reason == (
        "file set in data.template; where it asks for today's date it gets 26 Jul 2024: another day would be another "
        "prompt"
    )
    assert prepare(ready, tokenizer).text == ready.text


def test_variables_become_part_of_the_text() -> None:
    tokenizer = build_tokenizer()
    text = CHATML + "{% if add_generation_prompt and enable_thinking is false %}<think></think>{% endif %}"
    ready = prepare(Template("t.jinja", text, "r"), tokenizer, enable_thinking=False)
    tokenizer.chat_template = ready.text
    assert Prompter(tokenizer).render([ASK], add_generation_prompt=True).endswith("assistant\n<think></think>")
    assert ready.reason == "r; enable_thinking fixed by data.template_kwargs"
    with pytest.raises(DataError, match="reads no variable 'enable_thinkin'") as caught:
        prepare(Template("t.jinja", text, "r"), tokenizer, enable_thinkin=False)
    assert "did you mean 'enable_thinking'?" in caught.value.problems[0].fix
    with pytest.raises(DataError, match="reads no variable 'x'"):
        prepare(Template("none", TEMPLATES["none"], "r"), tokenizer, x=1)


# Blanks that lay a file out for reading: alone they are written into every prompt.
LAID_OUT = """
{{ bos_token }}
{% for message in messages %}
    {% if message['role'] == 'system' %}
        {{ raise_exception('no system') }}
    {% endif %}

    {{ '<|start|>' + message['role'] + '\\n' + message['content'] + '<|stop|>\\n' }}
{% endfor %}

{% if add_generation_prompt %}
    {{ '<|start|>assistant\\n' }}
{% endif %}
"""
# Without a generation prompt nothing tells the layout from the prompt but the indentation in it.
LAID_OUT_OPEN = """
{% for message in messages %}
    {% if message['role'] == 'user' %}
        {{ '[' + message['content'] + ']' }}
    {% else %}
        {{ message['content'] + eos_token }}
    {% endif %}
{% endfor %}
"""


def test_layout_is_left_out_where_the_prompt_is_not_extended() -> None:
    tokenizer = build_tokenizer(bos=True)
    for name in ("t.jinja", "tokenizer"):
        ready = prepare(Template(name, LAID_OUT, "r"), tokenizer)
        tokenizer.chat_template = ready.text
        text = Prompter(tokenizer).render([ASK, SAID], add_generation_prompt=True)
        assert text == "<|bos|><|start|>user\na<|stop|>\n<|start|>assistant\nb<|stop|>\n<|start|>assistant\n"
        assert ready.reason.endswith("left out, because with them it does not extend its own prompt")


def test_layout_is_left_out_where_it_writes_indentation() -> None:
    tokenizer = build_tokenizer()
    ready = prepare(Template("t.jinja", LAID_OUT_OPEN, "r"), tokenizer)
    tokenizer.chat_template = ready.text
    assert Prompter(tokenizer).render([ASK, SAID], add_generation_prompt=False) == f"[a]b{tiny.END}"
    assert ready.reason.endswith("left out, because with them it writes its own indentation into prompts")
    # The model was trained with what its own template writes.
    own = Template("tokenizer", LAID_OUT_OPEN, "r")
    assert prepare(own, tokenizer) == own


@pytest.mark.parametrize(
    "text",
    [
        CHATML,
        # The published Zephyr form: the line break behind a turn stands between tags, and is meant.
        "{% for message in messages %}\n{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        # Indented, and nothing of it is written.
        "{%- for message in messages %}\n    {{- '<|start|>' + message['role'] + '\n' + message['content'] }}\n"
        "    {{- '<|stop|>' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|start|>assistant\n' }}\n{%- endif %}",
    ],
)
def test_line_breaks_that_are_meant_stay(text: str) -> None:
    template = Template("t.jinja", text, "r")
    assert prepare(template) == template


def test_layout_that_no_squeezing_mends_is_left_alone() -> None:
    text = LAID_OUT.replace("assistant\\n' }}", "assistant: ' }}")
    template = Template("t.jinja", text, "r")
    assert prepare(template) == template
    refusing = Template("t.jinja", LAID_OUT.replace("== 'system'", "== 'user'"), "r")
    assert prepare(refusing) == refusing


@pytest.mark.parametrize(
    ("name", "where"),
    [("t.jinja", "template file t.jinja, line 3"), ("tokenizer", "the tokenizer's chat template, line 3")],
)
def test_broken_jinja_names_its_line(name: str, where: str) -> None:
    with pytest.raises(DataError, match=r"no valid Jinja: .*endfor") as caught:
        prepare(Template(name, "{{ bos_token }}\n{% if messages %}\n{% endfor %}\n", "r"))
    assert caught.value.problems[0].where == where
