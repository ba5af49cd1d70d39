"""Row formats: every entry of the table, good and bad, and how one is chosen."""

import re
from typing import Any

import pytest

from loralab.config.schema import Config, DataConfig
from loralab.data.example import Conversation, Document, Example, ImagePart, Message, Preformatted, Segment, Tokens
from loralab.data.formats.fields import RowError
from loralab.data.formats.table import FORMATS, build_example, check_format_names, rename_columns, resolve_format
from loralab.data.prompts.templates import TEMPLATES
from loralab.errors import DataError

X = -100


def turns(*texts: str, system: str | None = None) -> Conversation:
    """Return a conversation of alternating turns, beginning with the user's."""
    first = () if system is None else (Message("system", system),)
    return Conversation((*first, *(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))))


def seen(question: str, answer: str, *pictures: str | bytes) -> Conversation:
    """Return a question behind its pictures, and its answer."""
    parts = (*map(ImagePart, pictures), *([question] if question else []))
    return Conversation((Message("user", question, parts=parts), Message("assistant", answer)))


def detect(first: dict[str, Any], **columns: str) -> tuple[str, str]:
    return resolve_format("auto", columns, first=first, where="rows.json")


GOOD: list[tuple[str, dict[str, Any], Example]] = [
    ("alpaca", {"instruction": "Sort", "input": "3 1", "output": "1 3"}, turns("Sort\n\n### Input:\n3 1", "1 3")),
    ("alpaca", {"instruction": "Sort", "input": "", "output": "1"}, turns("Sort", "1")),
    ("alpaca", {"instruction": "Sort", "input": None, "output": ""}, turns("Sort", "")),
    ("alpaca", {"instruction": " Sort\n", "output": "1\n", "id": 7}, turns(" Sort\n", "1\n")),
    ("alpaca", {"instruction": "a", "context": "c", "response": "b"}, turns("a\n\n### Input:\nc", "b")),
    (
        "alpaca",
        {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"], ("", "")]},
        turns("a", "b", "", "", "c", "d", system="s"),
    ),
    ("alpaca", {"instruction": "c", "output": "d", "system": "", "history": '[["a", "b"]]'}, turns("a", "b", "c", "d")),
    ("alpaca", {"instruction": "c", "output": "d", "system": None, "history": None}, turns("c", "d")),
    ("alpaca", {"instruction": "c", "output": "d", "history": ""}, turns("c", "d")),
    ("messages", {"messages": [{"role": "user", "content": "a"}]}, turns("a")),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, turns("a", "b")),
    (
        "conversational_prompt_completion",
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        Conversation((Message("user", "a", train=False), Message("assistant", "b"))),
    ),
    ("prompt_completion", {"prompt": "a ", "completion": " b"}, turns("a ", " b")),
    ("prompt_completion", {"prompt": "a", "completion": "[1, 2]", "system": "s"}, turns("a", "[1, 2]", system="s")),
    ("question_answer", {"question": "a ", "answer": " b"}, turns("a ", " b")),
    ("question_answer", {"question": "a", "response": "b", "context": ""}, turns("a", "b")),
    (
        "question_answer",
        {"question": "a?", "answer": "b", "context": "c.", "system_prompt": "s"},
        turns("c.\n\na?", "b", system="s"),
    ),
    ("vqa", {"image": "x.png", "question": "a?", "answer": "yes"}, seen("a?", "yes", "x.png")),
    ("vqa", {"images": ["x.png", b"y"], "question": "a?", "answer": "b"}, seen("a?", "b", "x.png", b"y")),
    ("vqa", {"image_path": "x.png", "question": "", "answers": ["c", "b", "b"]}, seen("", "b", "x.png")),
    (
        "vqa",
        {"picture": {"path": "x", "bytes": b"y"}, "context": "c.", "question": "a?", "answer": [{"answer": "b"}]},
        seen("c.\n\na?", "b", b"y"),
    ),
    ("yes_no", {"question": "a?", "answer": True}, turns("a?", "yes")),
    ("yes_no", {"question": "a?", "passage": "p.", "answer": False}, turns("p.\n\na?", "no")),
    (
        "yes_no",
        {"question": "a?", "context": "p.", "answer": " MAYBE.\n", "system": "s"},
        turns("p.\n\na?", "maybe", system="s"),
    ),
    ("yes_no", {"question": "a?", "passage": "p.", "context": "c", "answer": "No"}, turns("p.\n\na?", "no")),
    ("yes_no", {"question": " a?", "passage": None, "answer": 1.0}, turns(" a?", "yes")),
    ("segments", {"segments": [{"text": "a", "train": True}]}, Preformatted((Segment("a", True),))),
    (
        "segments",
        {"segments": [{"label": 0, "text": "<s>a"}, {"text": "", "train": 1}, {"text": "b</s>", "label": True}]},
        Preformatted((Segment("<s>a", False), Segment("", True), Segment("b</s>", True))),
    ),
    ("segments", {"segments": '[{"text": "a", "label": true}]'}, Preformatted((Segment("a", True),))),
    ("text", {"text": "\ta\n"}, Document("\ta\n")),
    ("tokenized", {"input_ids": [1, 2, 3], "labels": [X, 2, 3]}, Tokens((1, 2, 3), (X, 2, 3))),
    (
        "tokenized",
        {"input_ids": [0, 1, 0, 9], "labels": [X, 1, 0, X], "attention_mask": [0, 1, 1, 0]},
        Tokens((1, 0), (1, 0), masked_end=9),
    ),
    ("tokenized", {"input_ids": [9, 9, 5], "labels": [X, X, 5], "attention_mask": [0, 0, 1]}, Tokens((5,), (5,))),
    ("tokenized", {"input_ids": [7, 8], "labels": [X, X], "attention_mask": [0, 0]}, Tokens((), ())),
    ("tokenized", {"input_ids": [5], "labels": [5], "attention_mask": None}, Tokens((5,), (5,))),
]
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("alpaca", {"instruction": "a", "input": "b"}, "missing field 'output'; the row has: instruction, input"),
    ("alpaca", {"instruction": "a", "output": None}, "field 'output' is NoneType, not a string: None"),
    ("alpaca", {"instruction": "a", "input": ["b"], "output": "c"}, "field 'input' is list, not a string: ['b']"),
    ("alpaca", {"instruction": "a", "output": "b", "history": 5}, "field 'history' is int, not a list: 5"),
    ("alpaca", {"instruction": "a", "output": "b", "history": "x"}, "field 'history' is text, not a list: 'x'"),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "history": [["a"]]},
        "history[0] is no pair of question and answer: ['a']",
    ),
    (
        "alpaca",
        {"instruction": "a", "output": "b", "history": ["ab"]},
        "history[0] is no pair of question and answer: 'ab'",
    ),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["a", 1]]}, "history[0][1] is int, not a string: 1"),
    ("alpaca", {"instruction": "a", "output": "b", "system": 1}, "field 'system' is int, not a string: 1"),
    (
        "alpaca",
        {"instruction": "a", "output": "é\udc80"},
        "field 'output' holds \\udc80, half of a surrogate pair, at character 1",
    ),
    ("messages", {"messages": []}, "field 'messages' holds no message"),
    ("sharegpt", {"conversations": []}, "field 'conversations' holds no message"),
    ("conversational_prompt_completion", {"prompt": []}, "field 'prompt' holds no message"),
    ("prompt_completion", {"prompt": 5, "completion": "b"}, "field 'prompt' is int, not a string: 5"),
    ("prompt_completion", {}, "missing field 'prompt'; the row has: nothing"),
    (
        "prompt_completion",
        {"prompt": "a", "completion": [{"role": "assistant"}]},
        "field 'completion' holds messages: set data.format: conversational_prompt_completion",
    ),
    ("question_answer", {"question": "a", "answer": 3}, "field 'answer' is int, not a string: 3"),
    ("question_answer", {"question": "a", "answer": "b", "context": {}}, "field 'context' is dict, not a string: {}"),
    (
        "question_answer",
        {"question": "a", "answer": "b", "image": "x.png"},
        "field 'image' holds 'x.png': this format holds text only; use format vqa or messages for pictures "
        "(drop the column if the text stands without it)",
    ),
    *(
        (
            name,
            {**row, "images": ["x.png"]},
            "field 'images' holds ['x.png']: this format holds text only; use format vqa or messages for pictures "
            "(drop the column if the text stands without it)",
        )
        for name, row in (
            ("alpaca", {"instruction": "a", "output": "b"}),
            ("prompt_completion", {"prompt": "a", "completion": "b"}),
            ("yes_no", {"question": "a", "answer": "yes"}),
        )
    ),
    ("vqa", {"image": None, "question": "a", "answer": "b"}, "field 'image' is null or empty: no picture"),
    ("vqa", {"img": "", "question": "a", "answer": "b"}, "field 'img' is null or empty: no picture"),
    ("vqa", {"question": "a", "answer": "b"}, "missing field 'image'; the row has: question, answer"),
    ("vqa", {"images": ["x.png", None], "question": "a", "answer": "b"}, "field 'images'[1] is null: no picture"),
    ("vqa", {"image": "x.png", "question": 1, "answer": "b"}, "field 'question' is int, not a string: 1"),
    ("vqa", {"image": "x.png", "question": "a", "answer": []}, "field 'answer' is an empty list"),
    ("vqa", {"image": "x.png", "question": "a", "answer": [{"id": 1}]}, "answer[0] has no 'answer'"),
    (
        "vqa",
        {"image": "x.png", "question": "<image>a<image>", "answer": "b"},
        "the turns ask for 2 pictures (<image> or parts without a value); field 'image' holds 1",
    ),
    *(
        (
            "yes_no",
            {"question": "a", "answer": answer},
            f"field 'answer' is {answer!r}: not true, false, 1, 0, yes, no or maybe "
            "(free answers are format question_answer)",
        )
        for answer in ("Paris", "", "yes, it is", "yes..", "1.0", 2, -1, 0.5, float("nan"), None, ["yes"], b"yes")
    ),
    ("yes_no", {"question": "a", "passage": 1}, "field 'passage' is int, not a string: 1"),
    ("yes_no", {"question": "a"}, "missing field 'answer'; the row has: question"),
    ("segments", {"segments": None}, "missing field 'segments'; the row has: segments"),
    ("segments", {"segments": "a"}, "field 'segments' is text, not a list: 'a'"),
    ("segments", {"segments": []}, "none of the 0 segments has text to train on: set train: true on one"),
    (
        "segments",
        {"segments": [{"text": "a", "train": False}, {"text": "", "train": True}]},
        "none of the 2 segments has text to train on: set train: true on one",
    ),
    ("segments", {"segments": ["a"]}, "segments[0] is str, not an object: 'a'"),
    *(
        (
            "segments",
            {"segments": [segment]},
            f"segments[0] is not made of text and train (or label); its keys: {', '.join(segment)}",
        )
        for segment in ({"text": "a"}, {"train": True}, {"text": "a", "train": True, "label": True})
    ),
    (
        "segments",
        {"segments": [{"text": "a", "train": 0.5}]},
        "segments[0].train is 0.5: weights between 0 and 1 are not supported; write 0 or 1",
    ),
    (
        "segments",
        {"segments": [{"text": "a", "label": "true"}]},
        "segments[0].label is 'true', neither true or false nor 1 or 0",
    ),
    ("text", {"text": {"a": "b" * 99}}, "field 'text' is dict, not a string: {'a': '" + "b" * 50 + "..."),
    ("text", {"text": b"a"}, "field 'text' is bytes, not a string: b'a'"),
    ("tokenized", {"input_ids": [1], "label": [1]}, "missing field 'labels'; the row has: input_ids, label"),
    ("tokenized", {"input_ids": "1", "labels": [1]}, "field 'input_ids' is not a list of whole numbers: '1'"),
    (
        "tokenized",
        {"input_ids": [True, 1], "labels": [1, 1]},
        "field 'input_ids' is not a list of whole numbers: [True, 1]",
    ),
    ("tokenized", {"input_ids": [1], "labels": [True]}, "field 'labels' is not a list of whole numbers: [True]"),
    ("tokenized", {"input_ids": [1, -5], "labels": [1, -5]}, "field 'input_ids' holds -5, which is no token id"),
    (
        "tokenized",
        {"input_ids": [2**31], "labels": [2**31]},
        "field 'input_ids' holds 2147483648, which is no token id",
    ),
    (
        "tokenized",
        {"input_ids": [10**5000], "labels": [X]},
        "field 'input_ids' holds a int too large to show, which is no token id",
    ),
    ("tokenized", {"input_ids": [1.5], "labels": [1]}, "field 'input_ids' is not a list of whole numbers: [1.5]"),
    ("tokenized", {"input_ids": [1, 2], "labels": [1]}, "lengths differ: input_ids 2, labels 1, attention_mask 2"),
    (
        "tokenized",
        {"input_ids": [1], "labels": [1], "attention_mask": []},
        "lengths differ: input_ids 1, labels 1, attention_mask 0",
    ),
    (
        "tokenized",
        {"input_ids": [9, 1, 2, 3], "labels": [X, 2, 3, X], "attention_mask": [0, 1, 1, 1]},
        "label 2 at position 1 is neither -100 nor that position's token 1",
    ),
    (
        "tokenized",
        {"input_ids": [1, 2], "labels": [X, 2], "attention_mask": [1, 2]},
        "field 'attention_mask' holds 2; it may hold 0 and 1",
    ),
    (  # padding told by the id of the end token, which the answer ends with
        "tokenized",
        {"input_ids": [1, 2, 9, 9], "labels": [X, 2, 9, X], "attention_mask": [1, 1, 0, 0]},
        "attention_mask leaves out position 2 (token 9), which has a label: padding has label -100, a token to train "
        "has 1 in the mask",
    ),
    (
        "tokenized",
        {"input_ids": [1, 9, 2, 9], "labels": [X, X, 2, X], "attention_mask": [1, 0, 1, 0]},
        "attention_mask leaves out position 1 (token 9) between positions that it keeps; padding stands before or "
        "behind a row",
    ),
]


