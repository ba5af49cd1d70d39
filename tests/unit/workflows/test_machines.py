"""How the machines of a run find each other, and what is said where they do not."""

import socket
from collections.abc import Iterator
from datetime import timedelta

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from loralab.errors import ConfigError, WorkerError
from loralab.workflows import machines as module
from loralab.workflows.machines import Machines, agree, meet, resolve_machines


def test_machines() -> None:
    assert resolve_machines(1, None, None) == Machines(1, 0, "127.0.0.1", 0)
    assert resolve_machines(3, 2, "node0:29500") == Machines(3, 2, "node0", 29500)


@pytest.mark.parametrize(
    ("count", "rank", "address", "what"),
    [
        (1, 1, None, "for one machine"),
        (1, None, "node0:29500", "for one machine"),
        (2, 0, None, "no address of the first machine: None"),
        (2, 0, "node0", "no address of the first machine: 'node0'"),
        (2, 0, "node0:99999", "no address of the first machine"),
        (2, None, "node0:29500", "no number of this machine: None"),
        (2, 2, "node0:29500", "no number of this machine: 2"),
    ],
)
def test_machines_that_contradict_each_other(count: int, rank: int | None, address: str | None, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        resolve_machines(count, rank, address)


@pytest.fixture
def port() -> Iterator[int]:
    """A port on which something listens that answers nobody."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        yield int(listening.getsockname()[1])


@pytest.fixture
def said() -> list[str]:
    return []


def test_a_port_that_is_taken(port: int, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        meet(Machines(2, 0, "127.0.0.1", port), said.append)
    assert caught.value.problems[0].what == f"cannot listen on port {port}: another program does"


def test_nobody_at_the_address(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIND_LIMIT", timedelta(seconds=0.5))
    monkeypatch.setattr(module, "_QUIET_SECONDS", 0.1)
    for host in ("127.0.0.1", "no.such.host.invalid"):
        with pytest.raises(ConfigError, match=f"no machine 0 at {host}:1 within 0 seconds") as caught:
            meet(Machines(2, 1, host, 1), said.append)
        assert "start machine 0 too" in caught.value.problems[0].fix
        assert said[-1].startswith(f"waiting for machine 0 at {host}:1: ")


def test_a_first_machine_under_the_name_of_another(said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ANSWER_SECONDS", 0.2)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        free = int(found.getsockname()[1])
    with pytest.raises(ConfigError, match="this machine does not reach itself") as caught:
        meet(Machines(2, 0, "no.such.host.invalid", free), said.append)
    assert caught.value.problems[0].where == "option --main-address"


def test_something_else_at_the_address(port: int, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ANSWER_SECONDS", 0.5)
    with pytest.raises(ConfigError, match=f"what listens at 127.0.0.1:{port} is not the launcher of machine 0"):
        meet(Machines(2, 1, "127.0.0.1", port), said.append)


def test_machines_of_one_number(said: list[str]) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.add("loralab/machine-claimed/1", 1)
    with pytest.raises(ConfigError, match="a machine with number 1 has come before this one"):
        agree(store, Machines(2, 1, "127.0.0.1", store.port), processes=1, arguments=["train"], say=said.append)


def test_a_first_machine_that_has_ended(said: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    first = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    second = TCPStore("127.0.0.1", first.port, is_master=False, wait_for_workers=False)
    place = Machines(2, 1, "127.0.0.1", first.port)
    del first
    with pytest.raises(WorkerError, match="the first machine has ended before all had come"):
        agree(second, place, processes=1, arguments=["train"], say=said.append)
    capfd.readouterr()  # torch tells of it too
