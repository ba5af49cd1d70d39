"""Which sources make which split: formats, columns and weights of their own, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from loralab.config.schema import DataConfig
from loralab.data.dataset import PreparedData, prepare_data
from loralab.errors import DataError
from loralab.progress import Reporter
from support import tiny
from unit.data.prompters import CHATML, build_tokenizer

CHAT = [
    {"messages": [{"role": "user", "content": "red?"}, {"role": "assistant", "content": f"blue {i}"}]} for i in range(6)
]


@pytest.fixture
def alpaca(tmp_path: Path) -> str:
    return str(tiny.write_rows(tmp_path / "alpaca.json", tiny.alpaca_rows(10)))


@pytest.fixture
def chat(tmp_path: Path) -> str:
    return str(tiny.write_rows(tmp_path / "chat.json", CHAT))


def prepare(tmp_path: Path, *, own: str | None = CHATML, **chosen: Any) -> PreparedData:
    data = DataConfig(**{"cache_dir": str(tmp_path / "cache"), **chosen})
    return prepare_data(data, build_tokenizer(own), reporter=Reporter())


def test_sources_of_different_formats_and_columns_make_one_split(tmp_path: Path, alpaca: str, chat: str) -> None:
    other = tiny.write_rows(tmp_path / "other.json", [{"q": "one", "a": "two"}])
    section = {"path": str(other), "format": "prompt_completion", "columns": {"prompt": "q", "completion": "a"}}
    prepared = prepare(tmp_path, template="tokenizer", train=[alpaca, section, {"path": chat}])
    assert prepared.report["format"]["value"] == "alpaca, prompt_completion, messages"
    assert [source["format"] for source in prepared.report["sources"]] == ["alpaca", "prompt_completion", "messages"]
    assert len(prepared.splits["train"]) == 17
    decoded = [prepared.prompter.decode(list(example.branches[0].answer_ids)) for example in prepared.splits["train"]]
    assert decoded[10:] == ["two", *(f"blue {i}" for i in range(6))]


def test_formats_that_would_take_different_templates_need_a_choice(tmp_path: Path, alpaca: str) -> None:
    plain = str(tiny.write_rows(tmp_path / "plain.json", [{"prompt": "a", "completion": "b"}]))
    with pytest.raises(DataError, match="formats alpaca and prompt_completion would be prompted with different"):
        prepare(tmp_path, train=[alpaca, plain])
    assert len(prepare(tmp_path, train=[alpaca, plain], template="none").splits["train"]) == 11


def test_weights_become_shares_of_the_training_rows(tmp_path: Path, alpaca: str, chat: str) -> None:
    train = [{"path": alpaca, "weight": 0.5}, {"path": chat, "weight": 2}]
    prepared = prepare(tmp_path, template="tokenizer", train=train, validation=4)
    assert prepared.shares is not None
    (first, half), (second, twice) = prepared.shares
    assert (half, twice) == (0.5, 2.0)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(12))
    owner = prepared.splits["train"].origins[:, 0]
    assert set(owner[first]) == {0}
    assert set(owner[second]) == {1}
    assert prepared.identity["weights"] == "0.5, 2.0"


def test_weights_are_part_of_the_fingerprint(tmp_path: Path, alpaca: str) -> None:
    plain = prepare(tmp_path, train=[alpaca])
    same = prepare(tmp_path, train=[{"path": alpaca, "weight": 1}])
    other = prepare(tmp_path, train=[{"path": alpaca, "weight": 2}])
    assert plain.shares is None
    assert plain.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize("again", ["same", "copy"])
def test_source_given_twice_is_refused(tmp_path: Path, alpaca: str, again: str) -> None:
    second = alpaca
    if again == "copy":
        second = str(tmp_path / "copy.json")
        Path(second).write_bytes(Path(alpaca).read_bytes())
    with pytest.raises(DataError, match="given more than once"):
        prepare(tmp_path, train=[{"path": alpaca}, {"path": second}])


def test_validation_may_have_sections_too(tmp_path: Path, alpaca: str) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"q": "one", "a": "two"}) + "\n", encoding="utf-8")
    section = {"path": str(held), "columns": {"instruction": "q", "output": "a"}}
    prepared = prepare(tmp_path, train=alpaca, validation=[section])
    assert len(prepared.splits["validation"]) == 1


def test_common_system_message_becomes_the_system_prompt(tmp_path: Path) -> None:
    system = [{"role": "system", "content": "be kind"}]
    rows = [{"messages": [*system, *row["messages"]]} for row in CHAT]
    path = str(tiny.write_rows(tmp_path / "same.json", rows))
    assert prepare(tmp_path, train=path).prompter.system_prompt == "be kind"
    mixed = str(tiny.write_rows(tmp_path / "mixed.json", [*rows, CHAT[0]]))
    assert prepare(tmp_path, train=mixed).prompter.system_prompt is None
    rows[0] = {"messages": [{"role": "system", "content": "be rude"}, *CHAT[0]["messages"]]}
    two = str(tiny.write_rows(tmp_path / "two.json", rows))
    assert prepare(tmp_path, train=two).prompter.system_prompt is None


def test_system_setting_is_the_system_prompt(tmp_path: Path, chat: str) -> None:
    prepared = prepare(tmp_path, train=chat, system="be kind")
    assert prepared.prompter.system_prompt == "be kind"
    assert "be kind" in prepared.prompter.tokenizer.decode(prepared.splits["train"][0].branches[0].prompt_ids)


def test_noted_rows_are_listed(tmp_path: Path) -> None:
    rows = [*CHAT, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b "}]}]
    path = str(tiny.write_rows(tmp_path / "rows.json", rows))
    prepared = prepare(tmp_path, own=CHATML.replace("message['content']", "message['content'] | trim"), train=path)
    report = prepared.report["splits"]["train"]
    assert report["notes"] == {"answer_altered": 1}
    assert report["noted_rows"] == {"answer_altered": [{"source": path, "row": 7}]}


def test_columns_of_a_file_without_a_header_go_by_number(tmp_path: Path) -> None:
    file = tmp_path / "bare.csv"
    file.write_text('"red\ncat",blue\n"one, two",three\n', encoding="utf-8")
    section = {"path": str(file), "columns": {"prompt": "1", "completion": "2"}}
    prepared = prepare(tmp_path, train=[section])
    texts = [
        prepared.prompter.decode([*row.branches[0].prompt_ids, *row.branches[0].answer_ids])
        for row in prepared.splits["train"]
    ]
    assert texts == ["red\ncatblue", "one, twothree"]
    with pytest.raises(DataError, match="'3'"):
        prepare(tmp_path, train=[{**section, "columns": {"prompt": "1", "completion": "3"}}])


def test_columns_that_are_named_by_numbers_are_taken_by_name(tmp_path: Path) -> None:
    file = tmp_path / "named.csv"
    file.write_text("2,1\nred,blue\n", encoding="utf-8")
    prepared = prepare(tmp_path, train=[{"path": str(file), "columns": {"prompt": "1", "completion": "2"}}])
    (row,) = prepared.splits["train"]
    assert prepared.prompter.decode(list(row.branches[0].prompt_ids)) == "blue"
