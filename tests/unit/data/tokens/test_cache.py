"""The cache of tokenized rows: hits and misses by name, runs that were killed, entries that are damaged."""

import errno
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loralab.config.schema import DataConfig
from loralab.data.reading.rows import UnparsedRow
from loralab.data.reading.sources import Source, resolve_sources
from loralab.data.tokens import cache, identity, pipeline
from loralab.data.tokens.cache import cache_folder, load_or_tokenize
from loralab.data.tokens.identity import describe_entry, entry_key
from loralab.data.tokens.pipeline import RowTokenizer
from loralab.data.tokens.store import ARRAYS, MANIFEST, TokenStore
from loralab.data.tokens.store_writer import PROGRESS
from loralab.data.tokens.tokenize import TokenizeSettings
from loralab.errors import DataError, MaskError, StorageError, WorkerError
from loralab.progress import Reporter
from support import tiny
from unit.data.prompters import CHATML, NO_PICTURES, build_prompter
from unit.data.stores import plain

ROWS = 40


class Notes(Reporter):
    """Keeps what is said, and does something at each report of progress."""

    def __init__(self, on_progress: Callable[[int], None] = lambda rows: None) -> None:
        self.lines: list[str] = []
        self.details: list[str] = []
        self.on_progress = on_progress

    def say(self, text: str) -> None:
        self.lines.append(text.removeprefix("rows: "))

    def progress(self, label: str, done: int, total: int | None, *, detail: str = "") -> None:
        assert (label, total) == ("rows", None)
        self.details.append(detail)
        self.on_progress(done)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "rows").mkdir()
    return tiny.write_rows(tmp_path / "rows" / "a.json", tiny.alpaca_rows(ROWS))


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "CHUNK_ROWS", 3)
    monkeypatch.setattr(cache, "COMMIT_SECONDS", 0.0)


def build_worker(template: str | None = None, *, on_bad_row: Any = "error", **chosen: Any) -> RowTokenizer:
    values: dict[str, Any] = {"train_on": "response", "max_length": 64, "truncation": "right", "long_text": "split"}
    prompter = build_prompter(*([template] if template else []))
    return RowTokenizer(prompter, "alpaca", {}, TokenizeSettings(**values | chosen), on_bad_row, NO_PICTURES)


def load(
    path: Path, notes: Reporter, *, sources: list[Source] | None = None, workers: int = 0, **chosen: Any
) -> tuple[TokenStore, dict[str, Any]]:
    sources = sources or resolve_sources(str(path), where="key data.train")
    data = DataConfig(train=str(path), cache_dir=str(folder_of(path)), num_workers=workers)
    tokenizers = chosen.pop("tokenizers", None) or [build_worker(**chosen)] * len(sources)
    return load_or_tokenize(sources, tokenizers, data=data, label="rows", reporter=notes)


def folder_of(path: Path) -> Path:
    return path.parent.parent / "cache"


def entries(path: Path) -> list[Path]:
    return sorted(folder_of(path).iterdir())


def without_locks(found: list[Path]) -> list[Path]:
    """Leave out the empty lock files that a kill may leave behind, as it may the progress file of a whole entry."""
    return [entry for entry in found if entry.suffix != ".lock"]


def contents(path: Path) -> dict[str, bytes]:
    (entry,) = without_locks(entries(path))
    return {file.name: file.read_bytes() for file in entry.iterdir() if file.name != PROGRESS}


@pytest.fixture
def whole(path: Path, tmp_path: Path) -> dict[str, bytes]:
    """What an undisturbed run writes, in a cache of its own."""
    twin = tmp_path / "twin" / "rows" / "a.json"
    twin.parent.mkdir(parents=True)
    twin.write_bytes(path.read_bytes())
    load(twin, Reporter())
    return contents(twin)


def test_first_run_is_a_miss_and_the_second_a_hit(path: Path) -> None:
    first, second = Notes(), Notes()
    store, report = load(path, first)
    again, same = load(path, second)
    assert first.lines[0] == "cache miss: nothing is cached yet for these rows"
    assert first.lines[1].startswith(f"tokenized {ROWS} rows in ")
    assert first.lines[1].endswith(" rows/s, 1 process")
    assert all(detail.endswith(" rows/s") for detail in first.details)
    assert len(first.lines) == 2
    (entry,) = entries(path)
    assert {file.name for file in entry.iterdir()} == {*ARRAYS, MANIFEST}
    (line,) = second.lines
    assert line.startswith(
        f"cache hit ({entry.name[:12]}: same rows, format, columns, on_bad_row, train_on, max_length"
    )
    assert all(name in line for name in ("template", "tokenizer", "stop_tokens", "code", "transformers"))
    assert second.details == []
    assert [plain(example) for example in store] == [plain(example) for example in again]
    assert report == same == {"rows": ROWS, "units": ROWS, "dropped": [], "systems": {}, "systems_without": ROWS}


