"""The processes of one machine: started, watched and ended together.

Owns how they find each other and what one's end means to the rest. The launcher holds the store where they meet, so
that the last word of a process outlives it. torch's own launcher is not used: it ends the others 30 seconds after a
signal, which may be in the middle of a checkpoint, and shows tracebacks for errors that have been told already.
"""

import collections
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from loralab.config.schema import Config
from loralab.errors import ConfigError, Problem, WorkerError, excerpt
from loralab.models.precision import Resolved
from loralab.progress import Reporter
from loralab.training.distributed import LAUNCHER_VARIABLE, leave_word

_FIND_LIMIT = timedelta(minutes=10)
_POLL_SECONDS = 0.1
# After one process has ended badly: so long may the others take to end by themselves, and after each signal.
_GRACE_SECONDS = 20.0
# How long the first machine keeps the store for the others when its own processes are done.
_LEAVE_SECONDS = 60.0
_KEPT_LINES = 60


@dataclass(frozen=True, slots=True)
class Machines:
    """The machines of a run, and which one this is.

    Attributes:
        count: number of machines.
        rank: number of this one.
        host: name or address of the first one, which all reach.
        port: where its launcher listens; 0 takes a free one, on one machine.
    """

    count: int = 1
    rank: int = 0
    host: str = "127.0.0.1"
    port: int = 0


@dataclass
class _Worker:
    """A process of the run.

    Attributes:
        rank: its number in the run.
        process: the process.
        lines: the last lines of what it said, where nobody sees them.
    """

    rank: int
    process: subprocess.Popen[str]
    lines: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=_KEPT_LINES))

    def read(self) -> None:
        """Keep what it says, to its end."""
        for line in self.process.stderr or ():
            self.lines.append(line.rstrip("\n"))


def resolve_machines(count: int, rank: int | None, address: str | None) -> Machines:
    """Return the machines that options describe.

    Args:
        count: --num-machines.
        rank: --machine-rank, or None.
        address: --main-address, HOST:PORT, or None.

    Raises:
        ConfigError: they contradict each other.
    """
    if count == 1:
        if rank or address:
            raise ConfigError(
                "--machine-rank or --main-address for one machine",
                where="command line",
                fix="add --num-machines, or leave them out",
            )
        return Machines()
    host, _, port = (address or "").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(
            f"no address of the first machine: {address!r}",
            where="option --main-address",
            fix="give a name that all machines reach and a free port, the same on all: --main-address node0:29500",
        )
    if rank is None or not 0 <= rank < count:
        raise ConfigError(
            f"no number of this machine: {rank}",
            where="option --machine-rank",
            fix=f"give each machine its own, from 0 to {count - 1}",
        )
    return Machines(count, rank, host, int(port))


