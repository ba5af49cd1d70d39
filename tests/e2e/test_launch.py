"""`loralab launch`: several processes that a user starts, stops and loses as one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support import tiny
from support.command import Answer, read_problems, run_watched, start, write_config

_LIMIT_SECONDS = 180.0


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long run with checkpoints, which a test cuts short or stops."""
    folder = tmp_path_factory.mktemp("world")
    base, rows = tiny.save_base(folder / "base"), tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(24))
    training = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 400}
    sections: dict[str, dict[str, Any]] = {"data": {"validation": None}, "training": training}
    return write_config(folder / "config.yaml", tiny.run_config(base, rows, folder / "run", **sections))


def finish(process: subprocess.Popen[str]) -> Answer:
    out, err = process.communicate(timeout=_LIMIT_SECONDS)
    return Answer(process.returncode, out, err)


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0


def wait_for_steps(process: subprocess.Popen[str], run: Path) -> None:
    end = time.monotonic() + _LIMIT_SECONDS
    while lines(run) < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def children(process: subprocess.Popen[str]) -> dict[int, int]:
    """Return the launcher's worker processes: process id by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if f"LORALAB_LAUNCHER={process.pid}".encode() in variables:
            rank = next(v for v in variables if v.startswith(b"RANK=")).partition(b"=")[2]
            found[int(rank)] = int(path.parent.name)
    return found


def gone(pids: dict[int, int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


def test_one_interrupt_writes_one_checkpoint(config: Path, tmp_path: Path) -> None:
    """Of a base in parts, where a process that ended alone would leave the other one waiting."""
    run, parts = tmp_path / "run", "training.distributed=fsdp2"
    process = start("launch", config, f"output.dir={run}", parts, "--num-processes", 2, folder=tmp_path)
    wait_for_steps(process, run)
    process.send_signal(signal.SIGINT)
    answer = finish(process)
    assert answer.code == 130, answer.err
    assert answer.err.count("error: ") == 1
    assert "stopped by SIGINT" in answer.err
    assert "Traceback" not in answer.err
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert (record["status"], record["processes"]) == ("interrupted", 2)
    assert record["resolved"]["distributed"]["value"] == "fsdp2"
    assert list((run / "checkpoints").glob("checkpoint-*/manifest.json"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_named_and_takes_the_others_along(rank: int, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("launch", config, f"output.dir={run}", "--num-processes", 2, folder=tmp_path)
    wait_for_steps(process, run)
    workers = children(process)
    os.kill(workers[rank], signal.SIGKILL)
    answer = finish(process)
    assert answer.code == 2, answer.err
    assert f"process {rank} was ended by SIGKILL" in answer.err
    assert answer.err.count("error: ") == 1
    assert "Traceback" not in answer.err
    assert gone(workers)


@pytest.mark.slow
def test_processes_end_when_the_launcher_is_killed(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("launch", config, f"output.dir={run}", "--num-processes", 2, folder=tmp_path)
    wait_for_steps(process, run)
    workers = children(process)
    process.kill()
    _, said = process.communicate()  # ends once nobody holds its output any more
    assert "frame #" not in said  # what torch says of a store that is gone
    assert said.count("error: ") == 1
    assert f"loralab launch {run / 'config.yaml'} --resume --num-processes 2" in said
    end = time.monotonic() + _LIMIT_SECONDS
    while not gone(workers):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "interrupted"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow
def test_two_machines_make_one_run(config: Path, tmp_path: Path) -> None:
    options = ["training.num_train_epochs=1", "--num-processes", 1, "--num-machines", 2]
    options += ["--main-address", f"127.0.0.1:{free_port()}"]
    machines = [
        start("launch", config, f"output.dir={tmp_path / 'run'}", *options, "--machine-rank", rank, folder=tmp_path)
        for rank in (1, 0)
    ]
    answers = [finish(process) for process in machines]
    assert [answer.code for answer in answers] == [0, 0], [answer.err for answer in answers]
    assert answers[1].out == f"{tmp_path / 'run'}\n"
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert (record["status"], record["processes"]) == ("completed", 2)


def test_machines_with_other_settings_are_refused(config: Path, tmp_path: Path) -> None:
    options = ["--num-processes", 1, "--num-machines", 2, "--main-address", f"127.0.0.1:{free_port()}"]
    machines = [
        start("launch", config, f"training.seed={rank}", *options, "--machine-rank", rank, folder=tmp_path)
        for rank in (0, 1)
    ]
    problems = [read_problems(finish(process))[0] for process in machines]
    assert all("another value of the configuration or its overrides" in problem.what for problem in problems)


def test_errors_of_the_configuration_start_nothing_and_need_no_torch(config: Path, tmp_path: Path) -> None:
    answer = run_watched("launch", config, "training.distributed=zero9", "--num-processes", 2, folder=tmp_path)
    assert read_problems(answer)[0].where.endswith("training.distributed")
    assert answer.imported == []


def test_help_needs_no_torch(tmp_path: Path) -> None:
    answer = run_watched("launch", "--help", folder=tmp_path)
    assert answer.code == 0
    assert "--num-machines" in answer.out
    assert answer.imported == []


@pytest.mark.slow
def test_json_goes_through(config: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "loralab.cli", "launch", str(config), f"output.dir={tmp_path / 'run'}"),
            *("training.num_train_epochs=1", "--num-processes", "1", "--json"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "completed"
