"""Unfinished folders: locked while somebody writes, found again afterwards, swept when nobody came back."""

import errno
import fcntl
import multiprocessing
import os
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from loralab.data.tokens import staging
from loralab.data.tokens.staging import KEPT_SECONDS, partial_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def never() -> None:
    pytest.fail("waited for nobody")


def hold(parent: str) -> None:
    with partial_folder(Path(parent), "key", on_wait=never) as folder:
        folder.mkdir()
        (folder / "half").write_text("x")
        time.sleep(600)


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process that writes the entry `key`."""
    process = multiprocessing.get_context("fork").Process(target=hold, args=(str(tmp_path),))
    process.start()
    while not list(tmp_path.glob("*/half")):
        time.sleep(0.02)
    yield process
    process.kill()
    process.join()


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_written_stays_for_the_next(tmp_path: Path, fails: bool) -> None:
    def write() -> None:
        with partial_folder(tmp_path / "deep" / "cache", "key", on_wait=never) as folder:
            assert not folder.exists()
            folder.mkdir()
            (folder / "x").write_text("x")
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            write()
    else:
        write()
    assert names(tmp_path / "deep" / "cache") == [".partial-key", ".partial-key.lock"]
    with partial_folder(tmp_path / "deep" / "cache", "key", on_wait=never) as folder:
        assert names(folder) == ["x"]
    with partial_folder(tmp_path / "deep" / "cache", "other", on_wait=never) as folder:
        assert not folder.exists()


@pytest.mark.parametrize("makes", [True, False])
def test_nothing_stays_of_what_was_finished_or_never_begun(tmp_path: Path, makes: bool) -> None:
    with partial_folder(tmp_path, "key", on_wait=never) as folder:
        if makes:
            folder.mkdir()
            folder.rename(tmp_path / "key")
    assert names(tmp_path) == (["key"] if makes else [])


def test_second_process_waits_for_the_first(tmp_path: Path, holder: Any) -> None:
    waited: list[float] = []

    def on_wait() -> None:
        waited.append(time.monotonic())
        threading.Timer(0.5, holder.kill).start()

    with partial_folder(tmp_path, "key", on_wait=on_wait) as folder:
        assert not holder.is_alive()  # killed, and its lock went with it
        assert names(folder) == ["half"]
    assert len(waited) == 1


def test_other_entries_do_not_wait(tmp_path: Path, holder: Any) -> None:
    with partial_folder(tmp_path, "other", on_wait=never):
        assert holder.is_alive()


def make_old(folder: Path) -> None:
    long_ago = time.time() - KEPT_SECONDS - 60
    for path in (folder.with_name(f"{folder.name}.lock"), folder, *(folder.iterdir() if folder.is_dir() else ())):
        if path.exists():
            os.utime(path, (long_ago, long_ago))


def test_old_folders_are_swept_unless_somebody_writes_there(tmp_path: Path, holder: Any) -> None:
    for name in ("young", "old", "bare", "touched"):
        folder = tmp_path / f".partial-{name}"
        folder.mkdir()
        (folder / "progress.json").write_text("{}")
        if name != "bare":
            (tmp_path / f".partial-{name}.lock").touch()
    (tmp_path / ".partial-alone.lock").touch()
    (tmp_path / "entry").mkdir()
    for name in (".partial-old", ".partial-bare", ".partial-touched", ".partial-alone", ".partial-key", "entry"):
        make_old(tmp_path / name)
    os.utime(tmp_path / ".partial-touched" / "progress.json")
    with partial_folder(tmp_path, "new", on_wait=never):
        pass
    kept = {name.removesuffix(".lock") for name in names(tmp_path)}
    assert kept == {".partial-young", ".partial-touched", ".partial-key", "entry"}
    assert holder.is_alive()


def test_without_locks_the_place_is_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        partial_folder(tmp_path, "key", on_wait=never) as first,
        partial_folder(tmp_path, "key", on_wait=never) as second,
    ):
        assert first != second
        first.mkdir()
        second.mkdir()
        second.rename(tmp_path / "key")
    assert names(tmp_path) == ["key"]


def test_without_the_module_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "fcntl", None)
    with partial_folder(tmp_path, "key", on_wait=never) as folder:
        folder.mkdir()
    assert names(tmp_path) == []


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with partial_folder(tmp_path / "cache", "key", on_wait=never):
            assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o755
    finally:
        os.umask(before)
