"""Every real file of conversations, instructions, yes/no questions, prices and text loads by itself.

The messages that rows must become are made here, by readers of a few lines that know each file.
"""

import csv
import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from acceptance.reference import chat_messages, read_rows
from loralab.data.example import Conversation, Document
from loralab.data.formats.table import build_example, resolve_format
from loralab.data.reading.sources import resolve_sources
from loralab.errors import DataError

pytestmark = pytest.mark.slow

Row = dict[str, Any]
Messages = list[dict[str, Any]]


def plain_messages(row: Row) -> Messages:
    """Return messages that are in the file as they should be."""
    return [dict(message) for message in row["messages"]]


def alpaca_messages(row: Row) -> Messages:
    """Return instruction (and input) and output."""
    return [*chat_messages(row), {"role": "assistant", "content": row["output"]}]


def pair_messages(row: Row) -> Messages:
    """Return prompt and completion."""
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def passage_messages(row: Row) -> Messages:
    """Return a passage with a question, and the word that answers it."""
    user = f"{row['context']}\n\n{row['question']}"
    return [{"role": "user", "content": user}, {"role": "assistant", "content": row["answer"]}]


def call(text: str) -> dict[str, Any]:
    """Return a tool call, from JSON text, as templates read it."""
    value = json.loads(text)
    assert set(value) == {"name", "arguments"}
    return {"type": "function", "function": value}


def part_messages(row: Row) -> Messages:
    """Return messages whose contents are lists of parts of one kind each, with any number of calls."""
    messages = []
    for given in row["messages"]:
        parts: dict[str, list[str]] = {"text": [], "reasoning": [], "tool_call": []}
        for part in given["content"]:
            parts[part["type"]].append(part["value"])
        message = {"role": given["role"], "content": "".join(parts["text"])}
        if parts["reasoning"]:
            message["reasoning_content"] = "".join(parts["reasoning"])
        if parts["tool_call"]:
            message["tool_calls"] = [call(text) for text in parts["tool_call"]]
        messages.append(message)
    return messages


def glaive_messages(row: Row) -> Messages:
    """Return turns under from and value, with calls as turns of their own."""
    roles = {"human": "user", "gpt": "assistant", "observation": "tool"}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call(turn["value"])]}
        if turn["from"] == "function_call"
        else {"role": roles[turn["from"]], "content": turn["value"]}
        for turn in row["conversations"]
    ]


@dataclass(frozen=True)
class File:
    """What a file must load as.

    Attributes:
        format: found by detection.
        rows: as the SOURCE.md beside the file counts them.
        messages: makes the messages of one row.
        roles: number of turns of each role in the whole file, where its SOURCE.md or an own count says.
    """

    format: str
    rows: int
    messages: Callable[[Row], Messages]
    roles: dict[str, int] = field(default_factory=dict)


PRICE = "price/items_prompts"
FILES: dict[str, File] = {
    "chat/llamafactory/glaive_toolcall_en_demo.json": File(
        "sharegpt", 300, glaive_messages, {"user": 746, "assistant": 746 + 211, "tool": 211}
    ),
    "chat/llamafactory/identity.json": File("alpaca", 91, alpaca_messages),
    "chat/llamafactory/v1_sft_demo.jsonl": File("messages", 500, part_messages, {"user": 500, "assistant": 500}),
    "chat/llamafactory/reason_tool_use_demo_50.jsonl": File(
        "messages", 50, part_messages, {"system": 50, "user": 70, "assistant": 112, "tool": 42}
    ),
    "chat/oasst_multiturn/oasst_multiturn.jsonl": File(
        "messages", 753, plain_messages, dict.fromkeys(("user", "assistant"), 408 + 2 * 329 + 3 * 16)
    ),
    "sft/alpaca_en_demo/alpaca_en_demo.json": File("alpaca", 999, alpaca_messages),
    "sft/alpaca_en_demo/alpaca_zh_demo.json": File("alpaca", 1000, alpaca_messages),
    "sft/gpteacher_14k/gpteacher_14k.jsonl": File("alpaca", 14131, alpaca_messages),
    "sft/unusual_rows/unusual_rows.jsonl": File("alpaca", 151, alpaca_messages),
    "yesno/boolq/train.json": File("alpaca", 9427, alpaca_messages),
    "yesno/boolq/test.json": File("alpaca", 3270, alpaca_messages),
    "yesno/pubmedqa/pubmedqa_train.jsonl": File("yes_no", 500, passage_messages),
    f"{PRICE}/items_prompts_train.jsonl": File("prompt_completion", 900, pair_messages),
    f"{PRICE}/items_prompts_val.jsonl": File("prompt_completion", 150, pair_messages),
    f"{PRICE}/messages_a_train.jsonl": File("messages", 400, plain_messages, dict.fromkeys(("system", "user"), 400)),
    f"{PRICE}/messages_a_val.jsonl": File("messages", 100, plain_messages, dict.fromkeys(("system", "user"), 100)),
    f"{PRICE}/messages_b_train.jsonl": File("messages", 500, plain_messages, {"assistant": 500}),
    f"{PRICE}/messages_b_val.jsonl": File("messages", 50, plain_messages, {"assistant": 50}),
}
TEXTS = ("train.txt.gz", "train_60_articles.txt", "valid.txt", "test.txt")
# The one file whose columns have no names.
NO_HEADER = f"{PRICE}/human_guesses_250.csv"


