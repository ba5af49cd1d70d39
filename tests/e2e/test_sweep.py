"""`loralab sweep`, killed and taken up again: the table of the uninterrupted sweep."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

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


def wait_for_checkpoint(world: World, output: str, number: int, process: subprocess.Popen[str]) -> None:
    """Wait until a run of a sweep has written a checkpoint, or the sweep has ended."""
    while process.poll() is None and not list((world.folder / output).glob(f"{number:03}-*/checkpoints/checkpoint-*")):
        time.sleep(0.01)


def test_a_sweep_that_is_killed_and_stopped_gives_the_table_of_a_whole_one(world: World) -> None:
    """Of three runs the last fails, which ends no sweep; lists are values like others."""
    arguments = ("--grid", "lora.target_modules=[q_proj],[v_proj],[nowhere]")
    code, out, err = world.run(*arguments, "--output", "whole", "--json")
    assert code == 2, err
    assert "1 of 3 runs failed: 003" in err
    assert "nowhere" in world.runs("whole")[2]["reason"]
    assert [run["status"] for run in json.loads(out)["runs"]] == ["completed", "completed", "failed"]
    assert len({run["adapter_sha256"] for run in world.runs("whole")[:2]}) == 2
    assert (world.folder / "whole/sweep.html").is_file()

    killed = world.start(*arguments, "--output", "other")
    wait_for_checkpoint(world, "other", 1, killed)
    killed.kill()
    killed.communicate()
    stopped = world.start(*arguments, "--output", "other")
    wait_for_checkpoint(world, "other", 2, stopped)
    stopped.send_signal(signal.SIGINT)
    _, err = stopped.communicate()
    assert stopped.returncode == 130, err
    assert [run["status"] for run in world.runs("other")] == ["completed", "interrupted", "pending"]
    assert world.run(*arguments, "--output", "other")[0] == 2
    assert world.table("other") == world.table("whole")

    code, _, err = world.run("--grid", "lora.r=4,8", "--output", "whole")
    assert code == 2
    assert "the folder holds another sweep" in err


@pytest.fixture(scope="module")
def whole(world: World) -> World:
    """The world, with a whole sweep of six runs in it."""
    assert world.run(*SIX, "--output", "six")[0] == 0
    return world


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_six_runs_killed_twice_at_random(whole: World, seed: int) -> None:
    output, draw = f"killed-{seed}", random.Random(seed)
    for kill in range(2):
        process = whole.start(*SIX, "--output", output)
        while process.poll() is None and len(list((whole.folder / output).glob("0*/run.json"))) <= 2 * kill:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 6))
        process.kill()
        process.communicate()
    assert [run["status"] for run in whole.runs(output)] != ["completed"] * 6
    code, _, err = whole.run(*SIX, "--output", output)
    assert code == 0, err
    assert whole.table(output) == whole.table("six")
