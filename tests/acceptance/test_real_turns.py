"""Every published template x every tokenizer that can render it, over real conversations, turn by turn.

What is expected comes from plain jinja2 over the template's own text (indented files squeezed as
their README says) and from the tokenizer's bytes: nothing of `loralab` decides on it. Every row
that is not trained must be one that the template itself refuses.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from acceptance.reference import VOCABULARIES, Vocabulary, token_bytes
from loralab.config.schema import DataConfig
from loralab.data.dataset import PreparedData, prepare_data
from loralab.data.example import Conversation
from loralab.data.formats.table import build_example
from loralab.errors import DataError
from loralab.progress import Reporter

pytestmark = pytest.mark.slow

# What each template writes behind an answer: its own mark, or the tokenizer's end token.
ENDS = {
    "alpaca": None,
    "chatml": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "llama3": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "phi3": "<|end|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "indented/chatml": "<|im_end|>",
    "indented/gemma-it": "<end_of_turn>",
    "indented/llama-2-chat": None,
    "indented/llama-3-instruct": "<|eot_id|>",
    "indented/mistral-instruct": None,
    "indented/vicuna": None,
    "indented/zephyr": None,
}
# (file, format): conversations without and with a system message, tool calls, reasoning.
SETS = {
    "oasst": ("chat/oasst_multiturn/oasst_multiturn.jsonl", "messages"),
    "price": ("price/items_prompts/messages_a_val.jsonl", "messages"),
    "glaive": ("chat/llamafactory/glaive_toolcall_en_demo.json", "sharegpt"),
    "reason": ("chat/llamafactory/reason_tool_use_demo_50.jsonl", "messages"),
}
# Templates that write tools and tool calls.
WITH_TOOLS = ("qwen2_5", "qwen3", "llama3_2")


@pytest.fixture(params=VOCABULARIES)
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return VOCABULARIES[str(request.param)]


@pytest.fixture(params=ENDS)
def template(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("rows", SETS)
def test_supervised_text_and_prompts_are_the_templates_own(
    data_folder: Path,
    tmp_path: Path,
    vocabulary: Vocabulary,
    template: str,
    rows: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = load_tokenizer(data_folder, vocabulary, ENDS[template])
    render = renderer(data_folder / "chat_templates" / f"{template}.jinja", tokenizer)
    file, form = SETS[rows]
    try:
        prepared = prepare(data_folder, tmp_path, tokenizer, template, data_folder / file)
    except DataError as refusal:
        assert_refused(refusal, render, tokenizer, template)
        return
    examples = {e.row: e for e in prepared.splits["train"]} if "train" in prepared.splits else {}
    turns = dropped = 0
    for number, row in enumerate(read(data_folder / file), 1):
        conversation = build_example(form, row, {})
        assert isinstance(conversation, Conversation)
        expected = list(expected_turns(conversation, render, ENDS[template] or str(tokenizer.eos_token)))
        if number not in examples:
            assert None in expected or not expected, f"row {number} was left out, and could be rendered"
            dropped += 1
            continue
        assert None not in expected, f"row {number} was trained, and cannot be rendered"
        branches = examples[number].branches
        assert len(branches) == len(expected), f"row {number}"
        for branch, (messages, prompt, answer) in zip(branches, expected, strict=True):
            turns += 1
            served = tokenizer.apply_chat_template(
                messages,
                chat_template=prepared.template.text,
                tools=[dict(tool) for tool in conversation.tools] or None,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
            )["input_ids"]
            assert branch.prompt_ids.tolist() == served, f"row {number}: prompt"
            assert (
                text_of(branch.prompt_ids.tolist(), tokenizer, vocabulary).lstrip()
                == clean(prompt, vocabulary).lstrip()
            )
            supervised = text_of(branch.answer_ids.tolist(), tokenizer, vocabulary)
            assert supervised == clean(answer, vocabulary), f"row {number}: answer"
            assert branch.answer_ids[-1] in prepared.prompter.stop.ids
    with capsys.disabled():
        print(f"\n{template} x {vocabulary.folder} x {rows}: {len(examples)} rows, {turns} turns, {dropped} refused")


def load_tokenizer(data_folder: Path, vocabulary: Vocabulary, end: str | None) -> PreTrainedTokenizerBase:
    """Return a tokenizer with the end mark of a template, as the tokenizer of a model of that template has."""
    tokenizer = AutoTokenizer.from_pretrained(str(data_folder / vocabulary.folder))
    if end is not None and end not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    return tokenizer


def prepare(
    data_folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, template: str, file: Path
) -> PreparedData:
    data = DataConfig(
        train=str(file),
        template=str(data_folder / "chat_templates" / f"{template}.jinja"),
        max_length=1_000_000,
        on_bad_row="drop",
        max_dropped_fraction=1.0,
        num_workers=0,
        cache_dir=str(tmp_path),
    )
    return prepare_data(data, tokenizer, reporter=Reporter())


Render = Callable[[list[dict[str, Any]], bool, Any], str]


def renderer(file: Path, tokenizer: PreTrainedTokenizerBase) -> Render:
    """Return what renders with plain jinja2, with the special tokens that the tokenizer has."""
    text = file.read_text(encoding="utf-8")
    if file.parent.name == "indented":
        text = text.replace("    ", "").replace("\n", "")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise
    special = {name: value for name in ("bos_token", "eos_token") if (value := getattr(tokenizer, name)) is not None}
    made = environment.from_string(text)
    return lambda messages, prompted, tools: made.render(
        messages=messages, add_generation_prompt=prompted, tools=tools, **special
    )


def _raise(message: str) -> None:
    raise TemplateError(message)


Turn = tuple[list[dict[str, Any]], str, str]


def expected_turns(conversation: Conversation, render: Render, end: str) -> Iterator[Turn | None]:
    """Yield messages, prompt and answer text of every assistant turn; None for one that cannot be rendered."""
    messages = [message.as_dict() for message in conversation.messages]
    tools = [dict(tool) for tool in conversation.tools] or None
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            prompt, whole = render(messages[:turn], True, tools), render(messages[: turn + 1], False, tools)
        except (TemplateError, TypeError):
            yield None
            continue
        rest = whole[len(prompt) :]
        if not whole.startswith(prompt) or any(
            call["function"]["name"] not in rest for call in message.get("tool_calls", ())
        ):
            yield None
            continue
        content = message["content"] if message["content"] in rest else message["content"].strip()
        behind = rest.find(content) + len(content) if content in rest else 0
        found = rest.find(end, max(behind, rest.rfind("</tool_call>") if message.get("tool_calls") else 0))
        if end in content:  # cannot be told from the end of the turn
            yield None
            continue
        yield messages[:turn], prompt, rest[: found + len(end)] if found >= 0 else rest + end


def assert_refused(refusal: DataError, render: Render, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Check that a template was refused for something that it needs and does not get."""
    what = refusal.problems[0].what
    if "rows dropped" in what:  # none of the rows could be rendered: each is checked where some could
        return
    if "needs a bos token" in what:
        assert tokenizer.bos_token is None
        with pytest.raises(TemplateError):
            render([{"role": "user", "content": "a"}], True, None)
        return
    raise AssertionError(f"{template}: {what}")


def text_of(ids: list[int], tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> str:
    """Return the text of ids from the bytes of their pieces; added tokens stand as they are written."""
    added = {int(i): str(token.content) for i, token in tokenizer.added_tokens_decoder.items()}
    parts: list[bytes] = []
    plain: list[int] = []
    for token in [*ids, -1]:
        if token >= 0 and token not in added:
            plain.append(token)
            continue
        parts.append(token_bytes(tokenizer, plain, byte_level=vocabulary.byte_level))
        plain = []
        parts.append(added.get(token, "").encode())
    return b"".join(parts).decode("utf-8")


@cache
def _normal(folder: str) -> str | None:
    return "NFC" if "qwen" in folder else None


def clean(text: str, vocabulary: Vocabulary) -> str:
    """Return a text as the tokenizer sees it: Qwen's normalises to composed characters."""
    form = _normal(vocabulary.folder)
    return unicodedata.normalize(form, text) if form else text  # type: ignore[arg-type]


def read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in re.split("\n", text) if line]