def load(path: Path, columns: dict[str, str]) -> tuple[str, list[Any]]:
    """Return the format and the examples of a file, as the product reads them."""
    (source,) = resolve_sources(str(path), where="test")
    rows = list(source.by_number(list(columns.values())).rows())
    name, reason = resolve_format("auto", columns, first=rows[0].fields, where=source.name)
    assert reason.startswith("the column")
    return name, [build_example(name, row.fields, columns) for row in rows]


def test_no_file_is_left_out(data_folder: Path) -> None:
    found = {
        path.relative_to(data_folder).as_posix()
        for part in ("chat", "sft", "yesno", "price", "text")
        for path in (data_folder / part).rglob("*")
        if path.is_file() and path.name != "SOURCE.md"
    }
    assert found == {*FILES, *(f"text/wikitext-2/{name}" for name in TEXTS), NO_HEADER}


@pytest.mark.parametrize("name", FILES)
def test_every_row_becomes_its_messages(name: str, data_folder: Path) -> None:
    """By detection: the format, every row, and the messages that a reader of this file's own makes of it."""
    expected, rows = FILES[name], read_rows(data_folder / name)
    found, examples = load(data_folder / name, {})
    assert found == expected.format
    assert len(examples) == len(rows) == expected.rows
    for row, example in zip(rows, examples, strict=True):
        assert isinstance(example, Conversation)
        assert [message.as_dict() for message in example.messages] == expected.messages(row)
        tools = row.get("tools")
        assert list(example.tools) == ([] if tools is None else json.loads(tools))
    counted = Counter(message.role for example in examples for message in example.messages)
    assert expected.roles.items() <= counted.items()


def test_weights_of_messages_are_flags(data_folder: Path) -> None:
    """`loss_weight` is 0.0 for every user and 1.0 for every assistant turn of v1_sft_demo."""
    _, examples = load(data_folder / "chat/llamafactory/v1_sft_demo.jsonl", {})
    flags = Counter((message.role, message.train) for example in examples for message in example.messages)
    assert flags == {("user", False): 500, ("assistant", True): 500}


def test_tools_calls_and_reasoning_of_every_row(data_folder: Path) -> None:
    """Counts made from the files by hand: nothing is lost on the way."""
    _, glaive = load(data_folder / "chat/llamafactory/glaive_toolcall_en_demo.json", {})
    assert sum(bool(example.tools) for example in glaive) == 191
    assert sum(len(example.tools) for example in glaive) == 219
    assert sum(len(message.tool_calls) for example in glaive for message in example.messages) == 211
    _, reasoning = load(data_folder / "chat/llamafactory/reason_tool_use_demo_50.jsonl", {})
    turns = [message for example in reasoning for message in example.messages if message.role == "assistant"]
    assert sum(len(example.tools) for example in reasoning) == 121
    assert Counter(len(turn.tool_calls) for turn in turns) == {0: 59, 1: 41, 2: 9, 3: 3}
    assert all(turn.reasoning and bool(turn.content) != bool(turn.tool_calls) for turn in turns)


def test_braces_stay_braces(data_folder: Path) -> None:
    _, examples = load(data_folder / "chat/llamafactory/identity.json", {})
    assert examples[0].messages[1].content.startswith("Hello! I am {{name}}, an AI assistant developed by {{author}}.")


def test_yes_no_by_mapping_is_yes_no_by_alias(data_folder: Path) -> None:
    """PubMedQA's labels are those that its SOURCE.md counts, and `passage: context` may be written out."""
    path = data_folder / "yesno/pubmedqa/pubmedqa_train.jsonl"
    found, examples = load(path, {"passage": "context"})
    assert (found, examples) == load(path, {})
    words = Counter(example.messages[-1].content for example in examples)
    assert words == {"yes": 276, "no": 169, "maybe": 55}


def test_boolq_answers_by_mapping_are_words(data_folder: Path) -> None:
    """BoolQ is Alpaca-like; one line makes yes/no questions of it, with the labels that its SOURCE.md counts."""
    found, examples = load(data_folder / "yesno/boolq/test.json", {"question": "instruction"})
    assert found == "yes_no"
    assert Counter(example.messages[-1].content for example in examples) == {"yes": 2033, "no": 1237}


@pytest.mark.parametrize("name", TEXTS)
def test_text_is_one_document(name: str, data_folder: Path) -> None:
    path = data_folder / "text/wikitext-2" / name
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    assert load(path, {}) == ("text", [Document(raw.decode())])


def csv_rows(path: Path) -> Iterator[list[str]]:
    """Yield the records of a CSV file, as Python's csv module reads them."""
    with path.open(encoding="utf-8", newline="") as stream:
        yield from csv.reader(stream)


def test_csv_without_a_header_is_read_by_number(data_folder: Path) -> None:
    """human_guesses_250.csv begins with a row; without a mapping the message says what to do."""
    path = data_folder / NO_HEADER
    with pytest.raises(DataError) as caught:
        load(path, {})
    fix = caught.value.problems[0].fix
    assert fix.startswith('write a header line, such as prompt,completion, above "How much does this cost')
    found, examples = load(path, {"prompt": "1", "completion": "2"})
    assert found == "prompt_completion"
    expected = [pair_messages({"prompt": prompt, "completion": guess}) for prompt, guess in csv_rows(path)]
    assert len(examples) == len(expected) == 250
    assert [[message.as_dict() for message in example.messages] for example in examples] == expected
