"""The processes of a run: which one this is, sums over all, waiting, and what one's end means to the others.

Owns everything that is said between processes, besides the gradients (DDP) and random states (Trainer).
Does not own what is done by which process: workflows ask `first`.
"""

import json
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from types import FrameType
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from loralab.errors import ConfigError, LoralabError, Problem, StoppedBySignal, WorkerError, excerpt
from loralab.training.deepspeed_library import check_deepspeed
from loralab.training.launched import LAUNCH, Place, end_with_launcher, launcher_is_gone, read_place

Value = TypeVar("Value")
FloatArray = npt.NDArray[np.float64]

# A killed process closes its connections, which the others notice at once; these are for one that hangs.
_START_LIMIT = timedelta(minutes=5)
_STEP_LIMIT = timedelta(minutes=30)
# While the first process alone tokenizes, saves or generates, the others wait as long as that may take.
_WAIT_LIMIT = timedelta(hours=24)
# How long is waited for a word of the others when one is lost: they leave it before they end.
_WORD_SECONDS = 3.0


class Board(Protocol):
    """What is used of torch's store, which the launcher keeps and all processes reach."""

    def set(self, key: str, value: str, /) -> None:
        """Write a word under a key."""

    def get(self, key: str, /) -> bytes:
        """Return the word under a key, once it is there."""
        ...

    def check(self, keys: list[str], /) -> bool:
        """Return whether all keys have a word."""
        ...


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank: number of this process.
        count: number of processes (D).
        local_rank: its number on its machine.
        local_count: number of processes on its machine.
        lockstep: whether every forward needs all of them, because each holds a part of the base: none may run
            more of them than another.
        moments_in_parts: whether each holds a part of the gradients and moments of what is trained.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    lockstep: bool = False
    moments_in_parts: bool = False
    _board: Board | None = None
    _steps: dist.ProcessGroup | None = None
    _waits: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this process writes the run folder and speaks to the user."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until every process is here, however long the first one works alone."""
        if self.count > 1:
            dist.all_reduce(torch.zeros(1), group=self._waits)

    def share(self, value: Value | None) -> Value:
        """Return the first process's `value` in all processes; the others' is not looked at."""
        box: list[Any] = [value]
        if self.count > 1:
            dist.broadcast_object_list(box, src=0, group=self._waits)
        shared: Value = box[0]
        return shared

    def gather(self, value: Value) -> list[Value]:
        """Return every process's `value`, by rank, in all processes."""
        box: list[Any] = [value]
        if self.count > 1:
            box = [None] * self.count
            dist.all_gather_object(box, value, group=self._steps)
        return box

    def sum(self, values: FloatArray) -> FloatArray:
        """Return the sum of every process's `values` (any shape), the same bits in all processes."""
        if self.count == 1:
            return values
        total = torch.from_numpy(values.astype(np.float64))
        dist.all_reduce(total, group=self._steps)
        summed: FloatArray = total.numpy()
        return summed

    def largest(self, value: int) -> int:
        """Return the largest of every process's `value`."""
        if self.count == 1:
            return value
        found = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._steps)
        return int(found)

    def follow_first(self, values: torch.Tensor) -> None:
        """Overwrite `values`, in main memory (any shape, the same in all processes), by the first process's."""
        if self.count > 1:
            dist.broadcast(values, src=0, group=self._steps)

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """Run the body in the first process of each machine, then in the others: they find its files made."""
        if self.local_rank > 0:
            self.wait()
        yield
        if self.local_rank == 0:
            self.wait()

    def device_setting(self, setting: str) -> str:
        """Return the device of this process, as `model.device` would name it.

        Args:
            setting: `model.device`.

        Raises:
            ConfigError: the setting names what several processes cannot share.
        """
        if self.count == 1 or setting == "cpu":
            return setting
        if setting == "mps" or ":" in setting:
            raise ConfigError(
                f"{self.count} processes cannot share one device, got {setting!r}",
                where="key model.device",
                fix="set model.device: auto, cuda or cpu; each process takes a GPU of its own",
            )
        if setting == "auto" and not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{self.local_rank}"

    def _leave_word(self, error: BaseException, *, lost: bool) -> None:
        """Tell the others why this process ends."""
        if self._board is None or launcher_is_gone():  # torch would tell of the lost store at length
            return
        problems = error.problems if isinstance(error, LoralabError) else (_describe(error, self),)
        leave_word(self._board, self.rank, *problems, exit_code=getattr(error, "exit_code", 1), lost=lost)

    def _words(self) -> dict[int, dict[str, Any]]:
        """Return what processes that have ended left, by rank."""
        if self._board is None or launcher_is_gone():
            return {}
        try:
            others = [rank for rank in range(self.count) if rank != self.rank and self._board.check([_key(rank)])]
            return {rank: json.loads(self._board.get(_key(rank))) for rank in others}
        except RuntimeError:
            return {}

    def _reasons(self) -> dict[int, dict[str, Any]]:
        """Return the words of those that did not end because another one was gone, by rank."""
        return {rank: word for rank, word in self._words().items() if not word["lost"]}


ALONE = Processes()


def leave_word(board: Board, rank: int, *problems: Problem, exit_code: int, lost: bool = False) -> None:
    """Tell the other processes why one has ended, unless that was told already.

    Args:
        board: where they look.
        rank: the one that ended.
        *problems: why.
        exit_code: what the run ends with.
        lost: whether it ended because another one was gone.
    """
    word = {
        "lost": lost,
        "exit_code": exit_code,
        "problems": [[problem.what, problem.where, problem.fix] for problem in problems],
    }
    try:
        if not board.check([_key(rank)]):
            board.set(_key(rank), json.dumps(word))
    except RuntimeError:
        return  # it was kept by the process that was lost


