"""What `loralab launch` starts: how many processes, on which machines."""

import subprocess
from pathlib import Path

import pytest

from loralab.config.schema import Config
from loralab.errors import ConfigError
from loralab.workflows.launch import resolve_processes


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


def test_the_script_for_slurm_is_one() -> None:
    script = Path(__file__).parents[3] / "docs" / "slurm" / "train.sbatch"
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    text = script.read_text(encoding="utf-8")
    options = ("--num-machines", "--machine-rank", "--main-address")
    assert all(option in text for option in options)
    assert 'launch "$@"' in text
