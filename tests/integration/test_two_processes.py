"""Two processes are one run: the curve of one process, one folder, one end."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from support import tiny
from support.command import read_problems, run_here, write_config
from support.parts import TOGETHER
from support.processes import run_team, start_team

MARKS = ["error: ", "where: ", "fix:   "]


@dataclass(frozen=True)
class World:
    """A tiny base and rows in files; read only."""

    folder: Path
    base: Path

    def config(self, rows: int, path: Path) -> Path:
        """Write the configuration of a run on `rows` training rows and return its path."""
        data = tiny.write_rows(self.folder / f"rows{rows}.json", tiny.alpaca_rows(rows + 6))
        sections: dict[str, dict[str, Any]] = {
            "data": {"validation": 6},
            "lora": {"dropout": 0.1},
            "training": {"num_train_epochs": 2, "layout": "packed", "token_budget": 64},
            "evaluation": {"batch_size": 2, "num_samples": 1, "max_new_tokens": 4},
        }
        return write_config(path, tiny.run_config(self.base, data, self.folder / "run", **sections))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    return World(folder, tiny.save_base(folder / "base"))


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def check_same_run(one: Path, two: Path) -> None:
    """Check that two runs have one curve and one adapter, to the tolerance of sums in another order."""
    first, second = metrics(one), metrics(two)
    assert len(first) == len(second)
    for mine, other in zip(first, second, strict=True):
        assert other == pytest.approx(mine, rel=1e-5)
    before, after = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.norm() > 0, f"{name} was never trained"
        # Adam divides by the root of squared gradients: an almost zero one magnifies the order of sums.
        assert float((after[name] - tensor).norm() / tensor.norm()) <= 1e-4, name
    old, new = read(one / "evaluation.json"), read(two / "evaluation.json")
    assert new["base"]["eval_loss"] == pytest.approx(old["base"]["eval_loss"], rel=1e-6)
    assert new["base"]["eval_loss_batch_mean"] == pytest.approx(old["base"]["eval_loss_batch_mean"], rel=1e-6)
    assert new["eval_loss"] == pytest.approx(old["eval_loss"], rel=1e-5)
    for name in ("num_batches", "num_examples", "supervised_tokens"):
        assert new[name] == old[name], name
    records = [read(run / "run.json") for run in (one, two)]
    for name in ("steps", "epochs", "sampling", "stopped_because"):
        assert records[1][name] == records[0][name], name
    assert records[1]["layout_tokens"]["rows"] == records[0]["layout_tokens"]["rows"]


def alone(config: Path, run: Path, *settings: str) -> None:
    """Run in one process, with as many rows per step as two have."""
    answer = run_here("train", config, f"output.dir={run}", "training.per_device_train_batch_size=8", *settings)
    assert answer.code == 0, answer.err


# 25 rows: the last step of an epoch has one row, so one process has none. A budget of one token makes each row a
# micro-batch of its own: with 27 rows, the processes run one and two in the last step.
@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (25, TOGETHER),
        pytest.param(25, ["training.token_budget=64", "lora.dropout=0.1"], marks=pytest.mark.slow),
        pytest.param(27, ["training.token_budget=1"], marks=pytest.mark.slow),
        pytest.param(27, ["model.quantization=nf4"], marks=pytest.mark.slow),
        # In Adam's first steps a gradient of almost zero counts as a whole one: here rounding alone came to 1.1e-5.
        pytest.param(
            27,
            ["training.layout=shared", "lora.dropout=0.1", "advanced.trainer_args={adam_epsilon: 1e-4}"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes_give_the_curve_of_one(rows: int, settings: Sequence[str], world: World, tmp_path: Path) -> None:
    config = world.config(rows, tmp_path / "config.yaml")
    alone(config, tmp_path / "one", *settings)
    answers = run_team("train", config, f"output.dir={tmp_path / 'two'}", *settings, folder=tmp_path)
    assert [answer.code for answer in answers] == [0, 0], [answer.err for answer in answers]
    check_same_run(tmp_path / "one", tmp_path / "two")
    assert not [line for line in answers[1].err.splitlines() if "Warning" not in line]
    assert [answer.out for answer in answers] == [f"{tmp_path / 'two'}\n", ""]
    assert read(tmp_path / "two" / "run.json")["processes"] == 2
    assert len(read(tmp_path / "two" / "samples.json")["samples"]) == 1
    assert not list((tmp_path / "two").glob(".*"))


@pytest.mark.slow
def test_started_by_torchrun(world: World, tmp_path: Path) -> None:
    config = world.config(25, tmp_path / "config.yaml")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command = [*launcher, "-m", "loralab.cli", "train", str(config), f"output.dir={tmp_path / 'two'}"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    record = read(tmp_path / "two" / "run.json")
    assert (record["status"], record["processes"], record["sampling"]["rows_per_step"]) == ("completed", 2, 8)


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A configuration with checkpoints, and its uninterrupted run in two processes; read only."""
    folder = tmp_path_factory.mktemp("whole")
    config = world.config(25, folder / "config.yaml")
    text = config.read_text(encoding="utf-8").replace("save_strategy: 'no'", "save_strategy: steps\n  save_steps: 3")
    config.write_text(text.replace("num_train_epochs: 2", "num_train_epochs: 12"), encoding="utf-8")
    answers = run_team("train", config, f"output.dir={folder / 'run'}", folder=folder)
    assert [answer.code for answer in answers] == [0, 0], answers[0].err
    return config, folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_end_of_one_process_ends_both_and_the_resumed_run_is_the_same(
    sent: signal.Signals, whole: tuple[Path, Path], tmp_path: Path
) -> None:
    config, uninterrupted = whole
    run = tmp_path / "run"
    team = start_team("train", config, f"output.dir={run}", folder=tmp_path)
    team.wait_for(lambda: (run / "metrics.jsonl").is_file() and len(metrics(run)) >= 7)
    team.members[1].send_signal(sent)
    first, second = team.answers()
    lines = first.err.splitlines()[-3:]
    assert [line[:7] for line in lines] == MARKS, first.err
    assert "Traceback" not in first.err
    if sent == signal.SIGKILL:
        assert (first.code, second.code) == (2, -signal.SIGKILL)
        assert "another process of this run has ended without a word" in lines[0]
        assert read(run / "run.json")["status"] == "failed"
    else:
        assert (first.code, second.code) == (143, 143)
        assert lines[2].endswith("--resume --num-processes 2")
        assert read(run / "run.json")["status"] == "interrupted"

    refused = run_here("train", config, f"output.dir={run}", "--resume")
    assert "processes was 2, now 1" in read_problems(refused)[0].what
    answers = run_team("train", config, f"output.dir={run}", "--resume", folder=tmp_path)
    assert [answer.code for answer in answers] == [0, 0], answers[0].err
    assert "resuming from step" in answers[0].err
    records = [read(folder / "run.json") for folder in (uninterrupted, run)]
    assert records[0]["adapter_sha256"] == records[1]["adapter_sha256"]
    assert metrics(run) == metrics(uninterrupted)


@pytest.mark.slow
def test_diverged_rows_are_named_whichever_process_has_them(world: World, tmp_path: Path) -> None:
    config = world.config(25, tmp_path / "config.yaml")
    settings = ["training.learning_rate=1e30", "training.max_grad_norm=0", "training.lr_scheduler_type=constant"]
    answers = run_team("train", config, f"output.dir={tmp_path / 'run'}", *settings, folder=tmp_path)
    assert [answer.code for answer in answers] == [2, 2]
    lines = answers[0].err.splitlines()[-3:]
    assert [line[:7] for line in lines] == MARKS, answers[0].err
    assert "at step" in lines[0]


def test_user_errors_of_the_first_process_alone_end_both(world: World, tmp_path: Path) -> None:
    config = world.config(25, tmp_path / "config.yaml")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    answers = run_team("train", config, f"output.dir={tmp_path / 'run'}", folder=tmp_path)
    assert [answer.code for answer in answers] == [2, 2]
    assert "output folder is not empty and holds no run" in read_problems(answers[0])[0].what
    assert not answers[1].err
