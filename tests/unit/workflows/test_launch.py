"""What `loralab launch` starts, and what it says of how that ended."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from loralab.config.schema import Config
from loralab.errors import ConfigError, LoralabError, StoppedBySignal, WorkerError
from loralab.progress import Reporter
from loralab.workflows.launch import launch, resolve_processes
from loralab.workflows.machines import Machines


def config(device: str = "auto") -> Config:
    return Config.model_validate({"model": {"name": "base", "device": device}, "data": {"train": "rows.json"}})


@pytest.mark.parametrize(
    ("asked", "gpus", "device", "count", "reason"),
    [
        (None, 0, "auto", 1, "no GPU is visible"),
        (None, 4, "auto", 4, "one for each of 4 visible GPUs"),
        (None, 4, "cpu", 1, "model.device is cpu"),
        (3, 4, "auto", 3, "set by --num-processes"),
        (6, 4, "cpu", 6, "set by --num-processes"),
        (2, 0, "auto", 2, "set by --num-processes"),
    ],
)
def test_processes(
    asked: int | None, gpus: int, device: str, count: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    chosen = resolve_processes(asked, config(device))
    assert chosen.value == count
    assert chosen.reason.startswith(reason)


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ConfigError, match="3 processes for 2 visible GPUs"):
        resolve_processes(3, config())


def test_a_base_that_is_spread_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    sections = {"model": {"name": "base", "device_map": "auto"}, "data": {"train": "rows.json"}}
    spread = Config.model_validate(sections)
    assert resolve_processes(None, spread).value == 1
    with pytest.raises(ConfigError, match="device_map 'auto' in a run of 2 processes"):
        resolve_processes(2, spread)


_PROCESS = f"""#!{sys.executable}
import os, signal, sys, time
role, first = sys.argv[-1], os.environ["RANK"] == "0"
def end(code, *lines):
    print(*lines, sep="\\n", file=sys.stderr, flush=True)
    sys.exit(code)
def stop(seconds):
    def handle(number, _):
        time.sleep(seconds)
        end(128 + number, "error: stopped")
    signal.signal(signal.SIGINT, handle)
exec(os.environ["ROLES"])
open("ready" + os.environ["RANK"], "w").close()
time.sleep(60)
"""


Roles = Callable[..., tuple[int | LoralabError, list[str]]]


@pytest.fixture
def run_roles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Roles:
    """Return what launches two processes that do as they are told instead of training."""
    program = tmp_path / "process"
    program.write_text(_PROCESS)
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(program))
    monkeypatch.setattr("loralab.workflows.launch._GRACE_SECONDS", 0.5)

    def run(roles: str, *, sent: signal.Signals | None = None) -> tuple[int | LoralabError, list[str]]:
        monkeypatch.setenv("ROLES", roles)
        said: list[str] = []
        reporter = Reporter()
        monkeypatch.setattr(reporter, "say", said.append)

        def send() -> None:
            while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
                time.sleep(0.01)
            os.kill(os.getpid(), sent or 0)

        if sent is not None:
            threading.Thread(target=send, daemon=True).start()
        try:
            return launch(["train"], config(), processes=2, machines=Machines(), reporter=reporter), said
        except LoralabError as error:
            return error, said

    return run


def test_a_bug_of_another_process_is_shown(run_roles: Roles) -> None:
    code, said = run_roles("end(1, 'error: process 1 failed') if first else end(1, 'Traceback', 'KeyError: 3')")
    assert code == 1
    assert said[-2:] == ["[process 1] Traceback", "[process 1] KeyError: 3"]
    code, said = run_roles("end(1, 'Traceback') if first else end(1, 'error: process 0 failed')")
    assert (code, said[1:]) == (1, [])  # said by the one that it is about


def test_a_process_that_ends_before_the_others_have_met_it_is_named(run_roles: Roles) -> None:
    error, said = run_roles("first or end(2, 'error: no package', 'where: key', 'fix:   install it')")
    assert isinstance(error, WorkerError)
    assert (error.exit_code, error.problems[0].what) == (2, "process 1 of 2 ended with exit code 2")
    assert said[1:] == ["[process 1] error: no package", "[process 1] where: key", "[process 1] fix:   install it"]


def test_a_killed_process_is_named_and_not_those_that_were_ended_with_it(run_roles: Roles) -> None:
    for ending in ("", "signal.signal(signal.SIGTERM, lambda *_: end(143, 'error: stopped by SIGTERM'));"):
        error, _ = run_roles(f"{ending}first or os.kill(os.getpid(), signal.SIGKILL)")
        assert isinstance(error, WorkerError)
        assert error.problems[0].what == "process 1 was ended by SIGKILL"


def test_a_stop_takes_the_time_that_it_takes(run_roles: Roles) -> None:
    code, said = run_roles("stop(2 if first else 0)", sent=signal.SIGINT)
    assert (code, said[1:]) == (130, [])


def test_a_signal_that_comes_when_the_run_is_complete(run_roles: Roles) -> None:
    roles = "stop(0) if not first else signal.signal(signal.SIGINT, lambda *_: end(0, 'done'))"
    code, said = run_roles(roles, sent=signal.SIGINT)
    assert (code, said[1:]) == (0, [])


def test_a_signal_before_anybody_can_tell_of_it(run_roles: Roles) -> None:
    roles = "signal.signal(signal.SIGINT, signal.SIG_DFL)"
    error, _ = run_roles(roles, sent=signal.SIGINT)
    assert isinstance(error, StoppedBySignal)
    assert (error.exit_code, error.problems[0].what) == (130, "stopped by SIGINT")


def test_the_script_for_slurm_starts_one_launcher_on_each_machine(tmp_path: Path) -> None:
    """With stand-ins for SLURM's commands, which note what they are given."""
    programs = {
        "scontrol": "printf 'node7\\nnode8\\n'",
        "srun": 'echo "srun $1 $2"; shift 2; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "loralab": 'for each in "$@"; do printf "<%s>" "$each"; done; echo',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "40123", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "64"}
    script = Path(__file__).parents[3] / "docs" / "slurm" / "train.sbatch"
    done = subprocess.run(
        ["bash", script, "config.yaml", "training.seed=1", "data.train=my rows.json"],
        env={**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    given = "<launch><config.yaml><training.seed=1><data.train=my rows.json><--num-machines><2>"
    assert done.stdout.splitlines() == [
        "srun --kill-on-bad-exit=0 --cpus-per-task=64",
        f"{given}<--machine-rank><0><--main-address><node7:20123>",
        f"{given}<--machine-rank><1><--main-address><node7:20123>",
    ]
