"""`loralab sweep`, killed and taken up again: the table of the uninterrupted sweep."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import loralab
from loralab.errors import RunFolderError
from loralab.progress import Reporter
from loralab.workflows.sweep import Search, sweep
from support import tiny
from support.command import write_config

TIMES = ("train_seconds", "peak_memory_bytes")
SIX = ("--grid", "lora.r=2,4,8", "training.learning_rate=1e-2,1e-1")


@dataclass(frozen=True)
class World:
    """A configuration in a folder."""

    folder: Path

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "loralab.cli", "sweep", "tiny.yaml", *arguments],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "COLUMNS": "160", "NO_COLOR": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, err = process.communicate()
        return process.returncode, out, err

    def runs(self, output: str) -> list[dict[str, Any]]:
        path = self.folder / output / "sweep.json"
        return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []

    def table(self, output: str) -> list[dict[str, Any]]:
        return [{key: value for key, value in run.items() if key not in TIMES} for run in self.runs(output)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base, rows = tiny.save_base(folder / "base"), tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(40))
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    values = tiny.run_config(base, rows, folder / "none", data={"validation": 8}, training=steps)
    write_config(folder / "tiny.yaml", values | {"output": {}})
    return World(folder)


def wait(process: subprocess.Popen[str], until: Callable[[], bool]) -> None:
    """Wait until something has come about, or the process has ended."""
    while process.poll() is None and not until():
        time.sleep(0.01)


def test_a_sweep_that_is_killed_and_stopped_goes_on(world: World) -> None:
    """The first of two runs gives the adapter of a run by itself; the last fails, which ends no sweep."""
    arguments = ("--grid", "lora.target_modules=[q_proj],[nowhere]", "--output", "out")
    run = world.folder / "out/001-target_modules_q_proj"
    killed = world.start(*arguments)
    wait(killed, lambda: any(run.glob("checkpoints/checkpoint-*")))
    killed.kill()
    killed.communicate()

    stopped = world.start(*arguments)
    wait(stopped, lambda: [each["status"] for each in world.runs("out")] == ["running", "pending"])
    wait(stopped, lambda: any(children(stopped)))
    stopped.send_signal(signal.SIGINT)
    _, err = stopped.communicate()
    assert stopped.returncode == 130, err
    assert [each["status"] for each in world.runs("out")] == ["interrupted", "pending"]

    code, out, err = world.run(*arguments, "--json")
    assert code == 2, err
    assert "1 of 2 runs have no result: 002" in err
    assert "--retry-failed" in err
    assert [each["status"] for each in json.loads(out)["runs"]] == ["completed", "failed"]
    assert "nowhere" in world.runs("out")[1]["reason"]
    assert (world.folder / "out/sweep.html").is_file()

    alone = world.folder / "alone"
    settings = {"lora": {"target_modules": ["q_proj"]}, "evaluation": {"split": "validation"}}
    loralab.train(world.folder / "tiny.yaml", output={"dir": str(alone)}, **settings)
    record = json.loads((alone / "run.json").read_text(encoding="utf-8"))
    evaluation = json.loads((alone / "evaluation.json").read_text(encoding="utf-8"))
    assert world.runs("out")[0]["adapter_sha256"] == record["adapter_sha256"]
    assert world.runs("out")[0]["metric"] == evaluation["eval_loss"]

    another = Search(world.folder / "tiny.yaml", ["lora.r=4,8"], output=world.folder / "out")
    with pytest.raises(RunFolderError, match="holds another sweep"):
        sweep(another, reporter=Reporter())


@pytest.fixture(scope="module")
def whole(world: World) -> World:
    """The world, with a whole sweep of six runs in it."""
    assert world.run(*SIX, "--output", "six")[0] == 0
    return world


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children()
    except psutil.NoSuchProcess:
        return []


def begun(world: World, output: str) -> int:
    return len(list((world.folder / output).glob("0*/run.json")))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_six_runs_of_a_sweep_that_is_killed_twice_at_random(whole: World, seed: int) -> None:
    output, draw = f"killed-{seed}", random.Random(seed)
    for kill in range(2):
        process = whole.start(*SIX, "--output", output)
        wait(process, lambda kill=kill: begun(whole, output) > 2 * kill)
        time.sleep(draw.uniform(0, 6))
        process.kill()
        process.communicate()
    assert [run["status"] for run in whole.runs(output)] != ["completed"] * 6
    code, _, err = whole.run(*SIX, "--output", output)
    assert code == 0, err
    assert whole.table(output) == whole.table("six")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_six_runs_of_which_two_are_killed_at_random(whole: World, seed: int) -> None:
    """The sweep goes on with the next run, and the same command with those that were killed."""
    output, draw = f"runs-killed-{seed}", random.Random(seed)
    process = whole.start(*SIX, "--output", output)
    for kill in range(2):
        wait(process, lambda kill=kill: begun(whole, output) > 2 * kill)
        time.sleep(draw.uniform(0, 3))
        wait(process, lambda: any(children(process)))
        for child in children(process):
            child.kill()
    _, err = process.communicate()
    statuses = [run["status"] for run in whole.runs(output)]
    assert statuses.count("completed") + statuses.count("interrupted") == 6
    if "interrupted" in statuses:  # else both were killed behind their ends
        assert process.returncode == 2, err
        assert "the same command goes on with them" in err
    code, _, err = whole.run(*SIX, "--output", output)
    assert code == 0, err
    assert whole.table(output) == whole.table("six")
