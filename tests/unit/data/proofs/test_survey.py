"""Figures of a split: hashes that tell rows apart, duplicates, overlap, histograms; and answers worth a look."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loralab.config.schema import DataConfig
from loralab.data.dataset import PreparedData, prepare_data
from loralab.data.proofs import survey
from loralab.data.proofs.answer_survey import AnswerSurvey
from loralab.data.proofs.prove import StoredRow
from loralab.data.proofs.reread import count_stored_rows, find_twin, read_stored_rows
from loralab.data.proofs.survey import find_overlaps, find_repeated_answer, hash_split, survey_split
from loralab.progress import Reporter
from support import tiny
from unit.data.prompters import CHATML, build_tokenizer, conversation

NAMES = {"train": ["rows.json"], "validation": ["other.json"]}


def pair(question: str, answer: str) -> dict[str, str]:
    return {"instruction": question, "output": answer}


def prepare(
    folder: Path, rows: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]] = (), **data: Any
) -> PreparedData:
    values: dict[str, Any] = {
        "train": str(tiny.write_rows(folder / "rows.json", rows)),
        "cache_dir": str(folder / "cache"),
    }
    if other:
        values["validation"] = str(tiny.write_rows(folder / "other.json", other))
    return prepare_data(DataConfig(**(values | data)), build_tokenizer(CHATML), reporter=Reporter())


def figures(data: PreparedData, split: str = "train") -> dict[str, Any]:
    store = data.splits[split]
    return survey_split(store, hash_split(store, stop_ids=data.prompter.stop.ids), names=NAMES[split])


def numbers(listed: dict[str, Any]) -> list[int]:
    assert listed["count"] == len(listed["rows"])
    return [row["row"] for row in listed["rows"]]


def test_duplicates_are_rows_with_the_same_tokens(tmp_path: Path) -> None:
    rows = [pair("red", "cat"), pair("red", "dog"), pair("blue", "cat"), pair("red", "cat"), pair("re", "dcat")]
    found = figures(prepare(tmp_path, rows))["duplicates"]
    assert numbers(found["same_row"]) == [4]
    assert numbers(found["same_prompt_other_answer"]) == [1, 2, 4]


@pytest.mark.parametrize("block", [1, 7, 2**20])
def test_blocks_change_no_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    data = prepare(tmp_path, tiny.alpaca_rows(40))
    whole = hash_split(data.splits["train"], stop_ids=[0])
    monkeypatch.setattr(survey, "_BLOCK_TOKENS", block)
    cut = hash_split(data.splits["train"], stop_ids=[0])
    assert np.array_equal(whole.rows, cut.rows)
    assert np.array_equal(whole.prompts, cut.prompts)
    assert np.array_equal(whole.answers, cut.answers)


def test_hashes_tell_rows_apart_as_their_tokens_do(tmp_path: Path) -> None:
    messages = [
        [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts.split(), strict=False)]
        for texts in (
            "red cat blue dog",
            "red cat",
            "blue dog",
            "blue dog red cat",
            "red cat blue dog",
            "red blue cat dog",
        )
    ]
    data = prepare(tmp_path, [{"messages": each} for each in messages])
    store = data.splits["train"]
    hashed = hash_split(store, stop_ids=data.prompter.stop.ids).rows
    tokens = [
        tuple((tuple(b.prompt_ids.tolist()), tuple(b.answer_ids.tolist())) for b in example.branches)
        for example in store
    ]
    for first in range(len(store)):
        for second in range(len(store)):
            assert (hashed[first] == hashed[second]) is np.bool_(tokens[first] == tokens[second])


def test_overlaps_name_rows_of_the_later_split(tmp_path: Path) -> None:
    data = prepare(
        tmp_path,
        [pair("red", "cat"), pair("blue", "dog")],
        [pair("green", "x"), pair("red", "dog"), pair("blue", "dog")],
    )
    hashes = {name: hash_split(store, stop_ids=[0]) for name, store in data.splits.items()}
    (found,) = find_overlaps(data.splits, hashes, NAMES)
    assert (found["splits"], found["rows"]) == (["train", "validation"], 3)
    assert numbers(found["same_row"]) == [3]
    assert numbers(found["same_prompt"]) == [2, 3]
    assert {row["source"] for row in found["same_prompt"]["rows"]} == {"other.json"}


def test_plain_text_has_no_prompts_in_common(tmp_path: Path) -> None:
    found = figures(prepare(tmp_path, [{"text": "red cat"}, {"text": "red dog"}, {"text": "red cat"}]))
    assert numbers(found["duplicates"]["same_row"]) == [3]
    assert found["duplicates"]["same_prompt_other_answer"]["count"] == 0
    assert found["coverage"] > 0.6


def test_histograms_hold_every_row(tmp_path: Path) -> None:
    data = prepare(tmp_path, tiny.alpaca_rows(30), max_length=90)
    found = figures(data)
    lengths = data.splits["train"].lengths()
    for name in ("length_histogram", "coverage_histogram"):
        assert sum(found[name]["counts"]) == 30
        assert len(found[name]["edges"]) == len(found[name]["counts"]) + 1
    assert found["length_histogram"]["edges"][0] == lengths.min()
    assert found["length_histogram"]["edges"][-1] == lengths.max() + 1
    assert found["length_percentiles"]["p100"] == lengths.max()


def test_stop_share_counts_answers_that_end(tmp_path: Path) -> None:
    rows = [pair("red", "cat"), pair("blue", "a cat and a dog and a bird and a tree and a house and a river")]
    shortest = int(prepare(tmp_path, rows).splits["train"].lengths().min())
    found = figures(prepare(tmp_path, rows, max_length=shortest + 3))
    assert (found["answers"], found["stop_token_share"]) == (2, 0.5)


def test_repeated_answer_needs_many_other_answers(tmp_path: Path) -> None:
    some = [pair(f"q {i}", "I do not know") for i in range(12)] + [pair(f"p {i}", f"a {i}") for i in range(24)]
    hashes = hash_split(prepare(tmp_path, some).splits["train"], stop_ids=[0])
    assert find_repeated_answer(hashes) == (0, 12)
    few = [pair(f"q {i}", "yes" if i % 3 else "no") for i in range(60)]
    (tmp_path / "few").mkdir()
    assert find_repeated_answer(hash_split(prepare(tmp_path / "few", few).splits["train"], stop_ids=[0])) is None


# --- rows read again


def test_rows_are_read_again_beside_what_is_stored(tmp_path: Path) -> None:
    rows = [pair("red", "cat"), pair("a " * 60, "x"), pair("blue", "dog"), pair("green", "bird")]
    data = prepare(tmp_path, rows, [pair("one", "two")], max_length=60, max_dropped_fraction=0.5)
    read = [row for chunk in read_stored_rows(data) for row in chunk]
    assert [(Path(row.source).name, row.row) for row in read] == [
        ("rows.json", 1), ("rows.json", 3), ("rows.json", 4), ("other.json", 1)
    ]  # fmt: skip
    assert count_stored_rows(data) == 4
    assert all(
        data.prompter.decode(row.branches[0].answer_ids.tolist()) == row.example.messages[1].content for row in read
    )  # type: ignore[union-attr]


def test_parts_of_one_file_are_read_in_one_pass(tmp_path: Path) -> None:
    data = prepare(tmp_path, tiny.alpaca_rows(20), validation=0.3, test=2)
    read = [row.row for chunk in read_stored_rows(data) for row in chunk]
    assert read == list(range(1, 21))


@pytest.mark.parametrize("limit", [1, 7, 20, 50])
def test_a_limit_spreads_over_all_rows(tmp_path: Path, limit: int) -> None:
    data = prepare(tmp_path, tiny.alpaca_rows(40), validation=0.25)
    read = [row.row for chunk in read_stored_rows(data, limit=limit) for row in chunk]
    assert len(read) == min(limit, 40)
    assert read == sorted(set(read))
    assert limit == 1 or max(read) - min(read) >= 40 - 2 * max(40 // limit, 1)


def test_windows_of_a_document_are_one_row(tmp_path: Path) -> None:
    data = prepare(tmp_path, [{"text": "red cat blue dog " * 9}, {"text": "one two"}], max_length=6)
    first, second = (row for chunk in read_stored_rows(data) for row in chunk)
    assert len(first.units) > 5
    assert len(second.units) == 1


def test_conversation_beside_tokens_is_found() -> None:
    fields = {"input_ids": [1], "labels": [1], "instruction": "red", "output": "cat"}
    assert find_twin(fields) == conversation("user: red", "assistant: cat")
    assert find_twin({"input_ids": [1], "labels": [1]}) is None
    assert find_twin({"input_ids": [1], "labels": [1], "messages": 3}) is None


# --- answers


def look(question: str, answer: str) -> list[str]:
    row = StoredRow("rows.jsonl", 1, conversation(f"user: {question}", f"assistant: {answer}"), ())
    return [finding.kind for finding in AnswerSurvey(["<|end|>", "<s>", "</s>"]).look([row])]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Paris", []),
        ("", []),
        ("<s>old</s> price", []),
        ("a < b and [IN", []),
        ("### Heading", []),
        ("He said: <|", []),
        ("Paris<|im_end|>", ["markers_in_answer"]),
        ("Paris\n### Response:\nLyon", ["markers_in_answer"]),
        ("Paris<|end|>", ["markers_in_answer"]),
        ("Paris<|im_e", ["marker_cut_off"]),
        ("Paris [/INS", ["marker_cut_off"]),
        ("Where is Paris?", ["answer_is_question"]),
    ],
)
def test_answers_worth_a_look(answer: str, expected: list[str]) -> None:
    assert look("Where is Paris?", answer) == expected
