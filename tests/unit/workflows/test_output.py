"""The output folder: one process at a time, and what a killed one leaves is known for its own."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from loralab.errors import RunFolderError
from loralab.run import RunFolder, write_json
from loralab.workflows.output import LOCK, check_output, claim_output, clear_run, sweep_leftovers

HOLDER = """
import sys, time
from pathlib import Path
from loralab.run import RunFolder
from loralab.workflows.output import claim_output
with claim_output(RunFolder(Path(sys.argv[1])), resume=False, overwrite=False):
    print("held", flush=True)
    time.sleep(60)
"""
LEFTOVERS = [".lock", ".run.json.123.tmp", ".config.yaml.7.tmp"]


def fill(path: Path, names: Sequence[str], *, status: str | None = None) -> RunFolder:
    path.mkdir()
    for name in names:
        (path / name).write_text("")
    if status is not None:
        write_json(path / "run.json", {"status": status})
    return RunFolder(path)


@pytest.fixture
def held(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the folder `run`."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_second_process_is_refused_and_a_killed_one_holds_nothing(held: subprocess.Popen[str], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    try:
        for resume, overwrite in ((False, False), (True, False), (False, True)):
            with (
                pytest.raises(RunFolderError, match=f"another process is writing .*: pid {held.pid}") as caught,
                claim_output(folder, resume=resume, overwrite=overwrite),
            ):
                pass
            assert caught.value.exit_code == 2
            assert len(str(caught.value).splitlines()) == 3
    finally:
        held.kill()
        held.wait()
    assert (folder.path / LOCK).is_file()
    for resume, overwrite in ((True, False), (False, True), (False, False)):
        with claim_output(folder, resume=resume, overwrite=overwrite):
            (folder.path / "kept").touch()
            (folder.path / LOCK).rename(folder.path / "kept")  # as if killed again
        (folder.path / "kept").rename(folder.path / LOCK)


def test_same_process_is_told_apart_too(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with claim_output(folder, resume=False, overwrite=False):
        with (
            pytest.raises(RunFolderError, match="another process is writing"),
            claim_output(folder, resume=False, overwrite=False),
        ):
            pass
        assert (folder.path / LOCK).is_file()
    assert not folder.path.exists()


def test_killed_warm_start_is_not_resumed_as_a_cold_one(tmp_path: Path) -> None:
    folder = fill(tmp_path / "run", [])
    (folder.path / LOCK).write_text("4194305\n/runs/source")
    with (
        pytest.raises(RunFolderError, match="warm start, and had recorded nothing yet: /runs/source") as caught,
        claim_output(folder, resume=True, overwrite=False),
    ):
        pass
    assert "--warm-start" in caught.value.problems[0].fix
    (folder.path / LOCK).write_text("4194305\n/runs/source")
    with claim_output(folder, resume=False, overwrite=False, start="/runs/other"):
        assert (folder.path / LOCK).read_text() == f"{os.getpid()}\n/runs/other"


@pytest.mark.parametrize("fails", [False, True])
def test_claim_leaves_nothing_of_its_own(fails: bool, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "deep" / "run")

    def claim() -> None:
        with claim_output(folder, resume=False, overwrite=False):
            assert (folder.path / LOCK).is_file()
            if fails:
                raise ZeroDivisionError

    if fails:
        with pytest.raises(ZeroDivisionError):
            claim()
    else:
        claim()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with claim_output(RunFolder(tmp_path / "mine"), resume=False, overwrite=False):
        pass
    assert (tmp_path / "mine").is_dir()


@pytest.mark.parametrize(
    ("names", "status", "plain", "resume", "overwrite"),
    [
        ([], None, True, False, True),
        (LEFTOVERS, None, True, True, True),
        ([".adapter-x1"], "starting", True, True, True),
        (["metrics.jsonl", "config.yaml"], "starting", True, True, True),
        ([], "running", False, True, True),
        ([], "failed", False, True, True),
        (["thesis.txt"], None, False, False, False),
        ([".lock", "thesis.txt"], None, False, False, False),
        ([".notes.12.tmp"], None, False, False, False),
    ],
)
def test_what_may_be_done_with_a_folder(
    names: list[str], status: str | None, plain: bool, resume: bool, overwrite: bool, tmp_path: Path
) -> None:
    folder = fill(tmp_path / "run", names, status=status)
    for allowed, options in (
        (plain, {"resume": False, "overwrite": False}),
        (resume, {"resume": True, "overwrite": False}),
        (overwrite, {"resume": False, "overwrite": True}),
    ):
        if allowed:
            check_output(folder, **options)
            continue
        with pytest.raises(RunFolderError):
            check_output(folder, **options)


def test_clearing_and_sweeping_touch_nothing_foreign(tmp_path: Path) -> None:
    foreign = ["thesis.txt", ".hidden", ".notes.12.tmp"]
    own = ["config.yaml", "data.json", "metrics.jsonl", "evaluation.json", "evaluation-train.json", "report.html"]
    folder = fill(tmp_path / "run", [*foreign, *own, *LEFTOVERS], status="completed")
    (folder.path / ".adapter-half").mkdir()
    (folder.path / ".adapter-half" / "file").touch()
    (folder.path / "trackers" / "tensorboard").mkdir(parents=True)  # of a run whose successor has no trackers
    sweep_leftovers(folder)
    names = {path.name for path in folder.path.iterdir()}
    assert names == {*foreign, *own, LOCK, "run.json", "trackers"}
    clear_run(folder, keep_record=True)
    assert {path.name for path in folder.path.iterdir()} == {*foreign, LOCK, "run.json"}
    clear_run(folder)
    assert {path.name for path in folder.path.iterdir()} == {*foreign, LOCK}
