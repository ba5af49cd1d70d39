"""What `loralab launch` starts: how many processes, on which machines."""

import subprocess
from pathlib import Path

import pytest

from loralab.config.schema import Config
from loralab.errors import ConfigError
from loralab.workflows.launch import Machines, resolve_machines, resolve_processes


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


def test_machines() -> None:
    assert resolve_machines(1, None, None) == Machines(1, 0, "127.0.0.1", 0)
    assert resolve_machines(3, 2, "node0:29500") == Machines(3, 2, "node0", 29500)


@pytest.mark.parametrize(
    ("count", "rank", "address", "what"),
    [
        (1, 1, None, "for one machine"),
        (1, None, "node0:29500", "for one machine"),
        (2, 0, None, "no address of the first machine: None"),
        (2, 0, "node0", "no address of the first machine: 'node0'"),
        (2, 0, "node0:99999", "no address of the first machine"),
        (2, None, "node0:29500", "no number of this machine: None"),
        (2, 2, "node0:29500", "no number of this machine: 2"),
    ],
)
def test_machines_that_contradict_each_other(count: int, rank: int | None, address: str | None, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        resolve_machines(count, rank, address)


def test_the_script_for_slurm_is_one() -> None:
    script = Path(__file__).parents[3] / "docs" / "slurm" / "train.sbatch"
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    text = script.read_text(encoding="utf-8")
    options = ("--num-machines", "--machine-rank", "--main-address")
    assert all(option in text for option in options)
    assert 'launch "$@"' in text
