"""How the layers of a base lie on the GPUs that one process sees.

Owns whether a base is spread (`model.device_map: auto`), and what of its places others have to know. Placing is
transformers' and accelerate's: their hooks carry what a module takes to its device.
"""

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from loralab.config.schema import ModelConfig
from loralab.errors import ConfigError, ModelError
from loralab.models.memory import free_bytes
from loralab.models.precision import Resolved, select_single_gpu

UNTESTED = "not tested on several GPUs"


def select_gpus(model: ModelConfig) -> str | None:
    """Hide all GPUs but one from a process, unless its base is to be spread over them; see `select_single_gpu`.

    Args:
        model: the model section.

    Returns:
        A sentence about the choice, or None where there was none to make.
    """
    return None if spreads(model) else select_single_gpu(model.device)


def spreads(model: ModelConfig) -> bool:
    """Return whether a base loaded by this process is spread over the GPUs that it sees.

    Args:
        model: the model section.
    """
    wanted = model.device_map is not None and model.device in ("auto", "cuda")
    return wanted and "WORLD_SIZE" not in os.environ and torch.cuda.is_available() and torch.cuda.device_count() > 1


def resolve_device_map(model: ModelConfig, device: torch.device, *, processes: int) -> dict[str, Resolved[str]]:
    """Say where the layers go, as far as that is known before they are loaded.

    Args:
        model: the model section.
        device: where the run computes.
        processes: those that share the run.

    Returns:
        The choice, or nothing where none was asked for.

    Raises:
        ConfigError: several processes, each of which has a GPU of its own.
    """
    if model.device_map is None:
        return {}
    if processes > 1:
        raise ConfigError(
            f"device_map {model.device_map!r} in a run of {processes} processes: it spreads a base over the GPUs of "
            "one process",
            where="key model.device_map",
            fix="remove it and set training.distributed: fsdp2, or start one process",
        )
    if spreads(model):
        count = torch.cuda.device_count()
        return {"device_map": Resolved(model.device_map, f"loading spreads the layers over {count} GPUs; {UNTESTED}")}
    return {"device_map": Resolved(model.device_map, f"one device: all layers are on {device}")}


def describe_spread(base: Any, model: ModelConfig) -> dict[str, Resolved[str]]:
    """Say where the layers of a loaded base are, or nothing where that was not asked.

    Args:
        base: as transformers loaded it.
        model: the model section.

    Raises:
        ModelError: not all of them have a place on a GPU.
    """
    if model.device_map is None:
        return {}
    if not is_spread(base):
        return {"device_map": Resolved(model.device_map, f"one device: all layers are on {base.device}")}
    places = Counter(str(place) for place in base.hf_device_map.values())
    outside = places["cpu"] + places["disk"]
    if outside:
        gpus = len(places.keys() - {"cpu", "disk"})
        raise ModelError(
            f"{outside} parts of {model.name!r} find no room on {gpus} GPUs",
            where="key model.device_map",
            fix="set model.quantization: nf4, free the GPUs of other work, or take a smaller base",
        )
    counts = ", ".join(f"{count} parts on GPU {place}" for place, count in sorted(places.items()))
    return {"device_map": Resolved(model.device_map, f"{counts}; they compute one after another; {UNTESTED}")}


def is_spread(model: nn.Module) -> bool:
    """Return whether a model's layers lie on several devices, and hooks carry tensors between them.

    Args:
        model: a base, or a wrapper of one.
    """
    found: Mapping[str, Any] = getattr(model, "hf_device_map", None) or {}
    return len(found) > 1


def put_whole(model: nn.Module, device: torch.device) -> None:
    """Move a model to a device, unless its layers have places of their own.

    Args:
        model: a base, or a wrapper of one.
        device: where the run computes.
    """
    if not is_spread(model):
        model.to(device)


def spread_devices(model: nn.Module) -> list[torch.device]:
    """Return the devices that hold a model's weights, in order."""
    return sorted({weight.device for weight in model.parameters()}, key=str)


def visible_devices(model: ModelConfig, device: torch.device) -> list[torch.device]:
    """Return the devices that a base will lie on.

    Args:
        model: the model section.
        device: where the run computes.
    """
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())] if spreads(model) else [device]


def tightest_free_bytes(model: nn.Module, device: torch.device) -> int:
    """Return the memory that is free on the device of a model with least of it.

    Args:
        model: base with adapter, on its devices.
        device: where it is, unless it is spread.
    """
    return min(free_bytes(each) for each in (spread_devices(model) if is_spread(model) else [device]))