def test_processes_are_named_and_change_nothing(path: Path, whole: dict[str, bytes]) -> None:
    notes = Notes()
    load(path, notes, workers=2)
    assert notes.lines[1].endswith(" rows/s, 2 processes")
    assert contents(path) == whole


def test_a_miss_names_what_differs_from_the_nearest_entry(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(**chosen: Any) -> str:
        notes = Notes()
        load(path, notes, **chosen)
        return notes.lines[0]

    def nearest(*left_out: Path) -> str:
        (entry,) = set(entries(path)) - {*left_out}
        return f"cache miss: the nearest entry of these rows ({entry.name[:12]}) differs in "

    load(path, Reporter())
    first, near_first = entries(path)[0], nearest()
    assert said(max_length=32) == f"{near_first}max_length (64 there, 32 here)"
    near_second = nearest(first)  # now both differ in two; the latest is named
    assert said(on_bad_row="drop", max_length=16) == (
        f"{near_second}on_bad_row (error there, drop here), max_length (32 there, 16 here)"
    )
    assert said(template=CHATML).startswith(f"{near_first}template, stop_tokens (")
    monkeypatch.setattr(identity, "code_version", lambda: "another hash, much longer than what is shown")
    assert said() == f"{near_first}code"


def test_entries_of_other_rows_and_damaged_ones_are_not_near(path: Path) -> None:
    load(path, Reporter())
    for file in entries(path)[0].glob("manifest*"):
        file.write_text("{")
    notes = Notes()
    load(path, notes, max_length=32)
    assert notes.lines[0] == "cache miss: nothing is cached yet for these rows"
    tiny.write_rows(path, tiny.alpaca_rows(ROWS, seed=1))
    notes = Notes()
    load(path, notes, max_length=32)
    assert notes.lines[0] == "cache miss: nothing is cached yet for these rows"


def test_each_source_has_its_own_tokenizer(path: Path) -> None:
    text = tiny.write_rows(path.with_name("b.json"), [{"text": "red"}, {"text": ""}, {"text": "blue cat"}])
    sources = resolve_sources([str(path), str(text)], where="key data.train")
    worker = build_worker()
    tokenizers = [worker, RowTokenizer(worker.prompter, "text", {}, worker.settings, "error", NO_PICTURES)]
    store, report = load(path, Reporter(), sources=sources, tokenizers=tokenizers)
    assert store.origins.tolist() == [[0, row] for row in range(1, ROWS + 1)] + [[1, 1], [1, 3]]
    assert report["dropped"] == [[ROWS + 1, 1, 2, "empty_text"]]
    assert (report["rows"], report["units"]) == (ROWS + 3, ROWS + 3)
    swapped = describe_entry(sources, tokenizers[::-1])
    assert entry_key(swapped) != entry_key(describe_entry(sources, tokenizers))
    assert swapped["format"] == "text, alpaca"


class Stop(BaseException):
    """Ends a run as Ctrl-C or a signal does."""


def stop_at(rows: int) -> Callable[[int], None]:
    def check(done: int) -> None:
        if done >= rows:
            raise Stop

    return check


def test_a_stopped_run_is_taken_up_where_it_was(path: Path, whole: dict[str, bytes]) -> None:
    (source,) = resolve_sources(str(path), where="key data.train")
    starts = []

    def read(start: int) -> Iterator[UnparsedRow]:
        starts.append(start)
        return source.read(start)

    sources = [Source(source.name, source.fingerprint, read)]
    for rows in (12, 30):
        with pytest.raises(Stop):
            load(path, Notes(stop_at(rows)), sources=sources)
    assert [entry.name for entry in entries(path)] == [
        f".partial-{entry_key(describe_entry(sources, [build_worker()]))}{end}" for end in ("", ".lock")
    ]
    notes = Notes()
    load(path, notes, sources=sources)
    assert starts == [0, 12, 30]
    assert notes.lines[1] == f"going on at row 31 of {path}, as far as an earlier run had come"
    assert notes.lines[2].startswith(f"tokenized {ROWS - 30} rows in ")
    assert contents(path) == whole


def test_what_is_not_committed_is_read_again(
    path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Stop):
        load(path, Notes(stop_at(9)))
    monkeypatch.setattr(cache, "COMMIT_SECONDS", 1e9)
    notes = Notes(stop_at(33))
    with pytest.raises(Stop):
        load(path, notes)
    notes = Notes()
    load(path, notes)
    assert "going on at row 10 of " in notes.lines[1]
    assert contents(path) == whole


def test_a_run_that_stops_before_its_first_commit_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "COMMIT_SECONDS", 1e9)
    with pytest.raises(Stop):
        load(path, Notes(stop_at(33)))
    assert entries(path) == []


