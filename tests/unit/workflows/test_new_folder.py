"""A folder appears whole or not at all, and nothing stays beside it."""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from loralab.errors import ConfigError, LoralabError, RunFolderError, StoppedBySignal, StorageError
from loralab.workflows.new_folder import check_free, new_folder


def make(output: Path, work: Callable[[Path], None]) -> None:
    with new_folder(output, work="merging") as (kept, _):
        work(kept)


def test_it_gets_its_name_when_all_went_well(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "er" / "out", work="merging") as (kept, scratch):
        (kept / "file").write_text("whole")
        (scratch / "other").write_text("not kept")
        assert not (tmp_path / "deep" / "er" / "out").exists()
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "deep" / "er" / "out").iterdir()] == ["file"]


def test_a_failure_leaves_nothing_not_even_the_folders_above(tmp_path: Path) -> None:
    def fill(kept: Path) -> None:
        (kept / "file").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        make(tmp_path / "deep" / "er" / "out", fill)
    assert list(tmp_path.iterdir()) == []


def test_a_place_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="cannot write"):
        make(tmp_path / "file" / "out", lambda _: None)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("dropped", [False, True])
def test_a_signal_ends_the_work_and_leaves_nothing(tmp_path: Path, number: signal.Signals, dropped: bool) -> None:
    """Also where the interrupt is lost on its way, as in an object's own end."""
    before = signal.getsignal(number)

    def stop(kept: Path) -> None:
        (kept / "file").write_text("half")
        with contextlib.suppress(KeyboardInterrupt) if dropped else contextlib.nullcontext():
            os.kill(os.getpid(), number)

    with pytest.raises(StoppedBySignal) as caught:
        make(tmp_path / "out", stop)
    assert caught.value.exit_code == 128 + number
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("work", ["merging", "exporting"])
def test_what_killed_work_left_goes_and_what_still_runs_stays(tmp_path: Path, work: str) -> None:
    left, running = tmp_path / f".out.{work}-99999999", tmp_path / f".out.{work}-{os.getppid()}"
    for each in (left, running):
        each.mkdir()
        (each / "model.safetensors").write_text("half")
    with new_folder(tmp_path / "out", work=work):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [running.name, "out"]


def test_another_one_that_took_the_place_meanwhile_stays(tmp_path: Path) -> None:
    def take(_: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("theirs")

    with pytest.raises(RunFolderError, match="is already there"):
        make(tmp_path / "out", take)
    assert (tmp_path / "out" / "file").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder", "link", "inside", "itself"])
def test_places_that_are_taken_or_read(tmp_path: Path, kind: str) -> None:
    read = tmp_path / "read"
    read.mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    place = {"inside": read / "out", "itself": read}.get(kind, tmp_path / kind)
    expected: type[LoralabError] = ConfigError if kind in ("inside", "itself") else RunFolderError
    with pytest.raises(expected, match="option --output"):
        check_free(place, [read])
