"""Sources of rows: every kind of file, name and error."""

import csv
import datetime
import gzip
import io
import json
import math
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from loralab.data.reading import json_list
from loralab.data.reading.hub import HubId, load_hub_split, parse_hub_id
from loralab.data.reading.readers import PARQUET_BATCH_ROWS, READERS, data_suffix
from loralab.data.reading.rows import JsonLine
from loralab.data.reading.sources import Row, resolve_sources
from loralab.errors import DataError, Problem

WHERE = "key data.train"
# What goes wrong where a reader splits lines too eagerly, loses a digit or guesses an encoding.
HARD_ROWS = [
    {"text": "line\u2028and\u2029paragraph\x85next", "n": 1},
    {"text": "emoji 😀 e\u0301 中文", "n": 2**70},
    {"text": "two\nlines\r\nthree\tfour", "n": {"deep": [{"a": [None, True, 1.5]}]}},
    {"text": '"quoted", with comma \\ and \ufeff inside', "n": -0.0},
]
HARD_TEXTS = [{"text": row["text"]} for row in HARD_ROWS]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", autouse=True)
def _without_progress_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def read(spec: str | list[str], **options: str) -> list[dict[str, object]]:
    return [dict(row.fields) for source in resolve_sources(spec, where=WHERE, **options) for row in source.rows()]


def write(name: str, content: bytes | str) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return name


def problem_of(action: Callable[[], object]) -> Problem:
    with pytest.raises(DataError) as caught:
        action()
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def problem_in(name: str, content: bytes | str) -> Problem:
    write(name, content)
    return problem_of(lambda: read(name))


def as_json_lines(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows: list[dict[str, object]], delimiter: str = ",") -> str:
    target = io.StringIO(newline="")
    writer = csv.DictWriter(target, rows[0].keys(), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return target.getvalue()


ROUND_TRIPS = {
    "list.json": (json.dumps(HARD_ROWS, ensure_ascii=False), HARD_ROWS),
    "escaped.json": (json.dumps(HARD_ROWS), HARD_ROWS),
    "indented.json": (json.dumps(HARD_ROWS, indent=2), HARD_ROWS),
    "wrapped.json": (json.dumps({"version": 1, "tags": ["a"], "data": HARD_ROWS}), HARD_ROWS),
    "lines.json": (as_json_lines(HARD_ROWS), HARD_ROWS),
    "lines.jsonl": (as_json_lines(HARD_ROWS), HARD_ROWS),
    "lines.ndjson": (as_json_lines(HARD_ROWS), HARD_ROWS),
    "UPPER.JSONL": (as_json_lines(HARD_ROWS), HARD_ROWS),
    "unterminated.jsonl": (as_json_lines(HARD_ROWS).rstrip("\n"), HARD_ROWS),
    "blank.jsonl": ("\n \t\n" + as_json_lines(HARD_ROWS).replace("\n", "\n\n"), HARD_ROWS),
    "table.csv": (as_csv(HARD_TEXTS), HARD_TEXTS),
    "table.tsv": (as_csv(HARD_TEXTS, "\t"), HARD_TEXTS),
    "note.txt": ("one\ntwo\u2028\n", [{"text": "one\ntwo\u2028\n"}]),
    "note.text": ("one", [{"text": "one"}]),
    "note.md": ("# Title\n", [{"text": "# Title\n"}]),
}


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_round_trip(name, mark, packed):
    content, rows = ROUND_TRIPS[name]
    assert read(write(name + packed, mark + content)) == rows


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.json", '[\r\n{"a": 1},\r\n{"a": 2}\r\n]\r\n', [{"a": 1}, {"a": 2}]),
        ("a.jsonl", '{"a": 1}\r\n\r\n{"a": 2}\r\n', [{"a": 1}, {"a": 2}]),
        ("lines.json", '{"a": 1}\r\n{"a": 2}\r\n', [{"a": 1}, {"a": 2}]),
        ("a.csv", 'a,b\r\n1,"x\r\ny"\r\n\r\n2,z\r\n', [{"a": "1", "b": "x\r\ny"}, {"a": "2", "b": "z"}]),
        ("a.txt", "one\r\ntwo\r\n", [{"text": "one\ntwo\n"}]),
    ],
)
def test_windows_line_ends(name, content, rows):
    assert read(write(name, content)) == rows


def test_every_suffix_has_a_round_trip():
    assert {data_suffix(name + packed) for name in ROUND_TRIPS for packed in ("", ".gz")} | {".parquet"} == set(READERS)