@pytest.mark.parametrize("rows", [GOOD, BAD])
def test_every_format_has_rows_here(rows: list[tuple[str, Any, Any]]) -> None:
    assert {name for name, *_ in rows} == set(FORMATS)


@pytest.mark.parametrize(("name", "row", "example"), GOOD)
def test_good_row(name: str, row: dict[str, Any], example: Example) -> None:
    assert build_example(name, row, {}) == example
    assert detect(row)[0] == name


@pytest.mark.parametrize(("name", "row", "message"), BAD)
def test_bad_row_names_field_and_value(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as caught:
        build_example(name, row, {})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        *((text, "yes") for text in ("yes", "YES", " Yes. ", "true", "True.", "1", " 1 ")),
        *((text, "no") for text in ("no", "nO .", "FALSE", "0")),
        ("Maybe\n", "maybe"),
        *((value, "yes") for value in (True, 1, 1.0)),
        *((value, "no") for value in (False, 0, 0.0, -0.0)),
    ],
)
def test_every_spelling_of_yes_and_no(answer: Any, word: str) -> None:
    assert build_example("yes_no", {"question": "a", "answer": answer}, {}) == turns("a", word)


REASONS = [
    ({"text": "a", "id": 1}, "text", "the column text is present"),
    ({"prompt": "a", "completion": "b"}, "prompt_completion", "the columns prompt, completion are present"),
    ({"instruction": "a", "response": "b"}, "alpaca", "the columns instruction, response (for output) are present"),
    ({"segments": 5}, "segments", "the column segments is present"),
    ({"input_ids": 5, "labels": 5, "text": "a"}, "tokenized", "the columns input_ids, labels are present"),
    (
        {"messages": [{"content": "a", "role": "user"}], "prompt": "a", "completion": "b", "text": "a"},
        "messages",
        "the column messages is present, and the keys of its first message are content, role",
    ),
    (
        {"dialogue": [{"role": "user", "content": "a"}]},
        "messages",
        "the column dialogue (for messages) is present, and the keys of its first message are role, content",
    ),
    (
        {"conversations": '[{"role": "user", "content": "a"}]'},
        "messages",
        "the column conversations (for messages) is present, and the keys of its first message are role, content",
    ),
    (
        {"messages": [{"from": "human", "value": "a"}]},
        "sharegpt",
        "the column messages (for conversations) is present, and the keys of its first message are from, value",
    ),
    (
        {"prompt": [], "completion": "b"},
        "conversational_prompt_completion",
        "the columns prompt, completion are present, and messages stand in prompt",
    ),
    (
        {"prompt": [], "completion": {}},
        "conversational_prompt_completion",
        "the columns prompt, completion are present, and messages stand in prompt and completion",
    ),
    (
        {"question": "a", "answer": "yes", "img": "x.png"},
        "vqa",
        "the columns img (for image), question, answer are present",
    ),
    (
        {"question": "a", "answer": True, "passage": "p"},
        "yes_no",
        "the columns question, answer are present, and the first answer is True",
    ),
    (
        {"question": "a", "answer": "Yes.", "text": "a"},
        "yes_no",
        "the columns question, answer are present, and the first answer is 'Yes.'",
    ),
    # No word that says yes or no: the next answer may be 2.
    ({"question": "a", "answer": "1"}, "question_answer", "the columns question, answer are present"),
    ({"question": "a", "answer": "Yes, it is."}, "question_answer", "the columns question, answer are present"),
    ({"text": "a", "messages": "of the day"}, "text", "the column text is present"),
    (
        {"instruction": "a", "output": "b", "question": "q", "answer": "true"},
        "alpaca",
        "the columns instruction, output are present",
    ),
]