def test_another_setting_does_not_take_up_what_was_stopped(path: Path, whole: dict[str, bytes]) -> None:
    with pytest.raises(Stop):
        load(path, Notes(stop_at(12)), max_length=32)
    notes = Notes()
    load(path, notes)
    assert not any("going on" in line for line in notes.lines)
    assert [entry.name.startswith(".partial-") for entry in entries(path)] == [True, True, False]


def load_and_die(path: Path, event: int, workers: int) -> None:
    """Load, and end this process without a word at the n-th change of a file in the cache."""
    left = event

    def count(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if name in ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "os.rmdir", "shutil.rmtree"):
            left -= str(folder_of(path)) in str(arguments[0])
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    load(path, Reporter(), workers=workers)


def killed(path: Path, event: int, *, workers: int = 0) -> bool:
    """Return whether a run was killed, or came to its end."""
    child = multiprocessing.get_context("fork").Process(target=load_and_die, args=(path, event, workers))
    child.start()
    child.join(120)
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_is_killed_again_and_again_comes_to_its_end(
    path: Path, whole: dict[str, bytes], workers: int
) -> None:
    draw = random.Random(workers)
    kills = 0
    while killed(path, draw.randint(18, 38), workers=workers):
        kills += 1
        assert kills < 60
    assert kills > 2
    load(path, Reporter())
    assert contents(path) == whole


def test_a_kill_at_any_change_of_a_file_is_harmless(path: Path, whole: dict[str, bytes]) -> None:
    for event in itertools.count(1, 4):
        shutil.rmtree(folder_of(path), ignore_errors=True)
        if not killed(path, event):
            break
        load(path, Reporter())
        assert contents(path) == whole
    assert event > 40


@pytest.mark.parametrize("name", [*ARRAYS, "progress.json"])
def test_a_damaged_beginning_is_said_and_made_again(path: Path, whole: dict[str, bytes], name: str) -> None:
    with pytest.raises(Stop):
        load(path, Notes(stop_at(12)))
    file = entries(path)[0] / name
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:] if content else b"")
    notes = Notes()
    load(path, notes)
    said = f"what an earlier run left is damaged ({name} is "
    assert any(line.startswith(said) for line in notes.lines) == bool(content)  # no row was dropped
    assert contents(path) == whole


def test_second_process_waits_for_the_first_and_takes_its_rows(path: Path, whole: dict[str, bytes]) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def pause(_: int) -> None:
        begun.set()
        assert go_on.wait(60)

    class Second(Notes):
        def say(self, text: str) -> None:
            super().say(text)
            if "waiting" in text:
                go_on.set()

    first, second = Notes(pause), Second()
    thread = threading.Thread(target=load, args=(path, first))  # a lock of its own: it is the open file's
    thread.start()
    assert begun.wait(60)
    store, _ = load(path, second)
    thread.join()
    assert second.lines[1] == "another process is tokenizing these rows; waiting for it"
    assert second.lines[2].startswith("taken from another process (")
    assert second.details == []
    assert len(store) == ROWS
    assert contents(path) == whole


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("tokens.bin", lambda raw: raw[:-5], "bytes, "),
        ("tokens.bin", lambda raw: bytes([raw[0] ^ 1]) + raw[1:], "tokens.bin is not what was written"),
        ("examples.bin", lambda raw: raw[:-1] + b"\x09", "examples.bin is not what was written"),
        ("branches.bin", lambda raw: b"", "branches.bin has 0 bytes"),
        ("manifest.json", lambda raw: raw[:-5], "manifest.json is damaged"),
        ("manifest.json", lambda raw: raw.replace(b'"rows": 40', b'"rows": 41'), "manifest.json is damaged"),
    ],
)
def test_a_damaged_entry_is_said_and_made_again(
    path: Path, whole: dict[str, bytes], name: str, damage: Callable[[bytes], bytes], said: str
) -> None:
    load(path, Reporter())
    (entry,) = entries(path)
    content = (entry / name).read_bytes()
    (entry / name).write_bytes(damage(content))
    assert (entry / name).read_bytes() != content
    notes = Notes()
    load(path, notes)
    assert notes.lines[0].startswith(f"the cached tokens {entry.name[:12]} are damaged (")
    assert said in notes.lines[0]
    assert notes.lines[0].endswith("); they are made again")
    assert contents(path) == whole