def test_json_takes_what_python_takes():
    rows = read(write("a.jsonl", '{"a": NaN, "b": Infinity, "c": 1e999}\n'))
    assert math.isnan(rows[0]["a"])
    assert rows[0]["b"] == rows[0]["c"] == math.inf


def test_csv_field_longer_than_the_library_default():
    text = "x" * 200_000
    assert read(write("a.csv", f"text\n{text}\n")) == [{"text": text}]


def test_parquet_round_trip():
    day = datetime.date(2024, 2, 29)
    rows = [{"text": row["text"], "n": 2**62, "deep": [{"a": day}], "raw": b"\0\xff", "no": None} for row in HARD_ROWS]
    rows *= PARQUET_BATCH_ROWS // 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet", row_group_size=1000)
    source = resolve_sources("a.parquet", where=WHERE)[0]
    found = list(source.rows())
    assert [row.fields for row in found] == rows
    assert [row.number for row in found] == list(range(1, len(rows) + 1))
    assert found[-1].line is None


def test_rows_know_their_place():
    write("d/a.jsonl", '\n{"a": 1}\n\n\n{"a": 2}\n')
    write("a.csv", 'a\n"1\n2"\n\n3\n')
    write("a.json", '[{"a": 1},\n{"a": 2}]')
    names = ["d/a.jsonl", "a.csv", "a.json"]
    rows = [row for source in resolve_sources(names, where=WHERE) for row in source.rows()]
    assert [(row.number, row.line) for row in rows] == [(1, 2), (2, 5), (1, 2), (2, 5), (1, None), (2, None)]
    assert rows[1].describe() == "d/a.jsonl row 2 (line 5)"
    assert rows[5].describe() == "a.json row 2"


def test_rows_cross_to_worker_processes():
    for row in (Row({"a": [1]}, 3, "x.jsonl", 4), JsonLine(b'{"a": [1]}', 3, "x.jsonl", 4)):
        assert pickle.loads(pickle.dumps(row)) == row


def numbered(count: int) -> list[dict[str, object]]:
    return [{"text": f"row {number}"} for number in range(count)]


STARTS: dict[str, Callable[[list[dict[str, object]]], str | None]] = {
    "a.json": json.dumps,
    "wrapped.json": lambda rows: json.dumps({"data": rows}),
    "lines.json": as_json_lines,
    "a.jsonl": lambda rows: "\n" + as_json_lines(rows).replace("\n", "\n\n"),
    "a.jsonl.gz": as_json_lines,
    "a.csv": as_csv,
    "a.tsv": lambda rows: as_csv(rows, "\t"),
    "a.parquet": lambda rows: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet"),
    "saved": lambda rows: datasets.Dataset.from_list(rows).save_to_disk("saved"),
}


@pytest.mark.parametrize("name", STARTS)
def test_reading_goes_on_at_any_row(name):
    content = STARTS[name](numbered(7))
    if content is not None:
        write(name, content)
    source = resolve_sources(name, where=WHERE)[0]
    whole = list(source.rows())
    assert [row.fields for row in whole] == numbered(7)
    for start in range(9):
        assert list(source.rows(start)) == whole[start:]


def test_reading_a_text_file_goes_on_behind_it():
    source = resolve_sources(write("a.txt", "one"), where=WHERE)[0]
    assert [len(list(source.rows(start))) for start in (0, 1)] == [1, 0]


