"""Votes on disk: durable, cut after a kill, locked, and refused where they are none."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loralab.errors import JudgingError, StorageError
from loralab.judging.sitting import BlindPair, Sitting
from loralab.judging.votes import Act, open_votes, parse_act, read_votes

ITEMS = "e" * 64
ONE, TWO = f"{1:016x}", f"{2:016x}"
ACT = {"item": ONE, "choice": "left", "seconds": 1.5, "at": "2026-11-27T10:00:00+00:00"}


def _path(folder: Path) -> Path:
    return folder / "votes" / "anna.jsonl"


def _write(path: Path, *lines: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


HEADER = {"loralab_votes": 1, "items_sha256": ITEMS, "rater": "anna"}


def test_acts_are_on_disk_before_they_are_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    real = os.fsync
    path = _path(tmp_path)

    def watch(descriptor: int) -> None:
        real(descriptor)
        synced.append(path.read_bytes())

    with open_votes(path, rater="anna", items_sha256=ITEMS) as log:
        monkeypatch.setattr(os, "fsync", watch)
        log.append(ONE, "left", seconds=2.0)
        assert ONE in synced[-1].decode()
        log.append(ONE, "tie", seconds=None)
        log.append(TWO, "both_bad", seconds=1.0)
        log.append(ONE, None, seconds=None)
        log.extend([], closed=True)
        assert synced[-1] == path.read_bytes()
        assert len(synced) == 5
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines[0] == HEADER
    assert [line.get("choice") for line in lines[1:]] == ["left", "tie", "both_bad", None, None]
    assert lines[-1]["closed"] is True
    found = read_votes(path)
    assert found is not None
    assert (found.choices, found.closed, found.seconds()) == ({TWO: "both_bad"}, True, [1.0])


def test_nothing_is_written_before_the_first_vote(tmp_path: Path) -> None:
    with open_votes(_path(tmp_path), rater="anna", items_sha256=ITEMS):
        pass
    assert _path(tmp_path).read_bytes() == b""
    assert read_votes(_path(tmp_path)) is None
    assert read_votes(tmp_path / "none.jsonl") is None


def test_first_vote_can_be_stopped(tmp_path: Path) -> None:
    def stop() -> None:
        raise JudgingError("changed", where="there", fix="so")

    with open_votes(_path(tmp_path), rater="anna", items_sha256=ITEMS, before_first=stop) as log:
        with pytest.raises(JudgingError, match="changed"):
            log.append(ONE, "left", seconds=None)
        assert not log.votes.choices
    assert _path(tmp_path).read_bytes() == b""


@pytest.mark.parametrize("tail", [b'{"item": "00', b"\xff\xfe\xc3", b"\0" * 30])
def test_torn_last_line_is_cut(tmp_path: Path, tail: bytes) -> None:
    path = _write(_path(tmp_path), HEADER, ACT)
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    found = read_votes(path)
    assert found is not None
    assert found.choices == {ONE: "left"}
    assert path.read_bytes() == whole + tail  # reading changes nothing
    with open_votes(path, rater="anna", items_sha256=ITEMS) as log:
        log.append(TWO, "right", seconds=None)
    lines = path.read_bytes().removeprefix(whole)
    assert json.loads(lines)["item"] == TWO


def test_last_line_without_its_end_counts(tmp_path: Path) -> None:
    path = _write(_path(tmp_path), HEADER, ACT)
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))  # as editors leave it
    found = read_votes(path)
    assert found is not None
    assert found.choices == {ONE: "left"}
    with open_votes(path, rater="anna", items_sha256=ITEMS) as log:
        log.append(TWO, "right", seconds=None)
    found = read_votes(path)
    assert found is not None
    assert found.choices == {ONE: "left", TWO: "right"}


def test_whole_last_line_that_is_no_vote_is_named(tmp_path: Path) -> None:
    path = _write(_path(tmp_path), HEADER, ACT)
    path.write_bytes(path.read_bytes() + b'{"item": 1}garbage\n')
    before = path.read_bytes()
    with (
        pytest.raises(JudgingError, match="a line that is not JSON"),
        open_votes(path, rater="anna", items_sha256=ITEMS),
    ):
        pass
    assert path.read_bytes() == before


def test_torn_first_line_is_no_vote(tmp_path: Path) -> None:
    path = _write(_path(tmp_path))
    path.write_bytes(b'{"loralab_vo')
    assert read_votes(path) is None
    with open_votes(path, rater="anna", items_sha256=ITEMS) as log:
        log.append(ONE, "left", seconds=None)
    assert json.loads(path.read_text(encoding="utf-8").splitlines()[0]) == HEADER


_KILLED = """
import os, signal, sys
from pathlib import Path
from loralab.judging.votes import open_votes
with open_votes(Path(sys.argv[1]), rater="anna", items_sha256="e" * 64) as log:
    for number in range(1, 6):
        log.append(f"{number:016x}", "left", seconds=None)
    print("voted", flush=True)
    os.write(log._descriptor, b'{"item": "half')
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_process_loses_nothing_and_leaves_no_lock(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(_path(tmp_path))], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "voted\n")
    with open_votes(_path(tmp_path), rater="anna", items_sha256=ITEMS) as log:
        assert len(log.votes.choices) == 5
        log.append(f"{6:016x}", "right", seconds=None)
    found = read_votes(_path(tmp_path))
    assert found is not None
    assert len(found.choices) == 6