@pytest.mark.parametrize(("row", "name", "reason"), REASONS)
def test_the_reason_says_what_was_seen(row: dict[str, Any], name: str, reason: str) -> None:
    assert detect(row) == (name, reason)


def test_every_format_is_detected() -> None:
    assert {name for _, name, _ in REASONS} == set(FORMATS)


def test_most_particular_format_wins() -> None:
    everything = {field: row[field] for name in reversed(FORMATS) for n, row, _ in GOOD if n == name for field in row}
    assert detect(everything)[0] == next(iter(FORMATS)) == "tokenized"


@pytest.mark.parametrize("name", FORMATS)
def test_a_set_format_is_taken_whatever_the_values(name: str) -> None:
    first = dict.fromkeys(FORMATS[name].required)
    assert resolve_format(name, {}, first=first, where="f") == (name, "set in data.format")


def test_mapped_columns_count_as_present() -> None:
    row = {"q": "a", "a": "no"}
    assert detect(row, prompt="q", completion="a")[0] == "prompt_completion"
    assert detect(row, question="q", answer="a")[0] == "yes_no"
    assert build_example("yes_no", row, {"question": "q", "answer": "a"}) == turns("a", "no")


def test_a_mapping_goes_before_the_names_of_columns() -> None:
    """Columns of a more particular format are no reason to leave out what the user mapped."""
    row = {"question": "q", "context": "c", "answer": "yes"}
    assert detect(row)[0] == "yes_no"
    columns = {"prompt": "question", "completion": "answer"}
    assert detect(row, **columns)[0] == "prompt_completion"
    assert detect(row, passage="context")[0] == "yes_no"
    assert build_example("prompt_completion", row, columns) == turns("q", "yes")
    chat = {"messages": [{"role": "user", "content": "a"}], "ask": "q", "say": "b", "text": "t"}
    assert detect(chat)[0] == "messages"
    assert detect(chat, prompt="ask", completion="say")[0] == "prompt_completion"
    with pytest.raises(DataError, match="no format fits these columns: messages, ask, say, text"):
        detect(chat, prompt="ask", answer="say")


