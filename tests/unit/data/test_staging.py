"""Staging folders: gone when done, swept when their process died, left alone while it lives."""

import multiprocessing
import os
import stat
import time
from pathlib import Path

import pytest

from loralab.data.staging import staging_folder, sweep


def hold(parent: str) -> None:
    with staging_folder(Path(parent)) as staging:
        (staging / "half").write_text("x")
        time.sleep(600)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays(tmp_path: Path, fails: bool) -> None:
    def use() -> None:
        with staging_folder(tmp_path / "deep" / "cache") as staging:
            (staging / "x").write_text("x")
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            use()
    else:
        use()
    assert names(tmp_path / "deep" / "cache") == []


def test_renamed_folder_stays_where_it_went(tmp_path: Path) -> None:
    with staging_folder(tmp_path) as staging:
        (staging / "x").write_text("x")
        staging.rename(tmp_path / "done")
    assert names(tmp_path) == ["done"]
    assert names(tmp_path / "done") == ["x"]


def test_folders_of_dead_processes_are_swept_and_those_of_live_ones_are_not(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=hold, args=(str(tmp_path),)) for _ in range(2)]
    for process in processes:
        process.start()
    while len(list(tmp_path.glob("*/half"))) < 2:
        time.sleep(0.05)
    dead, alive = processes
    dead.kill()
    dead.join()
    try:
        assert len(names(tmp_path)) == 4  # each a folder and its lock
        with staging_folder(tmp_path) as own:
            assert own.name in names(tmp_path)
            sweep(tmp_path)
            left = [name for name in names(tmp_path) if not name.startswith(own.name)]
            assert left == [f".tokenizing-{alive.pid}-{left[0].split('-')[-1]}", f"{left[0]}.lock"]
        assert (tmp_path / left[0] / "half").is_file()
    finally:
        alive.kill()
        alive.join()
    sweep(tmp_path)
    assert names(tmp_path) == []


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with staging_folder(tmp_path / "cache") as staging:
            modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "cache", staging)]
    finally:
        os.umask(before)
    assert modes == [0o755, 0o755]
