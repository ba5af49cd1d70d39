"""How many threads compute: no more than the machine, its container and the environment leave."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loralab.models import threads
from loralab.models.limits import Limits, read_limits, runnable_cpus
from loralab.models.threads import VARIABLES, resolve_threads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def eight_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """PyTorch with eight threads on eight processors, in no container, under an environment that says nothing."""
    before = torch.get_num_threads()
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "runnable_cpus", lambda: 8)
    monkeypatch.setattr(threads, "read_limits", lambda: Limits(None))
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


def test_enough_processors_change_nothing() -> None:
    choice = resolve_threads(CPU)["threads"]
    assert (choice.value, torch.get_num_threads()) == (8, 8)
    assert choice.reason == "PyTorch's choice, on 8 processors"


@pytest.mark.parametrize(
    ("quota", "expected"), [("200000 100000", 2), ("250000 100000", 2), ("50000 100000", 1), ("max 100000", 8)]
)
def test_a_containers_quota(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quota: str, expected: int) -> None:
    root, member = tmp_path / "groups", tmp_path / "member"
    (root / "job").mkdir(parents=True)
    (root / "cgroup.controllers").write_text("cpu memory")
    (root / "job/cpu.max").write_text(f"{quota}\n")
    member.write_text("0::/job\n")
    monkeypatch.setattr(threads, "read_limits", lambda: read_limits(root, member))
    choice = resolve_threads(CPU)["threads"]
    assert choice.value == torch.get_num_threads() == expected
    assert ("the container's quota leaves" in choice.reason) is (expected < 8)


def test_the_quota_of_old_control_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"cpu.cfs_quota_us": 300_000, "cpu.cfs_period_us": 100_000}.items():
        (tmp_path / "cpu").mkdir(exist_ok=True)
        (tmp_path / "cpu" / name).write_text(f"{value}\n")
    monkeypatch.setattr(threads, "read_limits", lambda: read_limits(tmp_path, tmp_path / "none"))
    choice = resolve_threads(CPU)["threads"]
    assert choice.value == torch.get_num_threads() == 3
    assert choice.reason == "PyTorch would take 8; the container's quota leaves 3 processors"


def test_processors_that_the_process_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "runnable_cpus", lambda: 2)
    choice = resolve_threads(CPU)["threads"]
    assert choice.value == torch.get_num_threads() == 2
    assert choice.reason == "PyTorch would take 8; this process may run on 2 processors"


def test_fewer_threads_than_processors_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the logical processors is PyTorch's own choice; three on two and a half is no more than they can use."""
    for now, limits in ((4, Limits(None)), (3, Limits(2, 2.5))):
        torch.set_num_threads(now)
        monkeypatch.setattr(threads, "read_limits", lambda limits=limits: limits)
        assert resolve_threads(CPU)["threads"].value == torch.get_num_threads() == now


def test_processes_share_the_processors() -> None:
    choice = resolve_threads(CPU, sharing=3)["threads"]
    assert choice.value == torch.get_num_threads() == 2
    assert choice.reason.endswith("8 processors shared by 3 processes")


@pytest.mark.parametrize("name", VARIABLES)
def test_what_the_user_says_stands(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "8")
    monkeypatch.setattr(threads, "runnable_cpus", lambda: 2)
    choice = resolve_threads(CPU)["threads"]
    assert (choice.value, torch.get_num_threads()) == (8, 8)
    assert choice.reason == f"set by {name}=8"


def test_other_devices_have_none() -> None:
    assert resolve_threads(torch.device("meta")) == {}
    assert torch.get_num_threads() == 8


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_affinity_is_read() -> None:
    code = (
        "import os; from loralab.models.limits import runnable_cpus;"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(runnable_cpus())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "1"
    assert runnable_cpus() == len(os.sched_getaffinity(0))
