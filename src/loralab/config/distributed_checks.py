"""Rules of how several processes or GPUs share a run."""

from collections.abc import Callable

from loralab.config.findings import Finding
from loralab.config.schema import Config

# Process id of `loralab launch` in the environment of what it starts.
LAUNCHER_VARIABLE = "LORALAB_LAUNCHER"
# By which launchers number the processes of a run.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
# What cuts the frozen layers, and what wants optimizers that treat every number alone.
_IN_PARTS = ("fsdp2", "zero3")
_ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd")


def _check_quantized_parts(config: Config) -> list[Finding]:
    way, quantization = config.training.distributed, config.model.quantization
    if way not in _IN_PARTS or quantization == "none":
        return []
    what = (
        f"{way} with quantization {quantization!r}: packed weights and their scales belong together, and cannot be "
        "cut into parts"
    )
    fix = "set training.distributed: ddp (a quantized base is a quarter as large), or model.quantization: none"
    return [Finding("training.distributed", what, fix)]


def _check_parts_on_devices(config: Config) -> list[Finding]:
    way = config.training.distributed
    if config.model.device_map is None or way == "ddp":
        return []
    what = f"device_map auto with {way}: both say how a model lies on several GPUs"
    return [Finding("model.device_map", what, f"remove it, or set training.distributed: ddp instead of {way}")]


def _check_moments_in_parts(config: Config) -> list[Finding]:
    optim = config.training.optim
    if config.training.distributed != "zero2" or optim in _ELEMENTWISE:
        return []
    what = f"zero2 with optim {optim}: only moments of single numbers can be cut into parts"
    return [Finding("training.optim", what, "set training.optim: adamw_torch, or training.distributed: ddp")]


RULES: tuple[Callable[[Config], list[Finding]], ...] = (
    _check_quantized_parts,
    _check_parts_on_devices,
    _check_moments_in_parts,
)