def resolve_processes(asked: int | None, config: Config) -> Resolved[int]:
    """Choose how many processes this machine runs.

    Raises:
        ConfigError: more than there are GPUs.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and config.model.device != "cpu" else 0
    if asked is None:
        if gpus:
            return Resolved(gpus, f"one for each of {gpus} visible GPUs")
        why = "model.device is cpu" if config.model.device == "cpu" else "no GPU is visible"
        return Resolved(1, f"{why}; --num-processes asks for more")
    if gpus and asked > gpus:
        raise ConfigError(
            f"{asked} processes for {gpus} visible GPUs: each takes one of its own",
            where="option --num-processes",
            fix=f"give at most {gpus}, or set model.device: cpu",
        )
    return Resolved(asked, "set by --num-processes")


def launch(arguments: Sequence[str], *, processes: int, machines: Machines, reporter: Reporter) -> int:
    """Run `loralab` as the processes of this machine, to their end.

    The run's first process takes over stdout and stderr; of the others the last lines are kept, and shown where
    they ended without telling why.

    Args:
        arguments: of `loralab`, the command first.
        processes: how many this machine runs.
        machines: those that share the run.
        reporter: told of the start, and of an end that no process could tell of.

    Returns:
        The exit code of the run.

    Raises:
        ConfigError: the machines do not find each other, or were started with different arguments.
        WorkerError: a process was lost, and the run's first one could not say so.
    """
    store = _meet(machines)
    _claim_rank(store, machines)
    workers: list[_Worker] = []
    try:
        counts = _exchange(store, machines, processes, arguments)
        first, total = sum(counts[: machines.rank]), sum(counts)
        place = f"machine {machines.rank} of {machines.count}: " if machines.count > 1 else ""
        reporter.say(f"{place}starting {processes} process{'es' if processes > 1 else ''} of {total}")
        with _forwarding_signals(workers) as asked:
            for local in range(processes):
                shared = {
                    "RANK": first + local,
                    "LOCAL_RANK": local,
                    "WORLD_SIZE": total,
                    "LOCAL_WORLD_SIZE": processes,
                }
                workers.append(_start(arguments, shared if total > 1 else {}, machines, store))
            _watch(workers, store)
        return _conclude(workers, total, asked, reporter)
    finally:
        for worker in workers:
            _end(worker, signal.SIGKILL)
            worker.process.wait()
        _take_leave(store, machines)


def _meet(machines: Machines) -> TCPStore:
    try:
        return TCPStore(
            machines.host,
            machines.port,
            is_master=machines.rank == 0,
            wait_for_workers=False,
            timeout=_FIND_LIMIT,
        )
    except (RuntimeError, ValueError) as error:
        what = "cannot listen on" if machines.rank == 0 else "no answer from the first machine at"
        raise ConfigError(
            f"{what} {machines.host}:{machines.port}: {excerpt(error)}",
            where="option --main-address",
            fix="start machine 0 too, and give an address of it and a free port that all machines reach",
        ) from error


def _claim_rank(store: TCPStore, machines: Machines) -> None:
    if store.add(f"loralab/machine-claimed/{machines.rank}", 1) > 1:
        raise ConfigError(
            f"two machines say that they are number {machines.rank}",
            where="option --machine-rank",
            fix="give each machine its own number, from 0",
        )


def _exchange(store: TCPStore, machines: Machines, processes: int, arguments: Sequence[str]) -> list[int]:
    """Return how many processes each machine runs, once all of them have said so.

    Raises:
        ConfigError: a machine did not come, or was started with other arguments.
        WorkerError: the first machine has ended.
    """
    try:
        return _compare_machines(store, machines, processes, arguments)
    except RuntimeError as error:
        raise WorkerError(
            f"the first machine has ended before all had come ({excerpt(error)})",
            where=f"machine {machines.rank} of {machines.count}, option --main-address",
            fix="see what it said, and start `loralab launch` on all machines again",
        ) from error


def _compare_machines(store: TCPStore, machines: Machines, processes: int, arguments: Sequence[str]) -> list[int]:
    own = {
        "processes": processes,
        "machines": machines.count,
        "arguments": hashlib.sha256(json.dumps(list(arguments)).encode()).hexdigest(),
    }
    store.set(f"loralab/machine/{machines.rank}", json.dumps(own))
    found = []
    end = time.monotonic() + _FIND_LIMIT.total_seconds()
    for rank in range(machines.count):
        while not store.check([f"loralab/machine/{rank}"]):
            if time.monotonic() > end:
                raise ConfigError(
                    f"machine {rank} of {machines.count} did not come within {_FIND_LIMIT}",
                    where="option --num-machines",
                    fix=f"start `loralab launch` there with --machine-rank {rank} and the same --main-address",
                )
            time.sleep(_POLL_SECONDS)
        found.append(json.loads(store.get(f"loralab/machine/{rank}")))
        for name, what in (("machines", "--num-machines"), ("arguments", "the configuration or its overrides")):
            if found[rank][name] != own[name]:
                raise ConfigError(
                    f"machine {rank} was started with another value of {what} than machine {machines.rank}",
                    where="command line",
                    fix="give the same command on all machines but for --machine-rank and --num-processes",
                )
    return [int(each["processes"]) for each in found]


def _start(arguments: Sequence[str], numbers: dict[str, int], machines: Machines, store: TCPStore) -> _Worker:
    rank = numbers.get("RANK", 0)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {name: str(value) for name, value in numbers.items()}
    environment |= {
        "MASTER_ADDR": machines.host,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        LAUNCHER_VARIABLE: str(os.getpid()),
    }
    shown = rank == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "loralab.cli", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=None if shown else subprocess.DEVNULL,
        stderr=None if shown else subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # a terminal's Ctrl-C reaches the launcher alone, which passes it on once
    )
    worker = _Worker(rank, process)
    if not shown:
        threading.Thread(target=worker.read, daemon=True).start()
    return worker


@contextmanager
def _forwarding_signals(workers: Sequence[_Worker]) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on to every process; the list holds what came."""
    came: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        for worker in workers:
            _end(worker, number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(worker: _Worker, number: int) -> None:
    if worker.process.poll() is None:
        worker.process.send_signal(number)


def _watch(workers: Sequence[_Worker], store: TCPStore) -> None:
    """Wait for the end of all processes; when one has ended badly, see to it that the others end too."""
    told: set[int] = set()
    ladder = iter((signal.SIGTERM, signal.SIGTERM, signal.SIGKILL))
    until: float | None = None
    while any(worker.process.poll() is None for worker in workers):
        for worker in workers:
            if worker.process.poll() is not None and worker.process.returncode < 0 and worker.rank not in told:
                told.add(worker.rank)
                leave_word(store, worker.rank, _describe_loss(worker), exit_code=WorkerError.exit_code)
        if until is None and any(worker.process.poll() for worker in workers):
            until = time.monotonic() + _GRACE_SECONDS
        if until is not None and time.monotonic() > until:
            number = next(ladder, signal.SIGKILL)
            for worker in workers:
                _end(worker, number)
            until = time.monotonic() + _GRACE_SECONDS
        time.sleep(_POLL_SECONDS)


def _describe_loss(worker: _Worker) -> Problem:
    name = signal.Signals(-worker.process.returncode).name
    return Problem(
        f"process {worker.rank} was ended by {name}",
        f"process {worker.rank}, process id {worker.process.pid}",
        "if nobody did, the system may have run out of memory; go on with --resume",
    )


def _conclude(workers: Sequence[_Worker], total: int, asked: Sequence[int], reporter: Reporter) -> int:
    """Return the exit code of the run, once all processes have ended.

    Raises:
        WorkerError: one was lost, and nobody has said so.
    """
    codes = [worker.process.returncode for worker in workers]
    speaker = workers[0] if workers[0].rank == 0 else None
    if speaker is not None and speaker.process.returncode > 0:
        return speaker.process.returncode  # it has said why
    if asked and all(code in (0, -asked[0], 128 + asked[0]) for code in codes) and any(codes):
        return 128 + asked[0]
    failed = [worker for worker in workers if worker.process.returncode]
    if not failed:
        return 0
    worker = next((each for each in failed if each.process.returncode < 0), failed[0])
    last = list(worker.lines)
    for line in last:
        reporter.say(f"[process {worker.rank}] {line}")
    code = worker.process.returncode
    if code >= 0 and speaker is None:
        return code  # its own words stand above
    problem = (
        _describe_loss(worker)
        if code < 0
        else Problem(
            f"process {worker.rank} of {total} ended with exit code {code}",
            f"process {worker.rank}",
            "see what it said last, above" if last else "start it alone to see why",
        )
    )
    raise WorkerError(problem.what, where=problem.where, fix=problem.fix)


def _take_leave(store: TCPStore, machines: Machines) -> None:
    """Keep the store until the other machines' processes are done with it."""
    if machines.count == 1:
        return
    try:
        store.set(f"loralab/machine-left/{machines.rank}", "1")
        end = time.monotonic() + _LEAVE_SECONDS
        keys = [f"loralab/machine-left/{rank}" for rank in range(machines.count)]
        while machines.rank == 0 and not store.check(keys) and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
    except RuntimeError:
        return  # the first machine is gone
