"""How the layers of a base lie on the GPUs that one process sees."""

import torch

from loralab.errors import ConfigError
from loralab.models.precision import Resolved


def resolve_device_map(
    setting: str | None, device: torch.device, *, several_gpus: bool, processes: int
) -> dict[str, Resolved[str]]:
    """Choose where the layers go.

    Args:
        setting: `model.device_map`.
        device: where the run computes.
        several_gpus: whether the process was started with more than one.
        processes: those that share the run.

    Returns:
        The choice, or nothing where none was asked for.

    Raises:
        ConfigError: several GPUs or processes: layers are not spread over them.
    """
    if setting is None:
        return {}
    if processes > 1 or several_gpus:
        many = f"{processes} processes" if processes > 1 else "one process with several GPUs"
        raise ConfigError(
            f"device_map {setting!r} for {many}: a base is not spread over GPUs layer by layer, where all but one "
            "would wait",
            where="key model.device_map",
            fix="remove it; for a base larger than one GPU: loralab launch CONFIG training.distributed=fsdp2",
        )
    return {"device_map": Resolved(setting, f"one device: all layers are on {device}")}