def test_rows_that_cannot_be_used_leave_nothing(path: Path) -> None:
    tiny.write_rows(path, [*tiny.alpaca_rows(20), {"instruction": "a", "output": 5}])
    with pytest.raises(DataError, match="field 'output' is int"):
        load(path, Reporter())
    assert entries(path) == []


def test_file_that_changes_before_it_is_read_is_not_kept_under_its_old_name(path: Path) -> None:
    before = path.read_bytes()

    class Changing(Reporter):
        def say(self, text: str) -> None:
            if "cache miss" in text:
                tiny.write_rows(path, tiny.alpaca_rows(ROWS, seed=1))

    with pytest.raises(DataError, match="the file changed while it was read"):
        load(path, Changing())
    assert entries(path) == []
    path.write_bytes(before)
    notes = Notes()
    load(path, notes)
    assert notes.lines[0] == "cache miss: nothing is cached yet for these rows"


def test_file_that_is_gone_after_it_was_read_is_no_source(path: Path) -> None:
    with pytest.raises(DataError, match="the file changed while it was read"):
        load(path, Notes(lambda _: path.unlink(missing_ok=True)))


def test_a_failed_proof_leaves_nothing(path: Path) -> None:
    tiny.write_rows(path, [*tiny.alpaca_rows(20), {"instruction": "a", "output": "b" * 4}])
    # Heads the answer of the last row alone, so that twenty rows have been committed before.
    header = "{{ m.role if m.role == 'assistant' and 'bbbb' in m.content }}"
    with pytest.raises(MaskError, match="no generation prompt") as caught:
        load(path, Reporter(), template=f"{{% for m in messages %}}{header}{{{{ m.content }}}}\n{{% endfor %}}")
    assert "row 21" in caught.value.problems[0].where
    assert entries(path) == []


def test_a_killed_worker_process_costs_only_its_rows(path: Path, whole: dict[str, bytes]) -> None:
    def kill_workers(done: int) -> None:
        if done > 5:
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGKILL)
            time.sleep(0.1)

    with pytest.raises(WorkerError):
        load(path, Notes(kill_workers), workers=2)
    notes = Notes()
    load(path, notes)
    assert "going on at row " in notes.lines[1]
    assert contents(path) == whole


@pytest.mark.parametrize(
    ("number", "function", "what", "fix"),
    [
        (errno.EACCES, "find_damage", "cannot read tokenized data that another user wrote", "chmod -R a+rX"),
        (errno.EACCES, "StoreWriter", "cannot write tokenized data: Permission denied", "a folder that you may write"),
        (errno.ENOSPC, "StoreWriter", "cannot write tokenized data: No space left", "free space there"),
    ],
)
def test_cache_that_cannot_be_used(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, function: str, what: str, fix: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    if function == "find_damage":
        load(path, Reporter())
    monkeypatch.setattr(cache, function, refuse)
    with pytest.raises(StorageError, match=what) as caught:
        load(path, Reporter())
    assert fix in caught.value.problems[0].fix


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(DataConfig(train="f")) == tmp_path / "loralab" / "tokenized"
    assert cache_folder(DataConfig(train="f", cache_dir="~/x")) == Path("~/x").expanduser()


def test_no_home_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "~nosuchuser/x")
    with pytest.raises(StorageError, match="no home folder"):
        cache_folder(DataConfig(train="f"))
    assert cache_folder(DataConfig(train="f", cache_dir="c")) == Path("c")
