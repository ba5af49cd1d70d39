"""The processes of one machine: started, watched and ended together.

Owns what one's end means to the rest, and what the run's exit code is. How machines find each other is `machines.py`'s.
torch's own launcher is not used: it ends the others 30 seconds after a signal, which may be in the middle of a
checkpoint, and shows tracebacks for errors that have been told already.
"""

import collections
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from loralab.config.distributed_checks import LAUNCHER_VARIABLE
from loralab.config.schema import Config
from loralab.errors import ConfigError, Problem, StoppedBySignal, WorkerError
from loralab.models.device_map import resolve_device_map
from loralab.models.precision import Resolved
from loralab.progress import Reporter
from loralab.training.deepspeed_library import check_deepspeed
from loralab.training.distributed import leave_word
from loralab.workflows.machines import Machines, agree, meet, take_leave

_POLL_SECONDS = 0.1
# After one process has ended badly: so long may the others take to end by themselves, and after each signal.
_GRACE_SECONDS = 20.0
# After one has ended as it was asked to, the others may still be busy with what that takes.
_STOP_SECONDS = 600.0
_KEPT_LINES = 60
_READ_SECONDS = 2.0
# What a bug ends a process with, whose traceback nobody but itself can tell.
_BUG = 1


@dataclass
class _Worker:
    """A process of the run.

    Attributes:
        rank: its number in the run.
        process: the process.
        lines: the last lines of what it said, where nobody sees them.
        reader: keeps them, or None where its words go straight to the user.
        told_to_end: the last signal that it got because another one had ended, or None.
    """

    rank: int
    process: subprocess.Popen[str]
    lines: collections.deque[str] = field(default_factory=lambda: collections.deque(maxlen=_KEPT_LINES))
    reader: threading.Thread | None = None
    told_to_end: int | None = None

    @property
    def code(self) -> int:
        """Exit code; minus the signal that ended it; 0 while it lives."""
        return self.process.returncode or 0

    @property
    def obeyed(self) -> bool:
        """Whether it ended because another one had."""
        return self.told_to_end is not None and self.code in (-self.told_to_end, 128 + self.told_to_end)

    def read(self) -> None:
        """Keep what it says, to its end."""
        if self.process.stderr is not None:
            with self.process.stderr as stream:
                for line in stream:
                    self.lines.append(line.rstrip("\n"))

    def send(self, number: int) -> None:
        """Send it a signal, if it lives."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def last_words(self) -> list[str]:
        """Return the last lines of what it said, once it has ended."""
        if self.reader is not None:
            self.reader.join(_READ_SECONDS)  # not for ever: its own children may hold the pipe
        return list(self.lines)


def resolve_processes(asked: int | None, config: Config) -> Resolved[int]:
    """Choose how many processes this machine runs.

    Args:
        asked: --num-processes, or None.
        config: the configuration.

    Raises:
        ConfigError: more than there are GPUs, or than share a base that is spread over them.
    """
    resolve_device_map(config.model, torch.device("cpu"), processes=asked or 1)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and config.model.device != "cpu" else 0
    if asked is None:
        if config.model.device_map is not None:
            return Resolved(1, "model.device_map is for one process")
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


def launch(arguments: Sequence[str], config: Config, *, processes: int, machines: Machines, reporter: Reporter) -> int:
    """Run `loralab` as the processes of this machine, to their end.

    The run's first process takes over stdout and stderr; of the others the last lines are kept, and shown where
    they ended without telling why.

    Args:
        arguments: of `loralab`, the command first.
        config: what they come to; the same on all machines.
        processes: how many this machine runs.
        machines: those that share the run.
        reporter: told of the start, and of an end that no process could tell of.

    Returns:
        The exit code of the run.

    Raises:
        ConfigError: the machines do not find each other, were started with different configurations, or lack a
            package.
        StoppedBySignal: a signal came before any process could say so.
        WorkerError: a process was lost, and the run's first one could not say so.
    """
    if config.training.distributed.startswith("zero") and (processes > 1 or machines.count > 1):
        check_deepspeed(config.training.distributed)
    store = meet(machines, reporter.say)
    workers: list[_Worker] = []
    try:
        counts = agree(
            store,
            machines,
            processes=processes,
            arguments=[*arguments, config.model_dump_json()],
            say=reporter.say,
        )
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
                for number in asked:  # it came while this process was being started
                    workers[-1].send(number)
            _watch(workers, store, asked)
        return _conclude(workers, total, asked, reporter)
    finally:
        for worker in workers:
            worker.send(signal.SIGKILL)
            worker.process.wait()
        take_leave(store, machines)


def _start(arguments: Sequence[str], numbers: dict[str, int], machines: Machines, store: TCPStore) -> _Worker:
    rank = numbers.get("RANK", 0)
    environment = os.environ | {name: str(value) for name, value in numbers.items()}
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
        worker.reader = threading.Thread(target=worker.read, daemon=True)
        worker.reader.start()
    return worker


@contextmanager
def _forwarding_signals(workers: Sequence[_Worker]) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on to every process; the list holds what came."""
    came: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        for worker in workers:
            worker.send(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(workers: Sequence[_Worker], store: TCPStore, asked: Sequence[int]) -> None:
    """Wait for the end of all processes; when one has ended badly, see to it that the others end too."""
    told: set[int] = set()
    ladder = iter((signal.SIGTERM, signal.SIGTERM, signal.SIGKILL))
    limit, since = _GRACE_SECONDS, None
    while [worker for worker in workers if worker.process.poll() is None]:  # asks every one of them
        ended = [worker for worker in workers if worker.code]
        for worker in ended:
            if worker.code < 0 and worker.rank not in told:
                told.add(worker.rank)
                as_asked = _as_asked(worker, asked)
                code = 128 - worker.code if as_asked else WorkerError.exit_code
                leave_word(store, worker.rank, _describe_loss(worker), exit_code=code)
        if ended and since is None:
            since = time.monotonic()
            limit = _STOP_SECONDS if all(_as_asked(worker, asked) for worker in ended) else _GRACE_SECONDS
        if since is not None and time.monotonic() > since + limit:
            _send_on(workers, next(ladder, signal.SIGKILL))
            limit, since = _GRACE_SECONDS, time.monotonic()
        time.sleep(_POLL_SECONDS)


def _send_on(workers: Sequence[_Worker], number: int) -> None:
    """Send a signal to those that live, because another one has ended."""
    for worker in workers:
        if worker.process.poll() is None:
            worker.told_to_end = number
            worker.send(number)


def _as_asked(worker: _Worker, asked: Sequence[int]) -> bool:
    """Return whether a process has ended by a signal that the user sent."""
    return any(worker.code in (-number, 128 + number) for number in asked)


def _describe_loss(worker: _Worker) -> Problem:
    name = signal.Signals(-worker.code).name
    return Problem(
        f"process {worker.rank} was ended by {name}",
        f"process {worker.rank}, process id {worker.process.pid}",
        "if nobody did, the system may have run out of memory; go on with --resume",
    )


def _conclude(workers: Sequence[_Worker], total: int, asked: Sequence[int], reporter: Reporter) -> int:
    """Return the exit code of the run, once all processes have ended.

    Raises:
        StoppedBySignal: the user sent one, before any process could say so.
        WorkerError: one was lost, and nobody has said so.
    """
    speaker = workers[0] if workers[0].rank == 0 else None
    failed = [worker for worker in workers if worker.code]
    if not failed:
        return 0
    if asked and all(worker.obeyed or _as_asked(worker, asked) for worker in failed):
        if speaker is None or speaker.code >= 0:  # 0: the run was complete when it came
            return 128 + asked[0] if speaker is None else speaker.code
        raise StoppedBySignal(
            asked[0],
            where=f"process 0 of {total}, before it could say so",
            fix="start the run again, with --resume if it had begun; where it is complete, that says so",
        )
    shown = [worker for worker in failed if worker.code == _BUG and not _has_said(worker)]
    for worker in shown:
        _show(worker, reporter)
    if speaker is not None and speaker.code > 0 and not speaker.obeyed:
        return speaker.code  # it has said why
    culprits = [worker for worker in failed if not worker.obeyed] or failed
    culprit = next((worker for worker in culprits if worker.code < 0), culprits[0])
    if culprit not in shown:
        _show(culprit, reporter)
    if culprit.code > 0 and speaker is None:
        return culprit.code  # its own words stand above
    raise _name_culprit(culprit, total)


def _has_said(worker: _Worker) -> bool:
    """Return whether a process has told of its end as of a user's mistake, which the first one repeats."""
    return worker.reader is None or any(line.startswith("error: ") for line in worker.last_words())


def _show(worker: _Worker, reporter: Reporter) -> None:
    for line in worker.last_words():
        reporter.say(f"[process {worker.rank}] {line}")


def _name_culprit(worker: _Worker, total: int) -> WorkerError:
    problem = (
        _describe_loss(worker)
        if worker.code < 0
        else Problem(
            f"process {worker.rank} of {total} ended with exit code {worker.code}",
            f"process {worker.rank}",
            "see what it said last, above" if worker.last_words() else "start it alone to see why",
        )
    )
    error = WorkerError(problem.what, where=problem.where, fix=problem.fix)
    error.exit_code = max(worker.code, 0) or error.exit_code
    return error
