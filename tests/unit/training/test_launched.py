"""What the environment says of who started a process."""

import os
import subprocess
import sys

import pytest

from loralab.errors import ConfigError, WorkerError
from loralab.training.distributed import joined
from loralab.training.launched import Place, end_with_launcher, read_place

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def setting(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in (*VARIABLES, "LORALAB_LAUNCHER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, Place()),
        ({"WORLD_SIZE": ""}, Place()),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, Place()),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, Place()),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, Place(1, 2, 1, 2)),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Place(3, 4, 1, 2)),
    ],
)
def test_places(variables: dict[str, str], place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    setting(monkeypatch, **variables)
    assert read_place() == place


@pytest.mark.parametrize(
    ("variables", "what"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "the launcher asks for FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "the launcher asks for DeepSpeed"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "the launcher asks for mixed precision 'bf16'"),
        ({"WORLD_SIZE": "two"}, "no number of processes: 'two'"),
        ({"WORLD_SIZE": "0"}, "no number of processes: '0'"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK is not set in a run of 2 processes (WORLD_SIZE)"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK is not set in a run of 2 processes (LOCAL_WORLD_SIZE)"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK is 2 in a run of 2 processes"),
        ({"WORLD_SIZE": "2", "RANK": "x", "LOCAL_RANK": "0"}, "no number of a process: 'x'"),
        (
            {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"},
            "LOCAL_RANK is 3 in a run of 2 processes (LOCAL_WORLD_SIZE)",
        ),
        ({"RANK": "0"}, "RANK is 0 and WORLD_SIZE is not set: one process of how many?"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK is 0 and WORLD_SIZE is not set"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK is 1 and WORLD_SIZE is 1"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "started by MPI as one of 2 processes"),
    ],
)
def test_what_a_launcher_may_not_ask(variables: dict[str, str], what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting(monkeypatch, **variables)
    with pytest.raises(ConfigError) as caught, joined("cpu"):
        pass
    assert caught.value.problems[0].what.startswith(what)
    assert any(name in caught.value.problems[0].where for name in variables)


def test_a_process_whose_launcher_is_gone_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    setting(monkeypatch, LORALAB_LAUNCHER=str(gone.pid))
    with pytest.raises(WorkerError, match="`loralab launch`, which started this process, has ended"):
        end_with_launcher()


def test_a_program_that_a_process_starts_outlives_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    setting(monkeypatch, LORALAB_LAUNCHER=str(os.getpid()))  # lives, and is not this process's parent
    end_with_launcher()
