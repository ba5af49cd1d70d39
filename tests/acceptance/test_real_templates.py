"""Published chat templates through the prompter, and the shipped templates against the published ones."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loralab.data.example import Message, ToolCall
from loralab.data.prompts.prompter import Prompter, choose_bos_prefix, render_with
from loralab.data.prompts.templates import Template, prepare_template, resolve_template
from loralab.errors import DataError

pytestmark = pytest.mark.slow

# Tokens that the published templates write, none of which GPT-2's vocabulary has.
WRITTEN = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
]
INDENTED = ["chatml", "gemma-it", "llama-2-chat", "llama-3-instruct", "mistral-instruct", "vicuna", "zephyr"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Say what the weather is <like> & 'where'.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "get_time", "description": "时间", "parameters": {"type": "object"}}},
]
TALK = (
    Message("user", "How is Köln?"),
    Message("assistant", "", tool_calls=(ToolCall("get_weather", {"city": "Köln", "days": [1, 2]}),)),
    Message("tool", '{"sky": "blue"}', name="get_weather"),
    Message("assistant", "Blue sky."),
    Message("user", "And the time?"),
)
TWO_CALLS = (
    Message("user", "How is Köln?"),
    Message(
        "assistant",
        "Let me see.",
        tool_calls=(ToolCall("get_weather", {"city": "Köln"}), ToolCall("get_time", {})),
    ),
    Message("tool", '{"sky": "blue"}'),
    Message("tool", "12:00"),
)
SYSTEM = Message("system", "Be brief.")


def load_tokenizer(data_folder: Path, *, bos: str | None = "<s>", eos: str = "</s>") -> PreTrainedTokenizerBase:
    """Return GPT-2's tokenizer with every token that the published templates write."""
    tokenizer = AutoTokenizer.from_pretrained(str(data_folder / "tokenizers/gpt2"))
    tokenizer.add_special_tokens({"additional_special_tokens": WRITTEN, "eos_token": eos, "unk_token": eos})
    if bos:
        tokenizer.add_special_tokens({"bos_token": bos})
    else:
        tokenizer.bos_token = None
    return tokenizer


def read(data_folder: Path, name: str) -> Template:
    """Return a published template as `data.template: FILE` would be used."""
    path = data_folder / "chat_templates" / f"{name}.jinja"
    return resolve_template(str(path), own=None, fallback=None, own_first=True, bos_prefix="")


def ready(template: Template, tokenizer: PreTrainedTokenizerBase) -> Prompter:
    """Return the prompter of a template that went through everything that a run does to it."""
    prepared = prepare_template(template, vocabulary=tokenizer.get_vocab(), kwargs={}, render=render_with(tokenizer))
    tokenizer.chat_template = prepared.text
    return Prompter(tokenizer)


def shipped(name: str, tokenizer: PreTrainedTokenizerBase) -> Prompter:
    """Return the prompter of a shipped template."""
    return ready(resolve_template(name, own=None, fallback=None, own_first=True, bos_prefix=""), tokenizer)


def conversations(data_folder: Path) -> list[tuple[Message, ...]]:
    """Return the three conversations of the oracle."""
    entries = json.loads((data_folder / "oracles/chat_templates_rendered.json").read_text(encoding="utf-8"))
    by_name = {entry["conversation"]: entry["messages"] for entry in entries}
    return [tuple(Message(**message) for message in messages) for messages in by_name.values()]


def both(
    ours: Prompter, theirs: Prompter, messages: Sequence[Message], tools: Sequence[Any] = ()
) -> list[tuple[str, str]]:
    """Return what two templates make of a conversation, with and without the generation prompt."""
    return [
        tuple(p.render(messages, add_generation_prompt=wanted, tools=tools) for p in (ours, theirs))  # type: ignore[misc]
        for wanted in (False, True)
    ]


def test_every_recorded_rendering_is_ours(data_folder: Path) -> None:
    """All 54 entries of the oracle: the same text through the prompter, a DataError where it has an error."""
    entries = json.loads((data_folder / "oracles/chat_templates_rendered.json").read_text(encoding="utf-8"))
    prompters: dict[str, Prompter] = {}
    agreed, refused, wrong = 0, 0, []
    for entry in entries:
        name = entry["template"]
        if name not in prompters:
            tokenizer = load_tokenizer(data_folder, bos=entry["bos_token"], eos=entry["eos_token"])
            prompters[name] = ready(read(data_folder, name), tokenizer)
        messages = [Message(**message) for message in entry["messages"]]
        if "error" in entry:
            with pytest.raises(DataError, match="the template cannot render"):
                prompters[name].render(messages, add_generation_prompt=entry["add_generation_prompt"])
            refused += 1
            continue
        text = prompters[name].render(messages, add_generation_prompt=entry["add_generation_prompt"])
        agreed += text == entry["rendered"]
        if text != entry["rendered"]:
            wrong.append((name, entry["conversation"], entry["add_generation_prompt"], text))
    assert wrong == []
    assert (agreed, refused) == (52, 2)


