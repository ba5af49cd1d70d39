"""Row formats: every entry of the table, good and bad, and how one is chosen."""

from typing import Any

import pytest

from loralab.config.schema import Config
from loralab.data.example import Conversation, Document, Example, Message, Tokens
from loralab.data.formats import FORMATS, RowError, check_format_names, rename_columns, resolve_format
from loralab.errors import DataError


def turns(user: str, assistant: str) -> Conversation:
    return Conversation((Message("user", user), Message("assistant", assistant)))


GOOD: list[tuple[str, dict[str, Any], Example]] = [
    ("alpaca", {"instruction": "Sort", "input": "3 1", "output": "1 3"}, turns("Sort\n\n### Input:\n3 1", "1 3")),
    ("alpaca", {"instruction": "Sort", "input": "", "output": "1"}, turns("Sort", "1")),
    ("alpaca", {"instruction": "Sort", "input": None, "output": ""}, turns("Sort", "")),
    ("alpaca", {"instruction": " Sort\n", "output": "1\n", "id": 7}, turns(" Sort\n", "1\n")),
    ("prompt_completion", {"prompt": "a ", "completion": " b"}, turns("a ", " b")),
    ("text", {"text": "\ta\n"}, Document("\ta\n")),
    ("tokenized", {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, Tokens((1, 2, 3), (-100, 2, 3))),
    (
        "tokenized",
        {"input_ids": [0, 1, 0, 0], "labels": [-100, 1, 0, -100], "attention_mask": [0, 1, 1, 0]},
        Tokens((1, 0), (1, 0)),
    ),
    ("tokenized", {"input_ids": [5], "labels": [5], "attention_mask": None}, Tokens((5,), (5,))),
]
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("alpaca", {"instruction": "a", "input": "b"}, "missing field 'output'; the row has: instruction, input"),
    ("alpaca", {"instruction": "a", "output": None}, "field 'output' is NoneType, not a string: None"),
    ("alpaca", {"instruction": "a", "input": ["b"], "output": "c"}, "field 'input' is list, not a string: ['b']"),
    ("prompt_completion", {"prompt": 5, "completion": "b"}, "field 'prompt' is int, not a string: 5"),
    ("prompt_completion", {}, "missing field 'prompt'; the row has: nothing"),
    ("text", {"text": {"a": "b" * 99}}, "field 'text' is dict, not a string: {'a': '" + "b" * 50 + "..."),
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
    ("tokenized", {"input_ids": [1.5], "labels": [1]}, "field 'input_ids' is not a list of whole numbers: [1.5]"),
    ("tokenized", {"input_ids": [1, 2], "labels": [1]}, "lengths differ: input_ids 2, labels 1, attention_mask 2"),
    (
        "tokenized",
        {"input_ids": [1], "labels": [1], "attention_mask": []},
        "lengths differ: input_ids 1, labels 1, attention_mask 0",
    ),
    (
        "tokenized",
        {"input_ids": [1, 2, 3], "labels": [2, 3, -100]},
        "label 2 at position 0 is neither -100 nor that position's token 1",
    ),
]


@pytest.mark.parametrize("rows", [GOOD, BAD])
def test_every_format_has_rows_here(rows: list[tuple[str, Any, Any]]) -> None:
    assert {name for name, *_ in rows} == set(FORMATS)


@pytest.mark.parametrize(("name", "row", "example"), GOOD)
def test_good_row(name: str, row: dict[str, Any], example: Example) -> None:
    assert FORMATS[name].build(row) == example


@pytest.mark.parametrize(("name", "row", "message"), BAD)
def test_bad_row_names_field_and_value(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as caught:
        FORMATS[name].build(row)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", FORMATS)
def test_required_fields_are_enough_to_detect_and_to_build(name: str) -> None:
    required = FORMATS[name].required
    assert resolve_format("auto", {}, present=[*required, "id"], where="f") == (
        name,
        f"the columns {', '.join(required)} are present",
    )
    assert resolve_format(name, {}, present=required, where="f") == (name, "set in data.format")
    example: Any = [1] if name == "tokenized" else "a"
    FORMATS[name].build(dict.fromkeys(required, example))


def test_most_particular_format_wins() -> None:
    everything = [field for form in FORMATS.values() for field in form.required]
    assert resolve_format("auto", {}, present=everything, where="f")[0] == "tokenized"
    assert resolve_format("auto", {}, present=["text", "instruction", "output"], where="f")[0] == "alpaca"


def test_mapped_columns_count_as_present() -> None:
    columns = {"prompt": "q", "completion": "a"}
    assert resolve_format("auto", columns, present=["q", "a"], where="f")[0] == "prompt_completion"


def test_no_format_fits_lists_the_columns_present() -> None:
    with pytest.raises(DataError) as caught:
        resolve_format("auto", {}, present=["question", "answer"], where="rows.json")
    (problem,) = caught.value.problems
    assert problem.what == "no format fits these columns: question, answer"
    assert problem.where == "rows.json"
    assert "alpaca: instruction, output" in problem.fix
    assert all(f"{name}: " in problem.fix for name in FORMATS)


def test_chosen_format_without_its_columns() -> None:
    with pytest.raises(DataError) as caught:
        resolve_format("alpaca", {"instruction": "q"}, present=["q", "a"], where="rows.json")
    (problem,) = caught.value.problems
    assert problem.what == "format alpaca needs output; the columns present are: q, a"
    assert "data.columns: {output: YOUR_COLUMN}" in problem.fix


def test_rename_columns_maps_field_to_column() -> None:
    row = {"q": "question", "output": "old", "a": "answer"}
    assert rename_columns(row, {}, required=()) is row
    renamed = rename_columns(row, {"instruction": "q", "output": "a"}, required=("instruction",))
    assert FORMATS["alpaca"].build(renamed) == turns("question", "answer")
    assert row["output"] == "old"
    with pytest.raises(RowError, match=r"missing column 'Q' \(for 'instruction'\); the row has: q, output, a"):
        rename_columns(row, {"instruction": "Q"}, required=("instruction",))


@pytest.mark.parametrize(
    ("data", "key", "what", "fix"),
    [
        ({"format": "alpca"}, "data.format", "no such format: 'alpca'", "did you mean 'alpaca'?"),
        ({"columns": {"promt": "q"}}, "data.columns", "no such field: 'promt'", "did you mean 'prompt'?"),
        ({"format": "text", "columns": {"prompt": "q"}}, "data.columns", "no such field: 'prompt'", "known: text"),
    ],
)
def test_names_are_checked_before_any_file_is_read(data: dict[str, Any], key: str, what: str, fix: str) -> None:
    config = Config.model_validate({"model": {"name": "m"}, "data": {"train": "f", **data}})
    (finding,) = check_format_names(config)
    assert (finding.key, finding.what) == (key, what)
    assert fix in finding.fix


def test_known_names_give_no_finding() -> None:
    data = {"train": "f", "format": "tokenized", "columns": {"labels": "y", "attention_mask": "m"}}
    assert check_format_names(Config.model_validate({"model": {"name": "m"}, "data": data})) == []
