"""Device and number format: each choice with its reason, each impossible one an error."""

from typing import Any

import pytest
import torch

from loralab.config.schema import ModelConfig
from loralab.errors import ConfigError
from loralab.models import precision
from loralab.models.precision import resolve_device, resolve_precision, select_single_gpu

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda:0"), torch.device("mps")


def machine(monkeypatch: pytest.MonkeyPatch, *, gpus: int = 0, mps: bool = False, capability: Any = (8, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("setting", "gpus", "mps", "device", "reason"),
    [
        ("auto", 0, False, "cpu", "no GPU is visible"),
        ("auto", 2, True, "cuda:0", "Some GPU is available"),
        ("auto", 0, True, "mps", "Apple GPU is available"),
        ("cpu", 2, False, "cpu", "set in model.device"),
        ("cuda", 1, False, "cuda:0", "set in model.device"),
        ("cuda:1", 2, False, "cuda:1", "set in model.device"),
        ("mps", 0, True, "mps", "set in model.device"),
    ],
)
def test_device(setting: str, gpus: int, mps: bool, device: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus=gpus, mps=mps)
    assert resolve_device(setting) == precision.Resolved(torch.device(device), reason)


@pytest.mark.parametrize(
    ("setting", "gpus", "message"),
    [
        ("cuda", 0, "no such device: 'cuda' (0 CUDA devices are visible)"),
        ("cuda:2", 2, "no such device: 'cuda:2' (2 CUDA devices are visible)"),
        ("mps", 0, "no such device: 'mps'"),
    ],
)
def test_device_that_is_not_there(setting: str, gpus: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus=gpus)
    with pytest.raises(ConfigError) as caught:
        resolve_device(setting)
    assert (caught.value.problems[0].what, caught.value.problems[0].where) == (message, "key model.device")


@pytest.mark.parametrize(
    ("setting", "device", "bf16", "capability", "dtype", "reason"),
    [
        ("float32", CUDA, True, (9, 0), torch.float32, "set in model.precision"),
        ("bfloat16", CPU, False, (8, 0), torch.bfloat16, "set in model.precision"),
        ("auto", CUDA, False, (8, 0), torch.bfloat16, "compute capability 8.0 multiplies bfloat16"),
        ("float16", CUDA, False, (9, 0), torch.float16, "set in model.precision (trains with loss scaling)"),
        ("auto", CUDA, True, (7, 5), torch.float16, "compute capability 7.5 has no bfloat16; it multiplies float16"),
        ("auto", CUDA, True, (7, 0), torch.float16, "compute capability 7.0 has no bfloat16; it multiplies float16"),
        ("auto", CUDA, True, (6, 1), torch.float16, "compute capability 6.1 has no bfloat16; float16 takes half the"),
        ("auto", CUDA, True, (5, 2), torch.float32, "compute capability 5.2 computes neither bfloat16 nor float16"),
        ("auto", CPU, True, (8, 0), torch.bfloat16, "this processor has bfloat16 instructions"),
        ("auto", CPU, False, (8, 0), torch.float32, "no bfloat16 instructions on this cpu"),
        ("auto", MPS, True, (8, 0), torch.float32, "no bfloat16 instructions on this mps"),
    ],
)
def test_precision(
    setting: Any,
    device: torch.device,
    bf16: bool,
    capability: tuple[int, int],
    dtype: torch.dtype,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine(monkeypatch, capability=capability)
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: bf16)
    chosen = resolve_precision(ModelConfig(name="m", precision=setting), device)
    assert chosen.value is dtype
    assert chosen.reason.startswith(reason)


@pytest.mark.parametrize("device", [CPU, MPS])
def test_float16_needs_cuda(device: torch.device) -> None:
    with pytest.raises(ConfigError, match=f"float16 does not train on {device.type}") as caught:
        resolve_precision(ModelConfig(name="m", precision="float16"), device)
    (problem,) = caught.value.problems
    assert "which is offered on CUDA alone" in problem.what
    assert problem.where == "key model.precision"
    assert problem.fix == "set model.precision: bfloat16 (same size, wider range) or float32"


@pytest.mark.parametrize("capability", [(7, 5), (6, 0)])
def test_float16_that_was_chosen_says_how_it_trains(capability: tuple[int, int], monkeypatch: Any) -> None:
    machine(monkeypatch, gpus=1, capability=capability)
    assert resolve_precision(ModelConfig(name="m"), CUDA).reason.endswith("and trains with loss scaling")


@pytest.mark.parametrize(
    ("capabilities", "answer"),
    [
        ({}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({"bf16": True}, True),
        ({"avx2": True}, False),
    ],
)
def test_bfloat16_instructions(capabilities: dict[str, bool], answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert precision.cpu_multiplies_bfloat16() is answer


@pytest.mark.parametrize(
    ("setting", "gpus", "visible", "after"),
    [
        ("auto", 3, None, "0"),
        ("cuda:2", 3, None, "2"),
        ("cuda:1", 2, "5,7", "7"),
        ("auto", 1, "5", "5"),
        ("cpu", 3, "5,6,7", "5,6,7"),
        ("cuda:3", 3, "5,6,7", "5,6,7"),
    ],
)
def test_one_gpu_of_several_is_left_visible(
    setting: str, gpus: int, visible: str | None, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, gpus=gpus)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    note = select_single_gpu(setting)
    assert precision.os.environ.get("CUDA_VISIBLE_DEVICES") == after
    assert (note is None) == (after == visible)
    assert note is None or note == f"{gpus} GPUs are visible; this process uses number {after} alone"


def test_launched_processes_keep_their_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus=4)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert select_single_gpu("auto") is None
