"""DeepSpeed's ZeRO on several GPUs. Skipped with fewer than two, or without deepspeed.

No number here was ever seen: the machines that this was written on have one GPU at most.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu.world import check_same, run_config, save_base
from support.command import write_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="the extra deepspeed is not installed"),
]
WAYS = ("zero2", "zero3")
_LIMIT_SECONDS = 900.0
_LAUNCH = ("launch", "--num-processes", "2")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    sections: dict[str, Any] = {
        "lora": {"dropout": 0.1},
        "training": {"max_steps": 6, "optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2},
    }
    return write_config(folder / "config.yaml", run_config(save_base(folder / "base"), folder, "run", **sections))


def start(command: Sequence[str], config: Path, run: Path, *settings: str, gpus: str | None = None) -> Any:
    name, *options = command
    return subprocess.Popen(
        [sys.executable, "-m", "loralab.cli", name, str(config), f"output.dir={run}", *settings, *options],
        env=os.environ | ({} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}),
        cwd=config.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: Any, *, code: int = 0) -> str:
    out, err = process.communicate(timeout=_LIMIT_SECONDS)
    assert process.returncode == code, err
    return str(out)


def read(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "run.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_give_the_curve_of_one(way: str, config: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    exact = "model.precision=float32"
    finish(start(["train"], config, one, exact, "training.per_device_train_batch_size=8", gpus="0"))
    said = finish(start([*_LAUNCH, "--json"], config, two, exact, f"training.distributed={way}"))
    assert json.loads(said)["resolved"]["distributed"]["value"] == way
    check_same(one, two, rel=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_half_precision(way: str, config: Path, tmp_path: Path) -> None:
    for mode in ("ddp", way):
        half = ("model.precision=bfloat16", f"training.distributed={mode}")
        finish(start(_LAUNCH, config, tmp_path / mode, *half))
    check_same(tmp_path / "ddp", tmp_path / way, rel=1e-2)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_moments_in_parts_over_a_quantized_base(quantization: str, config: Path, tmp_path: Path) -> None:
    for mode in ("ddp", "zero2"):
        settings = (f"model.quantization={quantization}", "model.precision=float32", f"training.distributed={mode}")
        finish(start(_LAUNCH, config, tmp_path / mode, *settings))
    check_same(tmp_path / "ddp", tmp_path / "zero2", rel=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_run_goes_on_to_the_same_bits(way: str, config: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    settings = (f"training.distributed={way}", "training.max_steps=40")
    finish(start(_LAUNCH, config, whole, *settings))
    process = start(_LAUNCH, config, run, *settings)
    end = time.monotonic() + _LIMIT_SECONDS
    while not (run / "metrics.jsonl").is_file():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    finish(process, code=128 + signal.SIGTERM)
    finish(start([*_LAUNCH, "--resume"], config, run, *settings))
    assert read(run)["adapter_sha256"] == read(whole)["adapter_sha256"]