def test_a_mapping_may_name_an_alias() -> None:
    row = {"talk": [{"from": "human", "value": "a"}]}
    assert detect(row, messages="talk")[0] == "sharegpt"
    assert build_example("sharegpt", row, {"messages": "talk"}) == turns("a")


def test_a_mapped_column_is_no_optional_field_too() -> None:
    row = {"input": "question", "output": "b"}
    assert build_example("alpaca", row, {"instruction": "input"}) == turns("question", "b")
    assert build_example("alpaca", {"instruction": "a", "output": "b"}, {"input": "instruction"}) == turns(
        "a\n\n### Input:\na", "b"
    )
    swapped = {"question": "the answer", "answer": "the question"}
    columns = {"question": "answer", "answer": "question"}
    assert build_example("question_answer", swapped, columns) == turns("the question", "the answer")


def test_no_format_fits_lists_the_columns_present() -> None:
    with pytest.raises(DataError) as caught:
        detect({"query": "a", "reply": "b"})
    (problem,) = caught.value.problems
    assert problem.what == "no format fits these columns: query, reply"
    assert problem.where == "rows.json"
    assert "alpaca: instruction, output" in problem.fix
    assert all(f"{name}: " in problem.fix for name in FORMATS)
    assert "a CSV file needs a header line" in problem.fix


