"""What processes say to each other: sums, shared values, and how the end of one reaches the others."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from loralab.errors import ConfigError
from loralab.training.distributed import ALONE, Processes, joined
from support.command import Answer
from support.processes import Team, start_program

_HEAD = """
import os, signal, sys, time
import numpy as np
from loralab.cli.application import leave
from loralab.errors import ConfigError, LoralabError
from loralab.training.distributed import joined

def main(act):
    try:
        with joined("cpu") as processes:
            act(processes)
    except LoralabError as error:
        print(f"{type(error).__name__}\\n{error}")
        leave(error.exit_code)
"""


def start(body: str, folder: Path, *, count: int = 2) -> Team:
    """Start `body`, the lines of a function of `processes`, in several processes."""
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    return start_program(f"{_HEAD}\ndef act(processes):\n{lines}\nmain(act)\n", folder=folder, count=count)


def run(body: str, folder: Path, *, count: int = 2) -> list[Answer]:
    """Run `body` as `start` does, to its end."""
    return start(body, folder, count=count).answers()


def test_one_process_is_all() -> None:
    assert (ALONE.first, ALONE.count, ALONE.share(3), ALONE.gather(3), ALONE.largest(3)) == (True, 1, 3, [3], 3)
    np.testing.assert_array_equal(ALONE.sum(np.array([1.0, 2.0])), [1.0, 2.0])
    with ALONE.first_goes_ahead(), joined("cpu") as processes:
        assert processes is ALONE


def test_three_processes_agree(tmp_path: Path) -> None:
    body = """
me = processes.rank
print(processes.first, processes.count, processes.share("first" if me == 0 else None), processes.gather(me * 10))
print(processes.largest([4, 9, 1][me]), processes.sum(np.array([[me, 0.25], [1e300, -me]])).tolist())
with processes.first_goes_ahead():
    if me > 0:
        assert os.path.exists("made")
    else:
        time.sleep(0.3)
        open("made", "w").close()
processes.wait()
"""
    answers = run(body, tmp_path, count=3)
    for rank, answer in enumerate(answers):
        assert answer.code == 0, answer.err
        assert answer.out.splitlines() == [
            f"{rank == 0} 3 first [0, 10, 20]",
            "9 [[3.0, 0.75], [3e+300, -3.0]]",
        ]


@pytest.mark.parametrize("failing", [0, 1])
def test_error_of_one_process_ends_all(failing: int, tmp_path: Path) -> None:
    body = f"""
if processes.rank == {failing}:
    raise ConfigError("what", where="there", fix="mend it")
processes.wait()
"""
    answers = run(body, tmp_path)
    other = answers[1 - failing]
    assert [answer.code for answer in answers] == [2, 2]
    assert answers[failing].out == "ConfigError\nerror: what\nwhere: there\nfix:   mend it\n"
    assert other.out == f"LoralabError\nerror: what\nwhere: process {failing}: there\nfix:   mend it\n"


def test_bug_in_one_process_ends_all(tmp_path: Path) -> None:
    body = """
if processes.rank == 1:
    {}["key"]
processes.wait()
"""
    first, second = run(body, tmp_path)
    assert first.code == 1
    assert first.out.splitlines()[1] == "error: process 1 failed: KeyError: 'key'"
    assert "Traceback" in second.err


@pytest.mark.parametrize("lost", [0, 1])
def test_killed_process_ends_all(lost: int, tmp_path: Path) -> None:
    body = f"""
processes.wait()
if processes.rank == {lost}:
    os.kill(os.getpid(), signal.SIGKILL)
processes.wait()
"""
    answers = run(body, tmp_path)
    assert answers[lost].code == -signal.SIGKILL
    assert answers[1 - lost].code == 2
    kind, *lines = answers[1 - lost].out.splitlines()
    assert kind == "WorkerError"
    assert [line[:7] for line in lines] == ["error: ", "where: ", "fix:   "]
    assert "another process of this run has ended without a word" in lines[0]
    assert lines[1] == f"where: process {1 - lost} of 2"


def test_one_process_speaks_of_a_killed_one(tmp_path: Path) -> None:
    body = """
processes.wait()
if processes.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
processes.wait()
"""
    first, _, third = run(body, tmp_path, count=3)
    assert (first.code, third.code) == (2, 2)
    assert first.out.startswith("WorkerError")
    assert third.out.startswith("LoralabError")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_outside_of_the_steps_has_words(sent: signal.Signals, tmp_path: Path) -> None:
    body = f"""
if processes.rank == 1:
    os.kill(os.getpid(), {int(sent)})
    time.sleep(20)
processes.wait()
"""
    answers = run(body, tmp_path)
    assert [answer.code for answer in answers] == [128 + sent] * 2
    expected = f"StoppedBySignal\nerror: stopped by {sent.name}\nwhere: process 1 of 2, at once\n"
    assert answers[1].out.startswith(expected)
    assert answers[0].out.startswith(f"LoralabError\nerror: stopped by {sent.name}\nwhere: process 1 of 2, at once")


def test_a_process_that_has_done_its_part_leaves_the_end_to_the_others(tmp_path: Path) -> None:
    body = """
if processes.rank == 0:
    while not os.path.exists("signalled"):
        time.sleep(0.05)
else:
    open("waits", "w").close()
"""
    team = start(body, tmp_path)
    team.wait_for((tmp_path / "waits").exists)
    time.sleep(0.5)
    for sent in (signal.SIGINT, signal.SIGTERM):
        team.members[1].send_signal(sent)
    (tmp_path / "signalled").touch()
    assert [answer.code for answer in team.answers()] == [0, 0]


def test_the_signal_of_a_launcher_is_told_as_what_it_was_sent_for(tmp_path: Path) -> None:
    body = """
if processes.rank == 1:
    raise ConfigError("what", where="there", fix="mend it")
while not os.path.exists("ended"):  # busy with work of its own, which no broken connection ends
    time.sleep(0.05)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(20)
"""
    team = start(body, tmp_path)
    team.members[1].wait()
    (tmp_path / "ended").touch()
    first, second = team.answers()
    assert (first.code, second.code) == (2, 2)
    assert first.out == "LoralabError\nerror: what\nwhere: process 1: there\nfix:   mend it\n"


def test_processes_without_a_meeting_place_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with (
        pytest.raises(ConfigError, match="started as one of 2 processes, but the others were not found"),
        joined("cpu"),
    ):
        pass


def test_each_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    second = Processes(1, 2, local_rank=1, local_count=2)
    assert [second.device_setting(setting) for setting in ("cpu", "cuda")] == ["cpu", "cuda:1"]
    assert ALONE.device_setting("cuda:3") == "cuda:3"
    for available, expected in ((True, "cuda:1"), (False, "cpu")):
        monkeypatch.setattr("torch.cuda.is_available", lambda available=available: available)
        assert second.device_setting("auto") == expected
    for setting in ("mps", "cuda:0"):
        with pytest.raises(ConfigError, match=f"2 processes cannot share one device, got '{setting}'"):
            second.device_setting(setting)