_HOLDING = """
import sys
from pathlib import Path
from loralab.judging.votes import open_votes
with open_votes(Path(sys.argv[1]), rater="anna", items_sha256="e" * 64) as log:
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_second_process_of_a_rater_is_refused(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDING, str(_path(tmp_path))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(JudgingError, match="'anna' is judging in another process") as raised,
            open_votes(_path(tmp_path), rater="anna", items_sha256=ITEMS),
        ):
            pass
        assert "--rater NAME" in str(raised.value)
        with open_votes(tmp_path / "votes" / "bert.jsonl", rater="bert", items_sha256=ITEMS) as log:
            log.append(ONE, "tie", seconds=None)
        process.communicate("\n")
    with open_votes(_path(tmp_path), rater="anna", items_sha256=ITEMS):
        pass


def test_second_sitting_in_the_same_process_is_refused_and_reading_keeps_the_lock(tmp_path: Path) -> None:
    with open_votes(_path(tmp_path), rater="anna", items_sha256=ITEMS) as log:
        log.append(ONE, "left", seconds=None)
        assert read_votes(_path(tmp_path)) is not None
        with (
            pytest.raises(JudgingError, match="another process"),
            open_votes(_path(tmp_path), rater="anna", items_sha256=ITEMS),
        ):
            pass


def test_full_disk_takes_nothing_and_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    with open_votes(_path(tmp_path), rater="anna", items_sha256=ITEMS) as log:
        log.append(ONE, "left", seconds=None)
        before = _path(tmp_path).read_bytes()

        def half(descriptor: int, data: bytes) -> int:
            if len(data) < 20:
                raise OSError(28, "No space left on device")
            return real(descriptor, data[: len(data) // 2])

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", half)
            with pytest.raises(StorageError, match="No space left on device"):
                log.append(TWO, "left", seconds=None)
        assert _path(tmp_path).read_bytes() == before
        assert TWO not in log.votes.choices
        log.append(TWO, "right", seconds=None)
        assert log.votes.choices == {ONE: "left", TWO: "right"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"item": "0"}, "item '0'"),
        ({"item": None}, "item 'None'"),
        ({"choice": "adapter"}, "choice 'adapter'"),
        ({"choice": ["left"]}, "choice"),
        ({"seconds": -1}, "seconds '-1'"),
        ({"seconds": float("nan")}, "seconds 'nan'"),
        ({"seconds": True}, "seconds 'True'"),
        ({"seconds": 1e9}, "seconds"),
        ({"at": "yesterday"}, "time 'yesterday'"),
        ({"at": 5}, "time '5'"),
        ({"more": 1}, "keys"),
    ],
)
def test_what_is_no_vote_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(JudgingError, match="not a vote") as raised:
        parse_act(ACT | change, where="line 7")
    assert words in str(raised.value)
    assert "where: line 7" in str(raised.value)


def test_votes_as_they_are_sent() -> None:
    assert parse_act(ACT, where="") == Act(ONE, "left", 1.5, ACT["at"])  # type: ignore[arg-type]
    assert parse_act(ACT | {"choice": None, "seconds": None, "at": "2026-11-27T10:00:00.123Z"}, where="").choice is None
    with pytest.raises(JudgingError, match="list instead of an object"):
        parse_act([], where="")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([HEADER, {"item": ONE}, ACT], "not a vote"),
        ([{"rater": "anna"}, ACT], "does not name rater and items"),
        ([ACT, ACT], "does not name rater and items"),
        ([HEADER | {"loralab_votes": 9}, ACT], "version '9' is not known"),
        ([HEADER, {"closed": True, "at": ACT["at"]}, ACT], "behind the end"),
    ],
)
def test_broken_file_is_named(tmp_path: Path, lines: list[object], words: str) -> None:
    path = _write(_path(tmp_path), *lines)
    with pytest.raises(JudgingError, match=words):
        read_votes(path)


def test_broken_line_in_the_middle_is_no_torn_one(tmp_path: Path) -> None:
    path = _write(_path(tmp_path), HEADER, ACT)
    path.write_bytes(path.read_bytes() + b"{half\n" + f"{json.dumps(ACT)}\n".encode())
    with pytest.raises(JudgingError, match="a line that is not JSON") as raised:
        read_votes(path)
    assert f"{path}:3" in str(raised.value)


def test_votes_of_others_are_refused(tmp_path: Path) -> None:
    path = _write(_path(tmp_path), HEADER, ACT)
    with pytest.raises(JudgingError, match="on other items"), open_votes(path, rater="anna", items_sha256="f" * 64):
        pass
    with (
        pytest.raises(JudgingError, match="votes of 'anna', not of 'Anna'"),
        open_votes(path, rater="Anna", items_sha256=ITEMS),
    ):
        pass


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "votes").write_text("a file")
    with (
        pytest.raises(StorageError, match="cannot write the votes of 'anna'"),
        open_votes(_path(tmp_path), rater="anna", items_sha256=ITEMS),
    ):
        pass


def _pairs(count: int = 3) -> tuple[BlindPair, ...]:
    return tuple(BlindPair(f"{number:016x}", "p", "a", "b", ()) for number in range(1, count + 1))


def test_sitting_takes_changes_and_withdraws_until_it_is_closed(tmp_path: Path) -> None:
    with open_votes(_path(tmp_path), rater="anna", items_sha256=ITEMS) as log:
        sitting = Sitting("anna", _pairs(), log)
        sitting.record(ONE, "left", seconds=1.0)
        sitting.record(ONE, "left", seconds=9.0)  # sent again, as after a lost connection
        sitting.record(TWO, "tie", seconds=None)
        sitting.record(ONE, "right", seconds=2.0)
        sitting.withdraw(TWO)
        sitting.withdraw(TWO)
        assert dict(sitting.answers) == {ONE: "right"}
        assert len(log.votes.acts) == 4
        sitting.close()
        sitting.close()
        assert sitting.closed
        with pytest.raises(JudgingError, match="is closed"):
            sitting.record(TWO, "tie", seconds=None)
        with pytest.raises(JudgingError, match="is closed"):
            sitting.withdraw(ONE)
    with open_votes(_path(tmp_path), rater="anna", items_sha256=ITEMS) as log:
        assert Sitting("anna", _pairs(), log).closed


def test_sitting_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    with open_votes(_path(tmp_path), rater="anna", items_sha256=ITEMS) as log:
        sitting = Sitting("anna", _pairs(), log)
        with pytest.raises(JudgingError, match="no such item: '0000000000000009'"):
            sitting.record(f"{9:016x}", "left", seconds=None)
        with pytest.raises(JudgingError, match="no such choice: 'adapter'"):
            sitting.record(ONE, "adapter", seconds=None)  # type: ignore[arg-type]
        for seconds in (-1.0, float("nan"), float("inf")):
            with pytest.raises(JudgingError, match="no time"):
                sitting.record(ONE, "left", seconds=seconds)
        assert not sitting.answers