def test_no_format_fits_says_why_the_nearest_do_not() -> None:
    with pytest.raises(DataError) as caught:
        detect({"messages": []})
    assert caught.value.problems[0].what == (
        "no format fits these columns: messages (not messages: the column messages is present, but it is an empty "
        "list; not sharegpt: the column messages (for conversations) is present, but it is an empty list)"
    )
    for value, seen in (
        ("hello", "it is text, not a list: 'hello'"),
        (["hello"], "its first item is str, not an object"),
        ([{"speaker": "a", "text": "b"}], "the keys of its first message are speaker, text"),
    ):
        with pytest.raises(
            DataError, match=re.escape(f"not messages: the column chat (for messages) is present, but {seen};")
        ):
            detect({"chat": value})


def test_a_csv_file_without_a_header_is_told() -> None:
    with pytest.raises(DataError) as caught:
        detect({"How much?\n\nA fan.": "a", "120": "b"})
    assert caught.value.problems[0].fix == (
        "write a header line, such as prompt,completion, above 'How much?\\n\\nA fan.', which is no column's name, "
        'or map columns by number: data.columns: {prompt: "1", completion: "2"}'
    )


def test_chosen_format_without_its_columns() -> None:
    with pytest.raises(DataError) as caught:
        resolve_format("alpaca", {"instruction": "q"}, first={"q": 1, "a": 2}, where="rows.json")
    (problem,) = caught.value.problems
    assert problem.what == "format alpaca needs output; the columns present are: q, a"
    assert "data.columns: {output: YOUR_COLUMN}" in problem.fix