@pytest.mark.parametrize("name", INDENTED)
def test_indented_files_are_read_as_their_authors_say(name: str, data_folder: Path) -> None:
    """Without every line break and every run of four blanks, as their README asks, and the reason says so."""
    template = read(data_folder, f"indented/{name}")
    tokenizer = load_tokenizer(data_folder)
    prepared = prepare_template(template, vocabulary=tokenizer.get_vocab(), kwargs={}, render=render_with(tokenizer))
    assert prepared.text == template.text.replace("\n", "").replace("    ", "")
    assert "only lay it out for reading" in prepared.reason
    prompter = ready(template, tokenizer)
    messages = [Message("user", "a b"), Message("assistant", "c d"), Message("user", "e"), Message("assistant", "f")]
    for turn in (1, 3):
        prompt = prompter.render(messages[:turn], add_generation_prompt=True)
        whole = prompter.render(messages[: turn + 1], add_generation_prompt=False)
        assert whole.startswith(prompt)
        assert whole[len(prompt) :].strip().startswith(messages[turn].content)
        assert "\n " not in whole


def test_other_files_are_used_as_they_stand(data_folder: Path) -> None:
    """No published template but the indented ones loses a blank; the one that prints a date gets a fixed one."""
    tokenizer = load_tokenizer(data_folder)
    for path in sorted((data_folder / "chat_templates").glob("*.jinja")):
        template = read(data_folder, path.stem)
        prepared = prepare_template(
            template, vocabulary=tokenizer.get_vocab(), kwargs={}, render=render_with(tokenizer)
        )
        assert prepared.text.endswith(template.text), path.stem
        assert (prepared.text != template.text) == ("strftime_now" in template.text), path.stem


def test_variables_of_a_published_template(data_folder: Path) -> None:
    """`enable_thinking: false` becomes part of Qwen 3's template: a server that knows nothing of it sends the same."""
    tokenizer = load_tokenizer(data_folder)
    template = read(data_folder, "qwen3")
    prepared = prepare_template(
        template,
        vocabulary=tokenizer.get_vocab(),
        kwargs={"enable_thinking": False},
        render=render_with(tokenizer),
    )
    ask = [{"role": "user", "content": "a"}]
    told = tokenizer.apply_chat_template(
        ask, chat_template=template.text, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    frozen = tokenizer.apply_chat_template(ask, chat_template=prepared.text, tokenize=False, add_generation_prompt=True)
    assert frozen == told
    assert frozen.endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("name", "file", "system", "trims", "bos", "front"),
    [
        ("chatml", "chatml", True, False, "", ""),
        ("llama3", "llama3", True, False, "", ""),
        ("gemma", "gemma", False, False, "", ""),
        ("qwen", "qwen2_5", True, False, "", ""),
        ("phi3", "phi3", True, False, "", ""),
        # The indented ones trim every content, which the models' own do not. `bos`: what they write and ours leave to
        # the tokenizer; `front`: the other way round.
        ("chatml", "indented/chatml", True, True, "<s>", ""),
        ("llama3", "indented/llama-3-instruct", True, True, "", ""),
        ("gemma", "indented/gemma-it", False, True, "", "<s>"),
        ("zephyr", "indented/zephyr", True, True, "", ""),
        ("vicuna", "indented/vicuna", True, True, "<s>", ""),
        # This one writes the system message before [INST]; Mistral's own writes it behind.
        ("mistral", "indented/mistral-instruct", False, True, "", ""),
    ],
)
def test_shipped_template_is_the_published_one(
    name: str, file: str, system: bool, trims: bool, bos: str, front: str, data_folder: Path
) -> None:
    """The same text for every conversation of the oracle that both have a place for."""
    ours = shipped(name, load_tokenizer(data_folder))
    theirs = ready(read(data_folder, file), load_tokenizer(data_folder))
    # No prompt has the end token that Phi-3's writes behind a whole conversation.
    behind = "</s>" if name == "phi3" else ""
    compared = 0
    for messages in conversations(data_folder):
        kept = messages[1:] if messages[0].role == "system" and not system else messages
        talk = [Message(m.role, m.content.strip() if trims else m.content) for m in kept]
        (text, published), (prompt, published_prompt) = both(ours, theirs, talk)
        assert bos + text + behind == front + published
        assert bos + prompt == front + published_prompt
        compared += 2
    assert compared == 6


