"""Rows to units: the same in one process and in several, and errors that name the row."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loralab.data.prompts.prompter import Prompter
from loralab.data.reading.rows import JsonLine
from loralab.data.reading.sources import Row, Source
from loralab.data.tokens import pipeline
from loralab.data.tokens.pipeline import RowPipeline, RowTokenizer, chunked
from loralab.data.tokens.tokenize import TokenizeSettings
from loralab.errors import DataError, MaskError, WorkerError
from support import tiny
from unit.data.prompters import NO_PICTURES, build_prompter
from unit.data.stores import unpack


def build(*, on_bad_row: str = "error", prompter: Prompter | None = None, **chosen: Any) -> RowTokenizer:
    values: dict[str, Any] = {"train_on": "response", "max_length": 64, "truncation": "right", "long_text": "split"}
    values |= chosen
    prompter = prompter or build_prompter()
    settings = TokenizeSettings(**values)
    return RowTokenizer(prompter, "alpaca", {"output": "answer"}, settings, on_bad_row, NO_PICTURES)  # type: ignore[arg-type]


def source_of(given: Any, name: str = "rows.json") -> Source:
    """Return a source of rows from memory, or of what a function yields."""
    return Source(name, name, given if callable(given) else lambda start: iter(given[start:]))


def run(given: Any, tokenizer: RowTokenizer, *, workers: Any, row: int = 0) -> list[Any]:
    """Return the units of all rows, each with the number of its row."""
    packed = RowPipeline([source_of(given)], [tokenizer], workers=workers).run(row=row)
    return [unit[1:] for _, rows in packed for unit in unpack(rows)]


def rows(count: int, **changed: Any) -> list[Row]:
    """Return `count` rows; `changed` maps `row_N` to fields of that row."""
    made = []
    for number, fields in enumerate(tiny.alpaca_rows(count), 1):
        fields["answer"] = fields.pop("output")
        made.append(Row(fields | changed.get(f"row_{number}", {}), number, "rows.json", number + 1))
    return made


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "CHUNK_ROWS", 3)
    monkeypatch.setattr(pipeline, "ROWS_IN_PROCESS", 7)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("workers", [1, 2, "auto"])
def test_workers_give_what_one_process_gives(workers: Any) -> None:
    given = rows(41, row_5={"instruction": None}, row_40={"answer": "x" * 99})
    alone = run(given, build(on_bad_row="drop"), workers=0)
    assert [unit[0] for unit in alone] == list(range(1, 42))
    assert alone[4][1:3] == ("bad_row", [])
    assert alone[39][2] == ["truncated"]
    assert run(given, build(on_bad_row="drop"), workers=workers) == alone
    assert run(given, build(on_bad_row="drop"), workers=workers, row=7) == alone[7:]


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("workers", [0, 2, "auto"])
def test_sources_have_tokenizers_of_their_own(workers: Any) -> None:
    texts = [Row({"text": f"red {number}"}, number, "t", None) for number in range(1, 6)]
    sources = [source_of(rows(9)), source_of(texts, "t"), source_of(rows(4), "again")]
    first = build()
    text = RowTokenizer(first.prompter, "text", {}, first.settings, "error", NO_PICTURES)
    pipeline = RowPipeline(sources, [first, text, first], workers=workers)
    found = [(source, unit[1]) for source, packed in pipeline.run() for unit in unpack(packed)]
    numbers = [(index, number) for index, count in enumerate((9, 5, 4)) for number in range(1, count + 1)]
    assert found == numbers
    rest = [(source, unit[1]) for source, packed in pipeline.run(source=1, row=3) for unit in unpack(packed)]
    assert rest == numbers[12:]
    assert pipeline.processes == (1 if workers == 0 else 2)


@pytest.mark.usefixtures("_small_chunks")
def test_workers_without_rows() -> None:
    assert run([], build(), workers=2) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_lines_are_parsed_where_they_are_tokenized(workers: int) -> None:
    lines = [JsonLine(b'{"instruction": "a", "answer": "b"}\n', 1, "a.jsonl", 2), JsonLine(b"{", 2, "a.jsonl", 4)]
    assert len(run(lines[:1], build(), workers=workers)) == 1
    with pytest.raises(DataError, match="invalid JSON") as caught:
        run(lines, build(on_bad_row="drop"), workers=workers)
    assert caught.value.problems[0].where == "a.jsonl line 4 column 2"


def test_chunks_are_bounded_in_rows_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "CHUNK_ROWS", 4)
    monkeypatch.setattr(pipeline, "CHUNK_BYTES", 100)
    long, short = [{"content": ["x" * 60]}], "y"
    given: list[Any] = [Row({"messages": value}, 1, "r") for value in [short] * 9 + [long] * 3]
    given += [JsonLine(b"z" * 60, 1, "r", 1)] * 3
    assert [len(chunk) for chunk in chunked(given)] == [4, 4, 3, 2, 2]


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_row_is_named(workers: int) -> None:
    given = rows(20, row_11={"instruction": 3})
    with pytest.raises(DataError) as caught:
        run(given, build(), workers=workers)
    (problem,) = caught.value.problems
    assert problem.what == "field 'instruction' is int, not a string: 3"
    assert problem.where == "rows.json row 11 (line 12)"


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("on_bad_row", ["error", "drop"])
def test_row_that_is_too_long_is_named(workers: int, on_bad_row: str) -> None:
    given = rows(20, row_8={"answer": "x" * 300})
    with pytest.raises(DataError) as caught:
        run(given, build(truncation="error", max_length=256, on_bad_row=on_bad_row), workers=workers)
    assert caught.value.problems[0].where == "rows.json row 8 (line 9), key data.truncation (error)"


def test_missing_column_is_named() -> None:
    given = [Row({"instruction": "a", "output": "b"}, 1, "rows.json")]
    with pytest.raises(DataError, match="missing column 'answer'") as caught:
        run(given, build(), workers=0)
    assert caught.value.problems[0].where == "rows.json row 1"


def test_dropped_rows_stay_in_their_place() -> None:
    given = rows(5, row_1={"answer": None}, row_4={"instruction": []})
    result = run(given, build(on_bad_row="drop"), workers=0)
    assert [unit[:2] for unit in result] == [(1, "bad_row"), (2, None), (3, None), (4, "bad_row"), (5, None)]
    good = run(rows(5), build(), workers=0)
    assert [result[i] for i in (1, 2, 4)] == [good[i] for i in (1, 2, 4)]


# Refuses one row by its content; alters none.
PICKY = "{% for m in messages %}{% if 'never' in m.content %}{{ raise_exception('not this') }}{% endif %}"
PICKY += "{{ m.content }}{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
# Ends nothing with a generation prompt and heads an answer with a name: that name would carry loss.
HEADED = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("workers", [0, 2])
def test_rows_that_the_template_refuses(workers: int) -> None:
    given = rows(20, row_8={"instruction": "never"}, row_9={"instruction": "never again"})
    tokenizer = build(prompter=build_prompter(PICKY), on_bad_row="drop")
    result = run(given, tokenizer, workers=workers)
    assert [unit[0] for unit in result if unit[1] == "template_refused"] == [8, 9]
    assert [unit[0] for unit in result if unit[1] is None] == [n for n in range(1, 21) if n not in (8, 9)]
    with pytest.raises(DataError, match="not this") as caught:
        run(given, build(prompter=build_prompter(PICKY)), workers=workers)
    assert caught.value.problems[0].where == "rows.json row 8 (line 9), key data.template"


def test_proof_that_fails_is_never_dropped() -> None:
    with pytest.raises(MaskError, match="no generation prompt") as caught:
        run(rows(3), build(prompter=build_prompter(HEADED), on_bad_row="drop"), workers=0)
    assert caught.value.problems[0].where == "rows.json row 1 (line 2), key data.template"


def kill_workers(given: list[Row], *, after: int) -> Iterator[Row]:
    for row in given:
        if row.number == after:
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGKILL)
        yield row


@pytest.mark.usefixtures("_small_chunks")
def test_killed_worker_is_named() -> None:
    with pytest.raises(WorkerError) as caught:
        run(lambda _: kill_workers(rows(90), after=50), build(), workers=2)
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

    run(lambda _: endless(), build(), workers=2)


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
