"""The run folder: atomic writes, and reading what a kill or a hand has damaged."""

import hashlib
import os
from pathlib import Path

import pytest

from loralab.errors import RunFolderError
from loralab.run import (
    RunFolder,
    file_sha256,
    open_run,
    read_json,
    read_metrics,
    replace_folder,
    replacing,
    write_json,
    write_text,
)


def test_json_round_trip_keeps_unicode_readable(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"ü": ["世", 1.5, None]})
    assert read_json(path) == {"ü": ["世", 1.5, None]}
    assert "世" in path.read_text(encoding="utf-8")


def test_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing file: a.json"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
    ],
)
def test_read_json_errors(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RunFolderError, match=message) as caught:
        read_json(path)
    assert str(tmp_path) in caught.value.problems[0].where


def test_no_file_takes_the_place_of_a_device_or_folder(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    for path in (pipe, tmp_path / "link"):
        with pytest.raises(FileExistsError, match="neither a file nor a new name"):
            write_text(path, "new")
    for path in (tmp_path, Path()):
        with pytest.raises(IsADirectoryError):
            write_text(path, "new")
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(RunFolderError, match=r"cannot read a\.json: Is a directory"):
        read_json(tmp_path / "a.json")


def test_metrics_leave_out_a_last_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_metrics_damaged_in_the_middle_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match="line 2 is not valid JSON"):
        read_metrics(path)


def test_open_run_needs_a_record(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no such folder"):
        open_run(tmp_path / "gone")
    with pytest.raises(RunFolderError, match=r"not a run folder \(it has no run.json\)"):
        open_run(tmp_path)
    write_json(tmp_path / "run.json", {})
    assert open_run(tmp_path) == RunFolder(tmp_path)


def test_every_file_of_a_run_has_its_own_place(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    names = [name for name, value in vars(RunFolder).items() if isinstance(value, property)]
    places = [getattr(folder, name) for name in names]
    assert len(set(places)) == len(names) > 9
    assert all(place.parent == tmp_path for place in places)


def test_file_sha256_is_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\x00\xffabc")
    assert file_sha256(path) == hashlib.sha256(b"\x00\xffabc").hexdigest()


@pytest.mark.parametrize("there", [True, False])
def test_folder_is_replaced_as_a_whole(tmp_path: Path, there: bool) -> None:
    folder, made = tmp_path / "folder", tmp_path / ".made"
    if there:
        folder.mkdir()
        (folder / "old").write_text("old", encoding="utf-8")
    made.mkdir()
    (made / "new").write_text("new", encoding="utf-8")
    replace_folder(made, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_folder_that_cannot_be_replaced_is_still_there(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_text("old", encoding="utf-8")
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "missing", folder)
    assert (folder / "old").is_file()


def test_the_adapter_of_a_run_leads_to_the_run(tmp_path: Path) -> None:
    write_json(tmp_path / "run" / "run.json", {})
    (tmp_path / "run" / "adapter").mkdir()
    with pytest.raises(RunFolderError) as caught:
        open_run(tmp_path / "run" / "adapter")
    (problem,) = caught.value.problems
    assert problem.fix.endswith(f"wrote: {str(tmp_path / 'run')!r}")
