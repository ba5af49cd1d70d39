"""What PyTorch says of this machine, as a program: build, GPUs, threads, attention backends."""

import importlib.metadata
import importlib.util
import os
import shutil
import warnings
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from loralab.doctor.programs import open_output
from loralab.errors import excerpt

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def torch_facts() -> dict[str, Any]:
    """Return what the checks need of PyTorch, as data."""
    with warnings.catch_warnings(record=True) as said:
        available = torch.cuda.is_available()
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())] if available else []
    mps = bool(torch.backends.mps.is_available())
    return {
        "build": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cuda_error": " ".join(str(said[0].message).split()) if said else None,
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "hidden": os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"),
        "architectures": torch.cuda.get_arch_list(),
        "gpus": gpus,
        "mps": mps,
        "threads": torch.get_num_threads(),
        "capabilities": {name: value for name, value in torch.cpu.get_capabilities().items() if value},
        "sdpa": {device: usable_backends(torch.device(device)) for device in _devices(len(gpus), mps=mps)},
        "flex": {
            "triton": importlib.util.find_spec("triton") is not None,
            "compiler": _compiler() is not None,
        },
        "flash_attn": _version("flash_attn"),
    }


def _devices(gpus: int, *, mps: bool) -> list[str]:
    return ["cpu", *(f"cuda:{index}" for index in range(gpus)), *(["mps"] if mps else [])]


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError:  # full to the last byte: not even a context fits
        free, total = 0, int(properties.total_memory)
    return {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "free_bytes": free,
        "total_bytes": total,
    }


def usable_backends(device: torch.device) -> list[str]:
    """Return the kinds of scaled dot product attention that run on a device, by trying each."""
    query = torch.ones(1, 2, 64, 64, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
    usable = []
    for name, backend in _BACKENDS.items():
        try:
            with sdpa_kernel(backend), warnings.catch_warnings(record=True):
                functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        except RuntimeError:
            continue
        usable.append(name)
    return usable


def _compiler() -> str | None:
    named = os.environ.get("CC")
    return next((path for name in (named, "gcc", "clang", "cc") if name and (path := shutil.which(name))), None)


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


if __name__ == "__main__":
    _write = open_output()
    try:
        _write(torch_facts())
    except RuntimeError as _error:  # a driver that fails while it is asked
        raise SystemExit(f"RuntimeError: {excerpt(_error)}") from None