@pytest.mark.parametrize("field", ["output", "input"])
def test_a_mapping_to_a_column_that_is_not_there(field: str) -> None:
    """Of an optional field too: its text would be missing from every row, and nobody would know."""
    for setting in ("auto", "alpaca"):
        with pytest.raises(DataError) as caught:
            resolve_format(setting, {field: "anser"}, first={"instruction": "a", "answer": "b"}, where="rows.json")
        (problem,) = caught.value.problems
        assert problem.what == (
            f"data.columns maps {field} to 'anser', which the first row does not have; its columns are: "
            "instruction, answer"
        )
        assert problem.fix.startswith("did you mean 'answer'? ")


def test_rename_columns_maps_field_to_column() -> None:
    row = {"q": "question", "output": "old", "a": "answer"}
    assert rename_columns(row, {}, required=()) is row
    renamed = rename_columns(row, {"instruction": "q", "output": "a"}, required=("instruction",))
    assert renamed == {"instruction": "question", "output": "answer"}
    assert rename_columns({"a": 1, "b": 2}, {"c": "a", "d": "b"}, required=("a",)) == {"a": 1, "c": 1, "d": 2}
    assert row["output"] == "old"
    with pytest.raises(RowError, match=r"missing column 'Q' \(for 'instruction'\); the row has: q, output, a"):
        rename_columns(row, {"instruction": "Q"}, required=("instruction",))
    assert rename_columns(row, {"input": "Q"}, required=("instruction",)) == row