def test_groups_of_a_parquet_file_that_are_left_out_are_not_read(monkeypatch):
    rows = numbered(4 * PARQUET_BATCH_ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet", row_group_size=PARQUET_BATCH_ROWS + 100)
    groups = []
    read_batches = pyarrow.parquet.ParquetFile.iter_batches

    def note(self, *args, **options):
        groups.append(options["row_groups"])
        return read_batches(self, *args, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", note)
    source = resolve_sources("a.parquet", where=WHERE)[0]
    for start in (0, PARQUET_BATCH_ROWS + 99, PARQUET_BATCH_ROWS + 100, 3500, len(rows) - 1, len(rows), len(rows) + 5):
        found = list(source.rows(start))
        assert [row.fields for row in found] == rows[start:]
        assert [row.number for row in found] == list(range(start + 1, len(rows) + 1))
    assert groups == [[0, 1, 2, 3], [0, 1, 2, 3], [1, 2, 3], [3], [3], [], []]


def test_lines_that_are_left_out_are_not_parsed():
    source = resolve_sources(write("a.jsonl", '{"a": 1}\nnot json\n{"a": 2}\n'), where=WHERE)[0]
    assert [row.fields for row in source.rows(2)] == [{"a": 2}]
    assert [row.number for row in source.unparsed()] == [1, 2, 3]


def test_rows_can_be_read_again():
    source = resolve_sources(write("a.jsonl", '{"a": 1}\n{"a": 2}\n'), where=WHERE)[0]
    assert next(iter(source.rows())).fields == {"a": 1}
    assert list(source.rows()) == list(source.rows())


def test_fingerprint_is_of_the_content():
    def fingerprint(name: str) -> str:
        return resolve_sources(name, where=WHERE)[0].fingerprint

    write("a.jsonl", '{"a": 1}\n')
    write("b.jsonl", '{"a": 1}\n')
    before = fingerprint("a.jsonl")
    os.utime("a.jsonl", (1, 1))
    assert before == fingerprint("a.jsonl") == fingerprint("b.jsonl")
    write("b.jsonl", '{"a": 2}\n')
    assert before != fingerprint("b.jsonl")


@pytest.mark.parametrize("name", ["big.jsonl", "big.jsonl.gz", "lines.json", "list.json", "list.json.gz", "big.csv"])
def test_large_files_stream(name, monkeypatch):
    monkeypatch.setattr(json_list, "BLOCK_BYTES", 10_000)
    line = json.dumps({"text": "x" * 1000}) + "\n" if "json" in name else "x" * 1000 + "\n"
    content = f"[{','.join([line] * 5000)}]" if "list" in name else line * 5000
    write(name, ("" if "json" in name else "text\n") + content)
    source = resolve_sources(name, where=WHERE)[0]
    tracemalloc.start()
    try:
        count = sum(1 for _ in source.rows())
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 5000
    assert peak_bytes < 500_000


# Each: file, content, parts of what, where and fix.
BAD_FILES = {
    "empty": ("a.jsonl", "", "empty file: 'a.jsonl'", WHERE, "at least one row"),
    "blank lines": ("a.jsonl", "\n \n", "no rows in 'a.jsonl'", "a.jsonl", "at least one row"),
    "blank json": ("a.json", " \n", "no rows in 'a.json'", "a.json", "at least one row"),
    "empty list": ("a.json", "[]", "no rows in 'a.json'", "a.json", "at least one row"),
    "empty gzip": ("a.txt.gz", "", "no rows in 'a.txt.gz'", "a.txt.gz", "at least one row"),
    "blank text": ("a.txt", "\ufeff \n", "no rows in 'a.txt'", "a.txt", "at least one row"),
    "header only": ("a.csv", "a,b\n", "no rows in 'a.csv'", "a.csv", "at least one row"),
    "blank csv": ("a.csv", "\n\n", "no rows in 'a.csv'", "a.csv", "at least one row"),
    "suffix": ("a.xlsx", "x", "unknown kind of file '.xlsx': 'a.xlsx'", WHERE, ".jsonl"),
    "no suffix": ("data", "x", "unknown kind of file 'without suffix': 'data'", WHERE, ".parquet"),
    "packed parquet": ("a.parquet.gz", "x", "unknown kind of file '.parquet.gz'", WHERE, "convert"),
    "json line": ("a.jsonl", '{"a": 1}\n\n{"a": 2\n', "got the end", "a.jsonl line 3 column 8", "mend it there"),
    "json quote": ("a.jsonl", "{'a': 1}\n", "got \"'a': 1}\"", "a.jsonl line 1 column 2", "mend it there"),
    "two in a line": ("a.jsonl", "{}{}", "Extra data, got '{}'", "a.jsonl line 1 column 3", ".jsonl has one object"),
    "json": ("a.json", '[\n{"a": 1},\n{"a" 2}]', "got '2}]'", "a.json line 3 column 6", "mend it there"),
    "json then lines": ("a.json", '{"a": 1}\n{"a": }\n', "got '}'", "a.json line 2 column 7", "mend it there"),
    "list then text": ("a.json", '[{"a": 1}]\n{}\n', "Extra data", "a.json line 2 column 1", "mend it there"),
    "digits": ("a.jsonl", "{}\n" + "1" * 5000, "4300", "a.jsonl line 2", "as a string"),
    "depth": ("a.jsonl", "[" * 200_000, "nested too deeply", "a.jsonl line 1", "flatten"),
    "depth in json": ("a.json", '{"a":' * 200_000, "nested too deeply", "a.json line 1", "flatten"),
    "row list": ("a.jsonl", "{}\n\n[1, 2]\n", "row 2 is a list, not an object: [1, 2]", "row 2 (line 3)", "object"),
    "row string": ("a.json", '[{}, "x"]', "row 2 is a string, not an object: 'x'", "a.json row 2", "object"),
    "row number": ("a.json", "[1.5]", "row 1 is a number, not an object: 1.5", "a.json row 1", "object"),
    "row boolean": ("a.json", "[true]", "row 1 is a boolean, not an object: True", "a.json row 1", "object"),
    "row null": ("a.json", "[null]", "row 1 is null, not an object: None", "a.json row 1", "object"),
    "long row": ("a.json", json.dumps(["x" * 999]), "xxx...", "a.json row 1", "object"),
    "scalar": ("a.json", "3", "the file holds a number, not a list", "a.json", '[{"prompt": ...}, ...]'),
    "one object": ("a.json", '{"a": [], "b": [1]}', "0 lists of objects, its keys: ['a', 'b']", "a.json", ".jsonl"),
    "two lists": ("a.json", '{"a": [{}], "b": [{}]}', "2 lists of objects, under ['a', 'b']", "a.json", ".jsonl"),
    "surrogate": ("a.jsonl", '{"a": "\\ud83d\\ude00"}\n{"a": "x\\uD83d"}', "row 2 holds \\ud83d", "(line 2)", "whole"),
    "surrogate key": ("a.json", '[{"\\udc00": 1}]', "row 1 holds \\udc00", "a.json row 1", "whole character"),
    "bad byte": ("a.jsonl", b'{}\n{"a": "\xff"}', "not UTF-8: byte 0xff", "a.jsonl line 2 byte 8", "UTF-8"),
    "bad byte in csv": ("a.csv", b'a\n"\n\xe9"\n', "not UTF-8: byte 0xe9", "a.csv line 3 byte 1", "UTF-8"),
    "bad byte in text": ("a.txt", b"one\ntwo\xe9 \n", "not UTF-8: byte 0xe9", "a.txt line 2 byte 4", "UTF-8"),
    "utf-16": ("a.json", "[{}]".encode("utf-16"), "text is UTF-16", "a.json line 1 byte 1", "UTF-8"),
    "ragged": ("a.csv", 'a,b\n"\n",2\n1,2,3\n', "3 fields where the header has 2", "a.csv row 2 (line 4)", "quotes"),
    "short": ("a.tsv", "a\tb\n1\n", "1 fields where the header has 2: ['1']", "a.tsv row 1 (line 2)", "quotes"),
    "same column": ("a.csv", "a,b,a\n1,2,3\n", "two columns have the name 'a'", "a.csv line 1", "rename"),
    "no column": ("a.csv", ",a\n0,x\n", "column 1 of 2 has no name", "a.csv line 1", "index=False"),
    "open quote": ("a.csv", 'a\n1\n"2\n3\n', "invalid CSV: unexpected end of data", "a.csv line 3", 'a " in it is ""'),
    "stray quote": ("a.csv", 'a\n"1"x\n', "invalid CSV: ',' expected after '\"'", "a.csv line 2", 'a " in it is ""'),
    "old mac": ("a.csv", "a\r1\r2\r", "a carriage return that ends no line", "a.csv line 1", "quote fields"),
    "parquet": ("a.parquet", b"PAR1 no PAR1", "not a readable Parquet file: ", "a.parquet", "again"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(case):
    name, content, what, where, fix = BAD_FILES[case]
    problem = problem_in(name, content)
    assert what in problem.what
    assert where in problem.where
    assert fix in problem.fix


def test_damaged_gzip():
    rows = "".join(f'{{"a": {number}}}\n' for number in range(10_000))
    whole = gzip.compress(rows.encode())
    damaged = {"cut": whole[: len(whole) // 2], "plain": b'{"a": 1}\n', "crc": whole[:-8] + b"\0" * 8}
    for name, raw in damaged.items():
        path = Path(f"{name}.jsonl.gz")
        path.write_bytes(raw)
        problem = problem_of(lambda path=path: read(str(path)))
        assert problem.what.startswith("damaged gzip file: ")
        assert problem.where == str(path)
        assert "gzip -t" in problem.fix


def test_parquet_with_one_name_twice():
    table = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
    pyarrow.parquet.write_table(table, "a.parquet")
    problem = problem_of(lambda: read("a.parquet"))
    assert problem == Problem("two columns have the name 'a'", "a.parquet", "rename one of them")


def test_damaged_parquet_page():
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x" * 99] * 999}), "a.parquet", compression="gzip")
    raw = bytearray(Path("a.parquet").read_bytes())
    raw[4:60] = bytes(56)
    problem = problem_in("a.parquet", bytes(raw))
    assert problem.what.startswith("not a readable Parquet file: ")


def test_no_permission(monkeypatch):
    write("a.jsonl", "{}")
    denied = PermissionError(13, "Permission denied")

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise denied

    source = resolve_sources("a.jsonl", where=WHERE)[0]
    monkeypatch.setattr(Path, "open", refuse)  # chmod does not stop root
    for action, where in ((lambda: read("a.jsonl"), WHERE), (lambda: list(source.rows()), "a.jsonl")):
        problem = problem_of(action)
        assert problem == Problem(
            "cannot read 'a.jsonl': Permission denied", where, "allow yourself to read it: chmod u+r a.jsonl"
        )


def test_file_that_went_away():
    source = resolve_sources(write("a.jsonl", "{}"), where=WHERE)[0]
    Path("a.jsonl").unlink()
    problem = problem_of(lambda: list(source.rows()))
    assert problem.what == "cannot read 'a.jsonl': No such file or directory"


# Each: name, then parts of what and fix.
BAD_NAMES = [
    ("data/trian.jsonl", "no such file: 'data/trian.jsonl'", "did you mean 'data/train.jsonl'?"),
    ("dta/train.jsonl", "no such file: 'dta/train.jsonl'", "did you mean 'data'? there is no 'dta' in "),
    ("missing.csv.gz", "no such file: 'missing.csv.gz'", "there is no 'missing.csv.gz' in "),
    ("data/train", "no such file: 'data/train'", "did you mean 'data/train.jsonl'?"),  # its folder exists
    ("data/a#1.jsonl", "no such file: 'data/a#1.jsonl'", "there is no"),
    ("./owner/name", "no such file: './owner/name'", "there is no 'owner' in "),
    ("/nowhere/name", "no such file: '/nowhere/name'", "there is no 'nowhere' in /"),
    ("~/of/mine", "no such file: '~/of/mine'", "there is no 'of' in "),
    ("a/b/c", "no such file: 'a/b/c'", "there is no 'a' in "),
    ("a\\b", "no such file: 'a\\\\b'", "there is no"),
    ("~nobody-of-that-name/x", "cannot expand '~nobody-of-that-name/x'", "whole path"),
    ("", "'' names nothing", "OWNER/NAME[:CONFIG]"),
    ("a\0b.json", "'a\\x00b.json' names nothing", "OWNER/NAME[:CONFIG]"),
    ("two words", "'two words' is no file, folder or Hub id", "OWNER/NAME[:CONFIG]"),
    ("owner/name:", "'owner/name:' is no file, folder or Hub id", "OWNER/NAME[:CONFIG]"),
    ("data/*.csv", "no file matches 'data/*.csv'", "it is read in "),
    ("data/[xyz].jsonl", "no file matches 'data/[xyz].jsonl'", "it is read in "),
    ("data", "'data' is a folder", "for example 'data/*.jsonl' (1 found)"),
    ("deep/", "'deep/' is a folder", "for example 'deep/**/*.parquet' (2 found)"),
    ("bare", "'bare' is a folder", "no data file in it; known suffixes: .json"),
    ("pipe.jsonl", "'pipe.jsonl' is neither a file nor a folder", "copy its content"),
    ("x" * 300 + ".json", "File name too long", "check the path"),
    ("json", "'json#train' is no data set of the Hub", "OWNER/NAME"),  # would load what lies in the current folder
    ("pandas", "'pandas#train' is no data set of the Hub", "OWNER/NAME"),
]


@pytest.mark.parametrize(("name", "what", "fix"), BAD_NAMES)
def test_bad_name(name, what, fix, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("data/train.jsonl", "{}")
    write("data/README.md", "x")
    write("data/NOTES.md", "x")
    write("deep/a/1.parquet", "x")
    write("deep/a/2.parquet", "x")
    Path("bare").mkdir()
    os.mkfifo("pipe.jsonl")
    problem = problem_of(lambda: read(name))
    assert what in problem.what
    assert problem.where == WHERE
    assert fix in problem.fix


def test_all_bad_names_at_once():
    with pytest.raises(DataError) as caught:
        read([write("a.jsonl", "{}"), "no.jsonl", "b/*.csv", write("a.exe", "x")])
    assert [problem.what for problem in caught.value.problems] == [
        "no such file: 'no.jsonl'",
        "no file matches 'b/*.csv'",
        "unknown kind of file '.exe': 'a.exe'",
    ]


def test_no_name_at_all():
    assert problem_of(lambda: read([])).what == "no data given"


def test_globs_are_sorted_and_keep_their_form():
    for name in ("d/b.jsonl", "d/a.jsonl", "d/e/c.jsonl", "d/x.csv"):
        write(name, f'{{"at": "{name}"}}\n')
    Path("d/folder.jsonl").mkdir()

    def names(spec: str | list[str]) -> list[str]:
        return [source.name for source in resolve_sources(spec, where=WHERE)]

    assert names("d/*.jsonl") == ["d/a.jsonl", "d/b.jsonl"]
    assert names("./d/?.jsonl") == ["./d/a.jsonl", "./d/b.jsonl"]
    assert names("d/**/*.jsonl") == ["d/a.jsonl", "d/b.jsonl", "d/e/c.jsonl"]
    assert names(["d/[b].jsonl", "d/a.jsonl"]) == ["d/b.jsonl", "d/a.jsonl"]
    assert names(str(Path.cwd() / "d/a*")) == [str(Path.cwd() / "d/a.jsonl")]


def test_a_file_goes_before_a_glob():
    write("a[1].jsonl", '{"a": 1}')
    write("a1.jsonl", '{"a": 2}')
    assert read("a[1].jsonl") == [{"a": 1}]


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("a.jsonl", '{"a": 1}')
    source = resolve_sources("~/a.jsonl", where=WHERE)[0]
    assert source.name == "~/a.jsonl"
    assert [row.source for row in source.rows()] == ["~/a.jsonl"]
    assert read("~/*.jsonl") == [{"a": 1}]


@pytest.mark.parametrize("second", ["a.jsonl", "./a.jsonl", "link.jsonl", "*.jsonl"])
def test_same_file_twice(second):
    write("a.jsonl", "{}")
    if second == "link.jsonl":
        Path("link.jsonl").symlink_to("a.jsonl")
    problem = problem_of(lambda: resolve_sources(["a.jsonl", second], where=WHERE))
    assert problem.what.startswith("'a.jsonl' is given 2 times")
    assert problem.where == WHERE
    assert "epochs" in problem.fix


def test_a_file_has_no_split():
    write("a.jsonl", "{}")
    for name in ("a.jsonl", "*.jsonl"):
        problem = problem_of(lambda name=name: read(name, split="validation"))
        assert problem.what == "'a.jsonl' is one file and has no split 'validation'"
        assert "a fraction" in problem.fix


def saved_splits(**splits: list[dict[str, object]]) -> None:
    parts = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(parts).save_to_disk("saved")


def test_saved_data_set():
    rows = [{"text": row["text"], "deep": [{"a": 1}]} for row in HARD_ROWS]
    saved = datasets.Dataset.from_list(rows)
    saved.set_format("numpy", columns=["text"])  # how it was last looked at is not what it holds
    saved.save_to_disk("saved")
    source = resolve_sources("saved", where=WHERE)[0]
    assert [dict(row.fields) for row in source.rows()] == rows
    assert list(source.rows())[1].describe() == "saved row 2"
    assert problem_of(lambda: read("saved", split="test")).what == (
        "'saved' is a data set without splits; it has no 'test'"
    )


def test_splits_of_a_saved_data_set():
    saved_splits(train=[{"a": 1}, {"a": 2}], validation=[{"a": 3}])
    train, validation = (resolve_sources("saved", where=WHERE, split=split)[0] for split in (None, "validation"))
    assert (train.name, validation.name) == ("saved#train", "saved#validation")
    assert read("saved") == [{"a": 1}, {"a": 2}]
    assert read("saved", split="validation") == read("saved/validation") == [{"a": 3}]
    assert train.fingerprint != validation.fingerprint
    problem = problem_of(lambda: read("saved", split="valid"))
    assert problem.what == "no split 'valid' in 'saved'"
    assert problem.where == WHERE
    assert "did you mean 'validation'? known: train, validation" in problem.fix


def test_fingerprint_of_a_saved_data_set_is_of_its_content():
    def fingerprint(value: int, folder: str) -> str:
        datasets.Dataset.from_list([{"a": value}]).save_to_disk(folder)
        return resolve_sources(folder, where=WHERE)[0].fingerprint

    assert fingerprint(1, "one") == fingerprint(1, "two")
    assert fingerprint(1, "one") != fingerprint(2, "three")


def test_saved_data_set_twice():
    saved_splits(train=[{"a": 1}])
    problem = problem_of(lambda: read(["saved", "./saved"]))
    assert problem.what == "'saved' is given 2 times, also as './saved'"


def test_damaged_saved_data_set():
    saved_splits(train=[{"a": 1}])
    for name, content in (("train/state.json", "{"), ("dataset_dict.json", "[]")):
        write(f"saved/{name}", content)
        problem = problem_of(lambda: read("saved"))
        assert problem.what.startswith("cannot load the saved data set 'saved': ")
        assert problem.fix == "save it again"


def test_data_set_without_rows(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"a": []}))
    problem = problem_of(lambda: read("o/n"))
    assert problem == Problem("no rows in 'o/n#train'", "o/n#train", "give a split with at least one row")
    datasets.Dataset.from_dict({"a": []}).save_to_disk("saved")
    assert "'saved'" in problem_of(lambda: read("saved")).what


def test_saved_row_that_cannot_be_decoded():
    features = datasets.Features({"document": datasets.Pdf()})
    rows = {"document": [{"bytes": b"no document", "path": None}]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk("saved")
    problem = problem_of(lambda: read("saved"))
    assert problem.what.startswith("cannot read row 1: ")
    assert problem.where == "saved row 1"


def drawn() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(stream, "PNG")
    return stream.getvalue()


def picture_rows() -> datasets.Dataset:
    """Pictures as the Hub has them: one, a list, and in parts of messages; a path without bytes too."""
    one = {"bytes": drawn(), "path": None}
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "images": datasets.List(datasets.Image()),
            "parts": datasets.List({"type": datasets.Value("string"), "image": datasets.Image()}),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "sound": datasets.Audio(),
        }
    )
    rows = {
        "image": [one, {"bytes": None, "path": "images/a.png"}],
        "images": [[one, one], []],
        "parts": [[{"type": "image", "image": one}], [{"type": "text", "image": None}]],
        "label": [1, 0],
        "sound": [None, None],  # nobody can encode any here
    }
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("kind", ["parquet", "saved", "hub"])
def test_pictures_arrive_as_files(kind, monkeypatch):
    write("images/a.png", drawn())
    dataset, name = picture_rows(), "rows.parquet" if kind == "parquet" else kind
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: dataset)
    if kind == "parquet":
        dataset.to_parquet(name)
    elif kind == "saved":
        dataset.save_to_disk(name)
    rows = read("o/n" if kind == "hub" else name)
    one = {"bytes": drawn(), "path": None}
    assert rows[0] == {
        "image": one,
        "images": [one, one],
        "parts": [{"type": "image", "image": one}],
        "label": 1,
        "sound": None,
    }
    # save_to_disk takes the file itself along.
    linked, embedded = {"bytes": None, "path": "images/a.png"}, {"bytes": drawn(), "path": "a.png"}
    assert rows[1]["image"] == (embedded if kind == "saved" else linked)
    assert rows[1]["parts"] == [{"type": "text", "image": None}]
    assert dataset.features["image"].decode  # what the library gave is as it was


HUB_IDS = [
    ("squad", HubId("squad", None, None, None)),
    ("a/b", HubId("a/b", None, None, None)),
    ("a/b:c", HubId("a/b", "c", None, None)),
    ("a/b:c@v1.0#test", HubId("a/b", "c", "v1.0", "test")),
    ("a/b@refs/convert/parquet", HubId("a/b", None, "refs/convert/parquet", None)),
    ("a-1/b.c_d#train[:10%]", HubId("a-1/b.c_d", None, None, "train[:10%]")),
    ("a/b#train[5:-1]", HubId("a/b", None, None, "train[5:-1]")),
    ("a/b/c", None),
    ("a/b#", None),
    ("a b/c", None),
    ("-a/b", None),
    ("a/*", None),
    ("hf://a/b", None),
]


@pytest.mark.parametrize(("spec", "parts"), HUB_IDS)
def test_form_of_a_hub_id(spec, parts):
    assert parse_hub_id(spec) == parts


def test_hub_id_reaches_the_library(monkeypatch):
    calls = []

    def load(*args: object, **options: object) -> datasets.Dataset:
        calls.append((args, options))
        return datasets.Dataset.from_list([{"a": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    names = ["o/n:c@r/s#test", "o/n", "plain"]
    sources = resolve_sources(names, where=WHERE)
    sources += resolve_sources("o/n#test", where=WHERE, split="validation")
    assert [source.name for source in sources] == ["o/n:c@r/s#test", "o/n#train", "plain#train", "o/n#validation"]
    assert [args for args, _ in calls] == [("o/n", "c"), ("o/n", None), ("plain", None), ("o/n", None)]
    assert [options["split"] for _, options in calls] == ["test", "train", "train", "validation"]
    assert [options["revision"] for _, options in calls] == ["r/s", None, None, None]
    assert [row.describe() for row in sources[0].rows()] == ["o/n:c@r/s#test row 1"]
    assert problem_of(lambda: read(["o/n", "o/n#train"])).what == "'o/n#train' is given 2 times"


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (ConnectionError("Couldn't reach 'o/n'"), "HF_HUB_OFFLINE"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'o/n' is a gated dataset"), "`hf auth login` or HF_TOKEN"),
        (ValueError("BuilderConfig 'c' not found. Available: ['main']"), "the message lists what there is"),
        (ValueError('Unknown split "x". Should be one of [...]'), "the message lists what there is"),
        (RuntimeError("Dataset scripts are no longer supported, but found n.py"), "name a local file"),
        (NotImplementedError(), "name a local file"),
    ],
)
def test_errors_of_the_hub(error, fix, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    problem = problem_of(lambda: read("o/n"))
    assert "'o/n#train' is no file or folder here, and cannot be loaded from the Hub" in problem.what
    assert (str(error) or type(error).__name__) in problem.what
    assert problem.where == WHERE
    assert fix in problem.fix


def test_a_path_is_no_hub_id():
    assert problem_of(lambda: load_hub_split("a/b/c", split="train", where=WHERE)).what == (
        "'a/b/c' is no data set of the Hub"
    )


def test_offline():
    program = (
        "from loralab.data.reading.sources import resolve_sources\n"
        "from loralab.errors import DataError\n"
        "try:\n"
        "    resolve_sources('owner/name', where='key data.train')\n"
        "except DataError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    what, where, fix = done.stdout.splitlines()
    assert "'owner/name#train'" in what
    assert "Couldn't reach 'owner/name' on the Hub" in what
    assert where == "where: key data.train"
    assert "local file" in fix


def test_data_set_scripts_do_not_run(tmp_path):
    write("o/n/n.py", f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert problem_of(lambda: read("o/n")).what == "'o/n' is a folder"
    problem = problem_of(lambda: load_hub_split("o/n", split="train", where=WHERE))
    assert "scripts are no longer supported" in problem.what
    assert not (tmp_path / "ran").exists()


def rows_or_problems(spec: str) -> tuple[list[Row], tuple[Problem, ...]]:
    """Anything but rows or a DataError fails the test that calls this."""
    try:
        return [row for source in resolve_sources(spec, where=WHERE) for row in source.rows()], ()
    except DataError as error:
        return [], error.problems


@pytest.mark.parametrize("suffix", READERS)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.one_of(st.binary(min_size=1), st.text(alphabet='[]{}":,\\ud8a01\n\r\t ', min_size=1).map(str.encode)))
@example(raw=b"PAR1\0\0\0\0PAR1")
@example(raw=b"\xef\xbb\xbf")
@example(raw=b"\0")
@example(raw=b"[[[{}]]]")
def test_any_bytes_give_rows_or_a_data_error(suffix, raw, tmp_path):
    path = tmp_path / f"a{suffix}"
    for content in [raw, gzip.compress(raw), gzip.compress(raw)[:-9]] if suffix.endswith(".gz") else [raw]:
        path.write_bytes(content)
        rows, problems = rows_or_problems(str(path))
        assert bool(rows) != bool(problems)
        assert all(problem.what and problem.where and problem.fix for problem in problems)
        assert [row.number for row in rows] == list(range(1, len(rows) + 1))
        json.dumps([row.fields for row in rows], ensure_ascii=False).encode()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(alphabet="ab/.~#:@*[]?\\ \0-", max_size=12))
def test_any_name_gives_rows_or_a_data_error(name, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([{"a": 1}]))
    rows, problems = rows_or_problems(name)
    assert bool(rows) != bool(problems)
    assert all(problem.what and problem.where and problem.fix for problem in problems)
