"""Who started this process, as its environment says: one of how many it is, and what its launcher may not ask for.

Owns the environment variables of launchers. Joining the other processes is `distributed.py`'s.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass

from loralab.config.distributed_checks import LAUNCHER_VARIABLE
from loralab.errors import ConfigError, WorkerError

# How several processes are started.
LAUNCH = "loralab launch CONFIG --num-processes 2"
_LOOK_SECONDS = 2.0
# How MPI says how many processes it started; accelerate reads these, and would wait for the others.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True, slots=True)
class Place:
    """The place of this process, as its launcher gave it.

    Attributes:
        rank: number of this process.
        count: number of processes of the run.
        local_rank: its number on its machine.
        local_count: number of processes on its machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1


def read_place() -> Place:
    """Return the place of this process among those of the run.

    Raises:
        ConfigError: the environment contradicts itself, or asks for what does not exist here.
    """
    _check_accelerate()
    count = _number("WORLD_SIZE", 1)
    if count == 1:
        _check_alone()
        return Place()
    local_count = _number("LOCAL_WORLD_SIZE", count)
    rank = _number_among("RANK", count, "WORLD_SIZE")
    # accelerate goes by it too, and without it would leave the gradients of GPUs apart.
    local_rank = _number_among("LOCAL_RANK", local_count, "LOCAL_WORLD_SIZE")
    return Place(rank, count, local_rank, local_count)


def _number_among(name: str, size: int, size_name: str) -> int:
    number = _number(name, -1)
    if not 0 <= number < size:
        raise ConfigError(
            f"{name} is {os.environ.get(name) or 'not set'} in a run of {size} processes ({size_name}), which are "
            "numbered from 0",
            where=f"environment variables {name}, {size_name}",
            fix=f"start all processes with a launcher that sets them: {LAUNCH}",
        )
    return number


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or (name.endswith("SIZE") and int(text) < 1):
        kind = "number of processes" if name.endswith("SIZE") else "number of a process"
        raise ConfigError(f"no {kind}: {text!r}", where=f"environment variable {name}", fix=f"use {LAUNCH}")
    return int(text)


def _check_accelerate() -> None:
    """Refuse what `accelerate launch` may be configured for and would act behind the configuration's back."""
    for name, what in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(name, "false").lower() in ("true", "1"):
            raise ConfigError(
                f"the launcher asks for {what}; how processes share a run is set in training.distributed",
                where=f"environment variable {name}",
                fix=f"launch with {LAUNCH}, and set training.distributed: fsdp2, zero2 or zero3",
            )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision != "no":
        raise ConfigError(
            f"the launcher asks for mixed precision {precision!r}; the computing type is the stored one",
            where="environment variable ACCELERATE_MIXED_PRECISION",
            fix="launch with --mixed_precision no, and set model.precision",
        )


def _check_alone() -> None:
    """Refuse what only makes sense for one of several processes: accelerate would look for the others."""
    for name in _MPI_SIZES:
        if _number(name, 1) > 1:
            raise ConfigError(
                f"started by MPI as one of {os.environ[name]} processes, which do not find each other so",
                where=f"environment variable {name}",
                fix=f"launch with {LAUNCH}, once on each machine",
            )
    for name in ("RANK", "LOCAL_RANK"):
        if _number(name, 0) > 0 or (os.environ.get(name) and not os.environ.get("WORLD_SIZE")):
            size = os.environ.get("WORLD_SIZE") or "not set"
            raise ConfigError(
                f"{name} is {os.environ[name]} and WORLD_SIZE is {size}: one process of how many?",
                where=f"environment variables {name}, WORLD_SIZE",
                fix=f"unset {name} for a run in one process; for several, launch with {LAUNCH}",
            )


def _launcher() -> int:
    """Return the process id of the `loralab launch` that started this process or one above it, or 0."""
    text = os.environ.get(LAUNCHER_VARIABLE, "")
    return int(text) if text.isdecimal() else 0


def launcher_is_gone() -> bool:
    """Return whether this process has lost the launcher that started it."""
    return _launcher() not in (0, os.getppid())


def end_with_launcher() -> None:
    """Stop as on SIGTERM, with a checkpoint, when the launcher that started this process is killed.

    Raises:
        WorkerError: it was killed already.
    """
    launcher = _launcher()
    if launcher == 0:
        return
    if launcher != os.getppid():
        if sys.platform != "win32":  # where 0 is no harmless signal
            with contextlib.suppress(PermissionError):
                _check_lives(launcher)
        return  # a program that one of its processes started

    def look() -> None:
        while os.getppid() == launcher:
            time.sleep(_LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=look, daemon=True).start()


def _check_lives(launcher: int) -> None:
    try:
        os.kill(launcher, 0)
    except ProcessLookupError:
        raise WorkerError(
            "`loralab launch`, which started this process, has ended",
            where=f"process id {launcher}, environment variable {LAUNCHER_VARIABLE}",
            fix="launch the run again, with --resume if it had begun",
        ) from None
