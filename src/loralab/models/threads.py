"""How many threads PyTorch computes with on a CPU.

It takes one for each core that it sees. Where a container's quota leaves fewer, its threads wait for one another
and every step takes many times as long; several processes on one machine do the same to each other.
"""

import math
import os

import torch

from loralab.models.limits import read_limits, runnable_cpus, usable_cpus
from loralab.models.precision import Resolved

# What the OpenMP and MKL libraries below PyTorch read when they start.
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def resolve_threads(device: torch.device, *, sharing: int = 1) -> dict[str, Resolved[int]]:
    """Let no more threads compute than there are processors to use, where the environment does not say how many.

    Call before the first product: libraries may start their threads at it.

    Args:
        device: where the run computes.
        sharing: processes of the run on this machine.

    Returns:
        The choice with its reason; nothing where it is not the CPU that computes.
    """
    if device.type != "cpu":
        return {}
    now = torch.get_num_threads()
    named = next((name for name in VARIABLES if os.environ.get(name)), None)
    if named is not None:
        return {"threads": Resolved(now, f"set by {named}={os.environ[named]}")}
    runnable, limits = runnable_cpus(), read_limits()
    usable = usable_cpus(runnable, limits)
    own = usable / sharing
    of = f" shared by {sharing} processes" if sharing > 1 else ""
    if now <= math.ceil(own):
        return {"threads": Resolved(now, f"PyTorch's choice, on {usable:g} processors{of}")}
    wanted = max(math.floor(own), 1)
    torch.set_num_threads(wanted)
    leaves = "the container's quota leaves" if usable < runnable else "this process may run on"
    return {"threads": Resolved(wanted, f"PyTorch would take {now}; {leaves} {usable:g} processors{of}")}
