"""Several GPUs: one process each, the base in parts, or the layers of one process on all. Skipped with fewer than two.

No number here was ever seen: the machines that this was written on have one GPU at most.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu.world import check_same, run_config, save_base
from support.command import write_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
]
_LIMIT_SECONDS = 600
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return what runs a command of `loralab` on one configuration, and gives the run's folder."""
    folder = tmp_path_factory.mktemp("several")
    base = save_base(folder / "base")
    sections: dict[str, Any] = {"lora": {"dropout": 0.1}, "training": {"max_steps": 6}}
    config = write_config(folder / "config.yaml", run_config(base, folder, "run", **sections))

    def start(name: str, command: str, *settings: str, gpus: str | None = None) -> Path:
        environment = os.environ | ({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus})
        done = subprocess.run(
            [sys.executable, "-m", "loralab.cli", command, config, f"output.dir={folder / name}", *settings],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=_LIMIT_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return folder / name

    return start


def resolved(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "run.json").read_text(encoding="utf-8"))["resolved"])


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_give_the_curve_of_one(way: str, run: Run) -> None:
    one = run(f"one-{way}", "train", "model.precision=float32", "training.per_device_train_batch_size=8", gpus="0")
    settings = ["model.precision=float32", "training.per_device_train_batch_size=4", f"training.distributed={way}"]
    two = run(f"two-{way}", "launch", *settings, "--num-processes", "2")
    assert resolved(two)["distributed"]["value"] == way
    check_same(one, two, rel=1e-4)


def test_parts_in_half_precision(run: Run) -> None:
    whole = run("half-ddp", "launch", "model.precision=bfloat16", "--num-processes", "2")
    parts = run(
        "half-fsdp2", "launch", "model.precision=bfloat16", "training.distributed=fsdp2", "--num-processes", "2"
    )
    check_same(whole, parts, rel=1e-2)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_layers_on_two_gpus_give_the_curve_of_one(layout: str, quantization: str, run: Run) -> None:
    settings = [f"training.layout={layout}", f"model.quantization={quantization}", "model.precision=float32"]
    one = run(f"one-{layout}-{quantization}", "train", *settings, gpus="0")
    two = run(f"two-{layout}-{quantization}", "train", *settings, "model.device_map=auto")
    assert "on GPU 0" in resolved(two)["device_map"]["reason"]
    assert "on GPU 1" in resolved(two)["device_map"]["reason"]
    check_same(one, two, rel=1e-4)
