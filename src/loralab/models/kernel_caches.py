"""How many kernels oneDNN keeps on a CPU.

It builds one for every new shape of a product. Rows differ in length, so a run meets new shapes all the
time; by default a thousand kernels are kept, in each of two places and of about a megabyte each, and
a run's memory grows for as long as it lasts. Building one again takes no time that was seen.
"""

import os

import torch

from loralab.models.precision import Resolved

# oneDNN's own and that of PyTorch's layer above it; both are read when the first product is computed.
VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_KEPT = 32


def bound_kernel_caches(device: torch.device) -> dict[str, Resolved[str]]:
    """Let few kernels be kept, where the environment does not say how many.

    It acts where nothing was computed in this process before.

    Args:
        device: where the run computes.

    Returns:
        The choice with its reason; nothing where it is not the CPU that computes.
    """
    if device.type != "cpu":
        return {}
    for name in VARIABLES:
        os.environ.setdefault(name, str(_KEPT))
    kept = ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES)
    return {
        "kernel_caches": Resolved(kept, "kernels kept for every length of row would fill memory as the run goes on")
    }