def _key(rank: int) -> str:
    return f"loralab/ended/{rank}"


def _describe(error: BaseException, processes: Processes) -> Problem:
    what = f"process {processes.rank} failed: {type(error).__name__}: {excerpt(error)}"
    return Problem(what, f"process {processes.rank} of {processes.count}", "see its traceback")


@contextmanager
def joined(setting: str, distributed: str = "ddp") -> Iterator[Processes]:
    """Join the other processes of the run, and leave word for them when this one fails.

    Args:
        setting: `model.device`, which decides how gradients travel: gloo on CPUs, NCCL on GPUs.
        distributed: `training.distributed`.

    Raises:
        ConfigError: the launcher asks for what does not exist here, or a package is missing.
        WorkerError: another process ended without a word.
    """
    end_with_launcher()
    place = read_place()
    if place.count == 1:
        yield ALONE
        return
    if distributed.startswith("zero"):
        check_deepspeed(distributed)
    with _answering([signal.SIGINT], signal.SIG_DFL):
        processes = _join(place, setting, distributed)
    try:
        with _naming_end(processes), naming_losses(processes):
            yield processes
            # This one has done its part: whether the run stops is for those that have not.
            with _answering([signal.SIGINT, signal.SIGTERM], signal.SIG_IGN):
                processes.wait()
    except BaseException as error:
        # The group is not taken down: the others are still in it, and the process ends anyway.
        processes._leave_word(error, lost=False)
        raise
    dist.destroy_process_group()


@contextmanager
def _answering(numbers: Sequence[signal.Signals], action: signal.Handlers) -> Iterator[None]:
    """Let signals have the system's own effect, or none, while Python waits for others and would see them only then."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    before = {number: signal.signal(number, action) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _naming_end(processes: Processes) -> Iterator[None]:
    """Let SIGTERM, which launchers send when another process has ended, and SIGINT be errors with words.

    Raises:
        StoppedBySignal: one came.
        LoralabError: it came because another process ended with this error.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, before[signal.Signals(number)])  # the second one ends the process at once
        reasons = processes._reasons() if number == signal.SIGTERM else {}
        raise _echo(*min(reasons.items())) if reasons else _describe_stop(processes, number)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _describe_stop(processes: Processes, number: int) -> StoppedBySignal:
    again = "go on with --resume if the run had begun, else start it again"
    unasked = "if nobody sent it, the launcher did because another process has ended: look in its output for which"
    return StoppedBySignal(
        number,
        where=f"process {processes.rank} of {processes.count}, at once",
        fix=f"{unasked}; else {again}" if number == signal.SIGTERM else again,
    )


def _join(place: Place, setting: str, distributed: str) -> Processes:
    alone = Processes(place.rank, place.count, place.local_rank, place.local_count)
    device = alone.device_setting(setting)
    if device.startswith("cuda") and place.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(place.local_rank)
    try:
        store, rank, count = next(iter(rendezvous("env://", timeout=_START_LIMIT)))
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_STEP_LIMIT)
        # Beside the group of the gradients: what is said between processes lies in plain memory.
        steps = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_STEP_LIMIT))
        waits = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_WAIT_LIMIT))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"started as one of {place.count} processes, but the others were not found: {excerpt(error)}",
            where="environment variables MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE",
            fix=f"start all processes with a launcher that sets them: {LAUNCH}",
        ) from error
    lockstep, moments = distributed in ("fsdp2", "zero3"), distributed == "zero2"
    return replace(alone, lockstep=lockstep, moments_in_parts=moments, _board=store, _steps=steps, _waits=waits)


@contextmanager
def naming_losses(processes: Processes) -> Iterator[None]:
    """Turn a broken connection into what broke it: the error of the process that ended, or that it was lost.

    Raises:
        LoralabError: another process ended with this error.
        WorkerError: another process ended without a word.
    """
    try:
        yield
    except RuntimeError as error:
        if processes.count == 1 or not _is_broken_connection(error):
            raise
        raise _name_loss(processes, error) from error


def _is_broken_connection(error: RuntimeError) -> bool:
    # gloo raises plain RuntimeErrors; its source file stands in their text.
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _name_loss(processes: Processes, error: RuntimeError) -> LoralabError:
    # gloo begins with its source file and ends with advice.
    symptom = re.sub(r"^\[[^]]*\] *", "", excerpt(error)).partition(". ")[0]
    lost = WorkerError(
        f"another process of this run has ended without a word ({symptom})",
        where=f"process {processes.rank} of {processes.count}",
        fix="look in the launcher's output for which and why (a system that runs out of memory kills), "
        "then go on with --resume",
    )
    until = time.monotonic() + _WORD_SECONDS
    said = False
    while time.monotonic() < until:
        reasons, words = processes._reasons(), processes._words()
        if reasons:
            return _echo(*min(reasons.items()))
        if not said:  # so that the others know who still speaks
            processes._leave_word(lost, lost=True)
            said = True
        if not processes.first and 0 in words:
            return _echo(0, words[0])
        time.sleep(0.05 if not processes.first else 0.2)
    return lost


def _echo(rank: int, word: dict[str, Any]) -> LoralabError:
    problems = [
        Problem(what, where if where.startswith(f"process {rank}") else f"process {rank}: {where}", fix)
        for what, where, fix in word["problems"]
    ]
    error = LoralabError.from_problems(problems)
    error.exit_code = int(word["exit_code"])
    return error
