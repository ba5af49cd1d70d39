"""Device and number format: each "auto" becomes a value with its reason.

Owns `resolve_device` and `resolve_precision`; the training and evaluation workflows and the
record of the run share their results.
"""

import os
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from loralab.config.schema import ModelConfig
from loralab.errors import ConfigError

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Resolved(Generic[Value]):
    """A chosen value and why.

    Attributes:
        value: what is used.
        reason: why, in words for log and record.
    """

    value: Value
    reason: str


def select_single_gpu(setting: str) -> str | None:
    """Hide all GPUs but one from a process that was not launched as one of several.

    Trainer would otherwise wrap the model in `nn.DataParallel`. Call before CUDA is initialised.

    Args:
        setting: `model.device`.

    Returns:
        A sentence about the choice, or None where there was none to make.
    """
    if setting in ("cpu", "mps") or "WORLD_SIZE" in os.environ or not torch.cuda.is_available():
        return None
    count, index = torch.cuda.device_count(), int(setting.partition(":")[2] or 0)
    if count < 2 or index >= count:
        return None
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = listed[index]
    return f"{count} GPUs are visible; this process uses number {listed[index]} alone"


def resolve_device(setting: str) -> Resolved[torch.device]:
    """Choose where to compute.

    Raises:
        ConfigError: the device is not there.
    """
    if setting == "auto":
        if torch.cuda.is_available():
            return Resolved(torch.device("cuda:0"), f"{torch.cuda.get_device_name(0)} is available")
        if torch.backends.mps.is_available():
            return Resolved(torch.device("mps"), "Apple GPU is available")
        return Resolved(torch.device("cpu"), "no GPU is visible")
    if setting.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(setting.partition(":")[2] or 0)
        if index >= count:
            raise ConfigError(
                f"no such device: {setting!r} ({count} CUDA devices are visible)",
                where="key model.device",
                fix="set model.device: auto or cpu, or check the driver and CUDA_VISIBLE_DEVICES",
            )
        return Resolved(torch.device("cuda", index), "set in model.device")
    if setting == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("no such device: 'mps'", where="key model.device", fix="set model.device: auto or cpu")
    return Resolved(torch.device(setting), "set in model.device")


def resolve_precision(model: ModelConfig, device: torch.device) -> Resolved[torch.dtype]:
    """Choose the storage and compute type of the frozen weights.

    Raises:
        ConfigError: float16 without CUDA.
    """
    if model.precision != "auto":
        if model.precision == "float16" and device.type != "cuda":
            raise ConfigError(
                f"float16 does not train on {device.type} "
                "(its range needs loss scaling, which is offered on CUDA alone)",
                where="key model.precision",
                fix="set model.precision: bfloat16 (same size, wider range) or float32",
            )
        scaled = " (trains with loss scaling)" if model.precision == "float16" else ""
        return Resolved(getattr(torch, model.precision), f"set in model.precision{scaled}")
    if device.type == "cuda":
        return _precision_of_capability(*torch.cuda.get_device_capability(device))
    if device.type == "cpu" and cpu_multiplies_bfloat16():
        return Resolved(torch.bfloat16, "this processor has bfloat16 instructions")
    return Resolved(torch.float32, f"no bfloat16 instructions on this {device.type}")


def _precision_of_capability(major: int, minor: int) -> Resolved[torch.dtype]:
    """Choose for a CUDA device.

    Source: NVIDIA, CUDA C++ Programming Guide, "Compute Capabilities": products of float16 on tensor
    cores from 7.0, of bfloat16 from 8.0, arithmetic in float16 at all from 5.3.
    """
    device = f"compute capability {major}.{minor}"
    if (major, minor) >= (8, 0):
        return Resolved(torch.bfloat16, f"{device} multiplies bfloat16")
    if (major, minor) < (5, 3):
        return Resolved(torch.float32, f"{device} computes neither bfloat16 nor float16")
    # Below 7.0 it makes products no faster, but these are the cards with the least memory.
    gain = "it multiplies float16" if major >= 7 else "float16 takes half the memory of float32"
    return Resolved(torch.float16, f"{device} has no bfloat16; {gain}, and trains with loss scaling")


def cpu_multiplies_bfloat16() -> bool:
    """Return whether the processor has bfloat16 dot products (AVX512-BF16, AMX, or Arm's BF16)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