@pytest.mark.parametrize(
    ("data", "key", "what", "fix"),
    [
        ({"format": "alpca"}, "data.format", "no such format: 'alpca'", "did you mean 'alpaca'?"),
        ({"columns": {"promt": "q"}}, "data.columns", "no such field: 'promt'", "did you mean 'prompt'?"),
        ({"format": "text", "columns": {"prompt": "q"}}, "data.columns", "no such field: 'prompt'", "known: text"),
        (
            {"train": ["f", {"path": "g", "format": "txt"}]},
            "data.train",
            "source 'g': no such format: 'txt'",
            "did you mean 'text'?",
        ),
        (
            {"validation": [{"path": "g", "columns": {"promt": "q"}}]},
            "data.validation",
            "source 'g': no such field: 'promt'",
            "did you mean 'prompt'?",
        ),
        (
            {"train": [{"path": "g", "format": "text"}], "columns": {"prompt": "q"}},
            "data.train",
            "source 'g': no such field: 'prompt'",
            "known: text",
        ),
    ],
)
def test_names_are_checked_before_any_file_is_read(data: dict[str, Any], key: str, what: str, fix: str) -> None:
    config = Config.model_validate({"model": {"name": "m"}, "data": {"train": "f", **data}})
    (finding,) = check_format_names(config)
    assert (finding.key, finding.what) == (key, what)
    assert fix in finding.fix


@pytest.mark.parametrize(
    "data",
    [
        {"format": "tokenized", "columns": {"labels": "y", "attention_mask": "m"}},
        {"columns": {"passage": "p", "system_prompt": "s"}},
        {"columns": {"prompt": "q"}, "train": ["f", {"path": "g"}, {"path": "h", "format": "text", "columns": {}}]},
    ],
)
def test_known_names_give_no_finding(data: dict[str, Any]) -> None:
    assert check_format_names(Config.model_validate({"model": {"name": "m"}, "data": {"train": "f", **data}})) == []


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_format_does_not_know_are_keys_of_the_data_section(name: str) -> None:
    form, defaults = FORMATS[name], DataConfig(train="f")
    assert form.meaningless.keys() <= DataConfig.model_fields.keys()
    assert isinstance(form.build(next(row for n, row, _ in GOOD if n == name)), Conversation) == (
        form.template is not None
    )
    assert form.template is None or form.template in TEMPLATES
    # A default that a format refused could not be left out.
    assert all(not allowed or getattr(defaults, key) in allowed for key, allowed in form.meaningless.items())
    assert ("system" in form.meaningless) == (form.template is None)
    assert ("template" in form.meaningless) == ("template_kwargs" in form.meaningless) == (name == "text")


def test_oldest_turns_are_left_out_of_conversations_only() -> None:
    allowed = {name: form.meaningless.get("truncation") for name, form in FORMATS.items()}
    whole = ("right", "drop", "error")
    refusing = {"tokenized": whole, "segments": whole, "text": ("right",)}
    assert allowed == {**dict.fromkeys(FORMATS), **refusing}
