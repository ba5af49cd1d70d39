"""The machines of a run: how their launchers find each other, agree, and part.

Owns the store where all processes of the run meet; the first machine's launcher holds it, so that the last word of a
process outlives it. Does not own the processes: `launch.py` does.
"""

import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from loralab.errors import ConfigError, WorkerError, excerpt

_FIND_LIMIT = timedelta(minutes=10)
_POLL_SECONDS = 0.1
# One try to reach the first machine's port; a signal is noticed between two.
_TRY_SECONDS = 2.0
# Once something listens there: how long it may take to say that it is a store.
_ANSWER_SECONDS = 30.0
# Nothing is said of a wait that is over sooner.
_QUIET_SECONDS = 3.0
# How long the first machine keeps the store for the others when its own processes are done.
_LEAVE_SECONDS = 60.0

Say = Callable[[str], None]


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

    @property
    def address(self) -> str:
        """Host and port, as `--main-address` has them."""
        return f"{self.host}:{self.port}"


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


def meet(machines: Machines, say: Say) -> TCPStore:
    """Return the store where the processes of the run meet.

    Args:
        machines: those of the run.
        say: told of a wait.

    Raises:
        ConfigError: the first machine is not found, or cannot listen.
    """
    if machines.rank > 0:
        return _reach(machines, say, limit=_FIND_LIMIT.total_seconds())
    try:
        # Its own launcher comes by the loopback: under a name that is another machine's it would wait for that.
        store = TCPStore("127.0.0.1", machines.port, is_master=True, wait_for_workers=False, timeout=_FIND_LIMIT)
    except (RuntimeError, ValueError) as error:
        taken = "EADDRINUSE" in str(error)
        raise ConfigError(
            f"cannot listen on port {machines.port}: {'another program does' if taken else excerpt(error)}",
            where="option --main-address",
            fix="name another free port of this machine there, the same on all machines",
        ) from error
    if machines.count > 1:
        _reach(machines, say, limit=_ANSWER_SECONDS)  # as its processes will, and those of the others
    return store


def _reach(machines: Machines, say: Say, *, limit: float) -> TCPStore:
    """Connect to the first machine's store, patiently: the machines do not start at the same moment."""
    started, said = time.monotonic(), False
    while True:
        try:
            socket.create_connection((machines.host, machines.port), timeout=_TRY_SECONDS).close()
            break
        except OSError as error:
            waited = time.monotonic() - started
            if waited > limit:
                raise _not_found(machines, excerpt(error), limit) from error
            if not said and waited > _QUIET_SECONDS:
                say(f"waiting for machine 0 at {machines.address}: {excerpt(error)}")
                said = True
            time.sleep(_POLL_SECONDS)
    return _connect(machines)


def _not_found(machines: Machines, why: str, limit: float) -> ConfigError:
    own = machines.rank == 0
    return ConfigError(
        f"{'this machine does not reach itself' if own else 'no machine 0'} at {machines.address} within "
        f"{limit:.0f} seconds: {why}",
        where="option --main-address",
        fix="give a name of this machine, since its number is 0"
        if own
        else "start machine 0 too, and give a name of it and a free port there that all machines reach",
    )


def _connect(machines: Machines) -> TCPStore:
    """Return a client of the store, or an error where what listens there is none: torch would wait for it for ever."""
    found: list[TCPStore | BaseException] = []

    def connect() -> None:
        try:
            limit = timedelta(seconds=_ANSWER_SECONDS)
            store = TCPStore(machines.host, machines.port, is_master=False, wait_for_workers=False, timeout=limit)
            store.set_timeout(_FIND_LIMIT)
            found.append(store)
        except (RuntimeError, ValueError) as error:
            found.append(error)

    connecting = threading.Thread(target=connect, daemon=True)
    connecting.start()
    connecting.join(_ANSWER_SECONDS)
    if found and isinstance(found[0], TCPStore):
        return found[0]
    why = f" ({excerpt(found[0])})" if found and isinstance(found[0], BaseException) else ""
    raise ConfigError(
        f"what listens at {machines.address} is not the launcher of machine 0{why}",
        where="option --main-address",
        fix="name a free port of machine 0, the same on all machines",
    )


def agree(store: TCPStore, machines: Machines, *, processes: int, arguments: Sequence[str], say: Say) -> list[int]:
    """Return how many processes each machine runs, once all of them have said so.

    Args:
        store: where they meet.
        machines: those of the run.
        processes: how many this machine runs.
        arguments: what each process is started with.
        say: told of a wait.

    Raises:
        ConfigError: a machine did not come, came twice, or was started with other arguments.
        WorkerError: the first machine has ended.
    """
    try:
        _claim_rank(store, machines)
        return _compare(store, machines, processes=processes, arguments=arguments, say=say)
    except RuntimeError as error:
        raise WorkerError(
            f"the first machine has ended before all had come ({excerpt(error)})",
            where=f"machine {machines.rank} of {machines.count}, option --main-address",
            fix="see what it said, and start `loralab launch` on all machines again",
        ) from error


def _claim_rank(store: TCPStore, machines: Machines) -> None:
    if store.add(f"loralab/machine-claimed/{machines.rank}", 1) > 1:
        raise ConfigError(
            f"a machine with number {machines.rank} has come before this one",
            where="option --machine-rank",
            fix="give each machine its own number, from 0; after a start that was broken off, start all of them again",
        )


def _compare(store: TCPStore, machines: Machines, *, processes: int, arguments: Sequence[str], say: Say) -> list[int]:
    own = {
        "processes": processes,
        "machines": machines.count,
        "arguments": hashlib.sha256(json.dumps(list(arguments)).encode()).hexdigest(),
    }
    store.set(f"loralab/machine/{machines.rank}", json.dumps(own))
    found = []
    for rank in range(machines.count):
        _wait_for_machine(store, machines, rank=rank, say=say)
        found.append(json.loads(store.get(f"loralab/machine/{rank}")))
        for name, what in (("machines", "--num-machines"), ("arguments", "the configuration or its overrides")):
            if found[rank][name] != own[name]:
                raise ConfigError(
                    f"machine {rank} was started with another value of {what} than machine {machines.rank}",
                    where="command line",
                    fix="give the same command on all machines but for --machine-rank and --num-processes",
                )
    return [int(each["processes"]) for each in found]


def _wait_for_machine(store: TCPStore, machines: Machines, *, rank: int, say: Say) -> None:
    started, said = time.monotonic(), False
    while not store.check([f"loralab/machine/{rank}"]):
        waited = time.monotonic() - started
        if waited > _FIND_LIMIT.total_seconds():
            raise ConfigError(
                f"machine {rank} of {machines.count} did not come within {_FIND_LIMIT}",
                where="option --num-machines",
                fix=f"start `loralab launch` there with --machine-rank {rank} and the same --main-address",
            )
        if not said and waited > _QUIET_SECONDS:
            say(f"waiting for machine {rank} of {machines.count}")
            said = True
        time.sleep(_POLL_SECONDS)


def take_leave(store: TCPStore, machines: Machines) -> None:
    """Keep the store until the other machines' processes are done with it.

    Args:
        store: where the processes met.
        machines: those of the run.
    """
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
