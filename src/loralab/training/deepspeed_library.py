"""The optional package `deepspeed`: imported where ZeRO shares a run, or a clear error.

Owns that import alone.
"""

import importlib
import importlib.util
import logging
import os
import warnings
from typing import Any

import torch

from loralab.errors import ConfigError


def check_deepspeed(distributed: str) -> None:
    """Check that the package is there, without importing it.

    Args:
        distributed: `training.distributed`, which asks for it.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise _missing(f"{distributed} needs the package deepspeed, which is not installed")


def load_deepspeed(device: torch.device) -> Any:
    """Return the package, set to the device that the run computes on.

    Args:
        device: of this process.

    Raises:
        ConfigError: it cannot be imported.
    """
    # Read when the package is imported: it would take a GPU that the run was told to leave alone.
    os.environ["DS_ACCELERATOR"] = device.type
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about kernels that are not used
            found: Any = importlib.import_module("deepspeed")
    except ImportError as error:
        raise _missing(f"the package deepspeed cannot be imported: {error}") from error
    found.utils.logger.setLevel(logging.ERROR)  # it logs every object that it makes
    if device.type == "cpu":
        found.accelerator.set_accelerator(_plain_cpu())
    return found


def _plain_cpu() -> Any:
    """Return DeepSpeed's idea of a CPU, without the sums in shared memory that it would compile in every process.

    A compilation that is killed leaves a lock, and all later runs would wait for it without a word.
    """
    from_library: Any = importlib.import_module("deepspeed.accelerator.cpu_accelerator").CPU_Accelerator

    class PlainCpu(from_library):  # type: ignore[misc]
        """Sums by gloo."""

        def create_op_builder(self, class_name: str) -> Any:
            """Return what compiles a kernel; None for that of sums."""
            return None if class_name == "ShareMemCommBuilder" else super().create_op_builder(class_name)

    return PlainCpu()


def _missing(what: str) -> ConfigError:
    return ConfigError(
        what,
        where="key training.distributed",
        fix="install it: pip install 'loralab[deepspeed]', or set training.distributed: fsdp2",
    )
