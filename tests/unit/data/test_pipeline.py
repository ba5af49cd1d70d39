"""Rows to units: the same in one process and in several, and errors that name the row."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loralab.data import pipeline
from loralab.data.pipeline import RowTokenizer, tokenize_rows
from loralab.data.sources import Row
from loralab.data.tokenize import TokenizeSettings
from loralab.errors import DataError, WorkerError
from support import tiny
from unit.data.prompters import build_prompter


def build(*, on_bad_row: str = "error", **chosen: Any) -> RowTokenizer:
    values: dict[str, Any] = {"train_on": "response", "max_length": 64, "truncation": "right", "long_text": "split"}
    values |= chosen
    return RowTokenizer(build_prompter(), "alpaca", {"output": "answer"}, TokenizeSettings(**values), on_bad_row)  # type: ignore[arg-type]


def rows(count: int, **changed: Any) -> list[Row]:
    """Return `count` rows; `changed` maps `row_N` to fields of that row."""
    made = []
    for number, fields in enumerate(tiny.alpaca_rows(count), 1):
        fields["answer"] = fields.pop("output")
        made.append(Row(fields | changed.get(f"row_{number}", {}), number, "rows.json", number + 1))
    return made


def plain(result: Any) -> list[Any]:
    return [
        (
            number,
            [
                (u.dropped, u.truncated, [(b.prompt_ids.tolist(), b.answer_ids.tolist()) for b in u.branches])
                for u in units
            ],
        )
        for number, units in result
    ]


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "CHUNK_ROWS", 3)
    monkeypatch.setattr(pipeline, "ROWS_IN_PROCESS", 7)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("workers", [1, 2, "auto"])
def test_workers_give_what_one_process_gives(workers: Any) -> None:
    given = rows(41, row_5={"instruction": None}, row_40={"answer": "x" * 99})
    alone = plain(tokenize_rows(given, build(on_bad_row="drop"), workers=0))
    assert [number for number, _ in alone] == list(range(1, 42))
    assert plain(tokenize_rows(iter(given), build(on_bad_row="drop"), workers=workers)) == alone


@pytest.mark.usefixtures("_small_chunks")
def test_workers_without_rows() -> None:
    assert list(tokenize_rows([], build(), workers=2)) == []


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_row_is_named(workers: int) -> None:
    given = rows(20, row_11={"instruction": 3})
    with pytest.raises(DataError) as caught:
        list(tokenize_rows(given, build(), workers=workers))
    (problem,) = caught.value.problems
    assert problem.what == "field 'instruction' is int, not a string: 3"
    assert problem.where == "rows.json row 11 (line 12)"


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("workers", [0, 2])
def test_row_that_is_too_long_is_named(workers: int) -> None:
    given = rows(20, row_8={"answer": "x" * 300})
    with pytest.raises(DataError) as caught:
        list(tokenize_rows(given, build(truncation="error", max_length=256), workers=workers))
    assert caught.value.problems[0].where == "rows.json row 8 (line 9), key data.truncation (error)"


def test_missing_column_is_named() -> None:
    given = [Row({"instruction": "a", "output": "b"}, 1, "rows.json")]
    with pytest.raises(DataError, match="missing column 'answer'") as caught:
        list(tokenize_rows(given, build(), workers=0))
    assert caught.value.problems[0].where == "rows.json row 1"


def test_dropped_rows_stay_in_their_place() -> None:
    given = rows(5, row_1={"answer": None}, row_4={"instruction": []})
    result = plain(tokenize_rows(given, build(on_bad_row="drop"), workers=0))
    assert [(number, units[0][0]) for number, units in result] == [
        (1, "bad_row"),
        (2, None),
        (3, None),
        (4, "bad_row"),
        (5, None),
    ]
    good = plain(tokenize_rows(rows(5), build(), workers=0))
    assert [result[i] for i in (1, 2, 4)] == [good[i] for i in (1, 2, 4)]


def kill_workers(given: list[Row], *, after: int) -> Iterator[Row]:
    for row in given:
        if row.number == after:
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGKILL)
        yield row


@pytest.mark.usefixtures("_small_chunks")
def test_killed_worker_is_named() -> None:
    with pytest.raises(WorkerError) as caught:
        list(tokenize_rows(kill_workers(rows(90), after=50), build(), workers=2))
    (problem,) = caught.value.problems
    assert "one of 2 worker processes that tokenize was killed" in problem.what
    assert problem.where.startswith("rows.json, after row ")
    assert int(problem.where.split()[-1]) < 50
    assert "data.num_workers: 0" in problem.fix


def hang(folder: str) -> None:
    """Tokenize without an end, in this process's own workers, whose numbers go to a file."""

    def endless() -> Iterator[Row]:
        for number, row in enumerate(rows(40)):
            if number == 39:
                children = [str(child.pid) for child in multiprocessing.active_children()]
                Path(folder, "workers").write_text(" ".join(children))
                time.sleep(600)
            yield row

    list(tokenize_rows(endless(), build(), workers=2))


@pytest.mark.usefixtures("_small_chunks")
def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    parent = multiprocessing.get_context("fork").Process(target=hang, args=(str(tmp_path),))
    parent.start()
    wait_for(lambda: (tmp_path / "workers").is_file() and (tmp_path / "workers").read_text() != "")
    workers = [int(pid) for pid in (tmp_path / "workers").read_text().split()]
    parent.kill()
    parent.join()
    assert len(workers) == 2
    try:
        wait_for(lambda: not any(is_running(pid) for pid in workers))
    finally:
        for pid in filter(is_running, workers):
            os.kill(pid, signal.SIGKILL)


def wait_for(condition: Any) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("waited for a minute")


def is_running(pid: int) -> bool:
    """Return whether a process is there and is no zombie, which nobody may have asked for its end yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return state.rpartition(") ")[2][0] not in "ZX"
