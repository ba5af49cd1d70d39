"""Rules of how several processes or GPUs share a run."""

from collections.abc import Callable

from loralab.config.findings import Finding
from loralab.config.schema import Config


def _check_quantized_parts(config: Config) -> list[Finding]:
    if config.training.distributed != "fsdp2" or config.model.quantization == "none":
        return []
    what = (
        f"fsdp2 with quantization {config.model.quantization!r}: packed weights and their scales belong together, and "
        "cannot be cut into parts"
    )
    fix = "set training.distributed: ddp (a quantized base is a quarter as large), or model.quantization: none"
    return [Finding("training.distributed", what, fix)]


def _check_parts_on_devices(config: Config) -> list[Finding]:
    if config.model.device_map is None or config.training.distributed == "ddp":
        return []
    what = "device_map auto with fsdp2: both say how a base lies on several GPUs"
    return [Finding("model.device_map", what, "remove it: fsdp2 puts a part of every layer on each GPU")]


RULES: tuple[Callable[[Config], list[Finding]], ...] = (_check_quantized_parts, _check_parts_on_devices)