@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("tools", [TOOLS, []])
@pytest.mark.parametrize("talk", [TALK, TWO_CALLS, TWO_CALLS[:2]])
def test_qwen_writes_tools_as_published(
    talk: tuple[Message, ...], tools: list[Any], system: bool, data_folder: Path
) -> None:
    """Tool lists, calls with and without text, and results: Qwen 2.5's own text."""
    messages = (SYSTEM, *talk) if system else talk
    ours = shipped("qwen", load_tokenizer(data_folder))
    theirs = ready(read(data_folder, "qwen2_5"), load_tokenizer(data_folder))
    for text, published in both(ours, theirs, messages, tools):
        assert text == published


@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("talk", [TALK, TWO_CALLS])
def test_chatml_writes_tools_as_qwen_3(talk: tuple[Message, ...], system: bool, data_folder: Path) -> None:
    """In prompts, where Qwen 3 writes no thinking of its own: the same text."""
    messages = (SYSTEM, *talk) if system else talk
    ours = shipped("chatml", load_tokenizer(data_folder))
    theirs = ready(read(data_folder, "qwen3"), load_tokenizer(data_folder))
    prompts = [messages[:end] for end in range(1 + system, len(messages) + 1) if messages[end - 1].role == "user"]
    if talk is TWO_CALLS:
        prompts.append(messages)
    for prompt in prompts:
        assert ours.render(prompt, add_generation_prompt=True, tools=TOOLS) == theirs.render(
            prompt, add_generation_prompt=True, tools=TOOLS
        )
    assert prompts


@pytest.mark.parametrize("system", [True, False])
def test_llama3_writes_tools_as_published_but_for_the_dates(system: bool, data_folder: Path) -> None:
    """Llama 3.2's own text without its two lines of dates."""
    messages = (SYSTEM, *TALK) if system else TALK
    ours = shipped("llama3", load_tokenizer(data_folder))
    theirs = ready(read(data_folder, "llama3_2"), load_tokenizer(data_folder))
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n"
    for text, published in both(ours, theirs, messages, TOOLS):
        assert dates in published
        assert text == published.replace(dates, "")


def test_shipped_templates_fit_the_tokenizers_they_are_for(data_folder: Path) -> None:
    """Under Qwen's tokenizer `qwen` is the tokenizer's own text; under GPT-2's it is refused by name."""
    tokenizer = AutoTokenizer.from_pretrained(str(data_folder / "tokenizers/qwen2.5"))
    own = ready(Template("tokenizer", str(tokenizer.chat_template), "r"), tokenizer)
    other = AutoTokenizer.from_pretrained(str(data_folder / "tokenizers/qwen2.5"))
    for talk in (TALK, TWO_CALLS, (SYSTEM, *TALK)):
        for text, published in both(shipped("qwen", other), own, talk, TOOLS):
            assert text == published
    plain = AutoTokenizer.from_pretrained(str(data_folder / "tokenizers/gpt2"))
    for name in ("chatml", "gemma", "llama3", "phi3", "qwen"):
        with pytest.raises(DataError, match=f"template {name} needs") as caught:
            shipped(name, plain)
        assert "alpaca, none, mistral, vicuna, zephyr" in caught.value.problems[0].fix


def test_llama2_reads_a_prompt_of_special_tokens_as_its_own(data_folder: Path) -> None:
    """Behind bos no blank stands before a special token: the ids are those of the plain text."""
    for name in ("chatml", "zephyr", "vicuna"):
        tokenizer = AutoTokenizer.from_pretrained(str(data_folder / "tokenizers/llama2"))
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = resolve_template(
            name, own=None, fallback=None, own_first=True, bos_prefix=choose_bos_prefix(tokenizer)
        ).text
        bare = Prompter(tokenizer)
        text = bare.render([Message("user", "a")], add_generation_prompt=True)
        plain = text.removeprefix("<s>").removeprefix(" ")
        assert bare.encode_prompt([Message("user", "a")]) == tokenizer(plain)["input_ids"], name
