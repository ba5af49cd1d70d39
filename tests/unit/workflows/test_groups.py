"""Groups of rows: by a column that is read again, and by what an answer is."""

from pathlib import Path
from typing import Any

import pytest

from loralab.config.schema import DataConfig
from loralab.data.dataset import PreparedData, prepare_data
from loralab.errors import ConfigError, DataError
from loralab.evaluation.questions import questions_of
from loralab.progress import Reporter
from loralab.workflows.groups import NO_VALUE, answer_type, resolve_groups
from support.tiny import build_tokenizer, write_rows


@pytest.mark.parametrize(
    ("reference", "kind"),
    [
        ("yes", "yes/no"),
        (" No.", "yes/no"),
        ("YES", "yes/no"),
        ("maybe", "other"),
        ("no dogs", "other"),
        ("2", "number"),
        ("3.5", "number"),
        ("1,250", "number"),
        ("-4", "number"),
        ("$5", "number"),
        ("two", "number"),
        ("2 cats", "other"),
        ("1.2.3", "other"),
        ("", "other"),
        (".", "other"),
    ],
)
def test_answers_are_split_as_those_about_pictures_are(reference: str, kind: str) -> None:
    assert answer_type(reference) == kind


def prepared(folder: Path, **settings: Any) -> PreparedData:
    values = ["a", "b", None, True, 3, " a ", ""]
    rows = [
        {"prompt": f"q {number}", "completion": f"answer {number}", "kind": value, "list": [number], "own": str(number)}
        for number, value in enumerate(values * 20)
    ]
    rows[1].pop("kind")
    other = [{"prompt": f"p {number}", "completion": "x", "kind": "other file"} for number in range(5)]
    paths = [str(write_rows(folder / "one.json", rows)), str(write_rows(folder / "two.json", other))]
    data = DataConfig(train=paths, cache_dir=str(folder / "cache"), num_workers=0, **settings)
    return prepare_data(data, build_tokenizer(), reporter=Reporter())


def test_every_question_has_the_group_of_its_row_in_its_source(tmp_path: Path) -> None:
    data = prepared(tmp_path, validation=60)
    split = data.splits["validation"]
    groups = resolve_groups("kind", data, {"the split": split}).value
    questions = questions_of(split, data.prompter)
    names = groups.names("the split", questions)
    known = ["a", "b", NO_VALUE, "true", "3", "a", NO_VALUE]
    expected = [
        "other file" if each.source == 1 else NO_VALUE if each.row == 2 else known[(each.row - 1) % 7]
        for each in questions
    ]
    assert names == expected
    assert set(names) == {"a", "b", NO_VALUE, "true", "3", "other file"}


@pytest.mark.parametrize(
    ("column", "kind", "what"),
    [
        ("kid", ConfigError, "no column 'kid' in the rows"),
        ("list", DataError, "column 'list' has list as a value"),
        ("own", DataError, "different values in the rows that are measured, at most 100"),
    ],
)
def test_a_column_that_makes_no_groups_is_refused(
    column: str, kind: type[Exception], what: str, tmp_path: Path
) -> None:
    data = prepared(tmp_path)
    with pytest.raises(kind, match=what):
        resolve_groups(column, data, {"train": data.splits["train"]})


def test_a_column_named_answer_type_goes_before_the_references(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {n}", "completion": "yes", "answer_type": ["easy", "hard"][n % 2]} for n in range(6)]
    section = DataConfig(train=str(write_rows(tmp_path / "rows.json", rows)), cache_dir=str(tmp_path / "cache"))
    data = prepare_data(section, build_tokenizer(), reporter=Reporter())
    chosen = resolve_groups("answer_type", data, data.splits)
    names = chosen.value.names("train", questions_of(data.splits["train"], data.prompter))
    assert names == ["easy", "hard"] * 3
    assert chosen.reason == "a column of the rows, with 2 values"
