"""What a comparison says of where its texts come from: windows of rows, and probes that are the run's own data."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loralab.config.schema import DataConfig
from loralab.run import RunFolder, file_sha256
from loralab.workflows.compare import number_windows, own_file_note


class Rows:
    """A view of stored examples: source, row and unit of each."""

    def __init__(self, folder: str, rows: list[tuple[int, int, int]]) -> None:
        self.folder = Path(folder)
        columns = np.array(rows, dtype=np.int64).reshape(-1, 3)
        self.origins, self.units = columns[:, :2], columns[:, 2]

    def __len__(self) -> int:
        return len(self.units)


def number(split: Any, *others: Any) -> list[int | None]:
    data: Any = SimpleNamespace(splits=dict(enumerate((split, *others))))
    return number_windows(split, data)


def test_windows_are_counted_within_their_row() -> None:
    rows = Rows("a", [(0, 1, 0), (0, 1, 1), (0, 2, 2), (1, 1, 3), (1, 1, 4), (1, 1, 5)])
    assert number(rows) == [1, 2, None, 1, 2, 3]
    assert number(Rows("a", [])) == []


def test_windows_that_stand_in_another_split_count() -> None:
    validation, train = Rows("a", [(0, 1, 2), (0, 1, 5)]), Rows("a", [(0, 1, n) for n in (0, 1, 3, 4)])
    test = Rows("b", [(0, 1, 0)])  # of another file
    assert number(validation, train, test) == [3, 6]
    assert number(train, validation, test) == [1, 2, 4, 5]
    assert number(test, train, validation) == [None]


@pytest.mark.parametrize("kind", ["path", "entry", "copy"])
def test_a_probe_that_is_the_runs_own_file_is_named(tmp_path: Path, kind: str) -> None:
    own, other = tmp_path / "own.txt", tmp_path / "other.txt"
    own.write_text("some text")
    other.write_text("other text")
    copy = tmp_path / "copy.txt"
    copy.write_text("some text")
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.data.write_text(json.dumps({"sources": [{"name": "own.txt", "sha256": file_sha256(own)}]}))
    train: Any = [{"path": str(own)}] if kind == "entry" else str(own)
    data = DataConfig.model_validate({"train": train, "validation": 0.1})
    probe, said = (copy, "data of the run") if kind == "copy" else (own, "training data of the run")
    assert own_file_note(data, folder, str(probe)) == f"the file {probe.name} is {said}, not unrelated text"
    assert own_file_note(data, folder, str(other)) is None
    assert own_file_note(data, None, "owner/some-data") is None
