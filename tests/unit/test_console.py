"""What is shown on streams that are closed, or that know few characters."""

import io
import os
import sys

import pytest
from rich.console import Console

from loralab import console
from loralab.console import ClosedOutput, ConsoleReporter, ResultConsole, nobody_reads, speaks, tolerate_characters
from loralab.errors import ConfigError, WorkerError


def ascii_stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")


def written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode("ascii")


def test_characters_without_a_code_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = ascii_stream(), ascii_stream()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    tolerate_characters()
    print("größe")
    ConsoleReporter().say("世界")
    assert written(out) == "gr??e\n"
    assert written(err) == "??\n"


def test_bar_is_plain_where_blocks_cannot_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    err = ascii_stream()
    monkeypatch.setattr(sys, "stderr", err)
    reporter = ConsoleReporter()
    reporter.progress("train", 2, 2)
    assert written(err) == f"train {'#' * 24} 2/2\n"


def test_a_terminal_obeys_no_text_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    reporter = ConsoleReporter()
    reporter.say("answer: \x1b]52;c;aGk=\x07")
    assert "\x1b" in err.getvalue()  # a file keeps what was said
    reporter.console = Console(file=err, force_terminal=True, color_system=None)
    err.truncate(0)
    reporter.say("answer: \x1b]52;c;aGk=\x07\x9b")
    assert "\x1b" not in err.getvalue()
    assert "answer: \u241b]52;c;aGk=\u2407\ufffd" in err.getvalue()


def test_rows_without_a_total_are_shown_with_their_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    err = ascii_stream()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(console, "_PLAIN_SECONDS", 0.0)
    ConsoleReporter().progress("train", 1024, None, detail="4,416 rows/s")
    assert written(err) == "train: 1,024 rows, 4,416 rows/s\n"


def test_run_goes_on_when_nobody_reads_its_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)
        reporter = ConsoleReporter()
        for number in range(3):
            reporter.say(f"line {number}")
        reporter.progress("train", 2, 2)
        reporter.finish("train")


def test_closed_results_end_the_command() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    closed = os.fdopen(writer, "w", buffering=1)
    with pytest.raises(ClosedOutput):
        ResultConsole(file=closed).print("x")
    with pytest.raises(BrokenPipeError):
        closed.close()


def test_only_a_closed_pipe_has_no_reader() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        assert not nobody_reads(stream)
        os.close(reader)
        assert nobody_reads(stream)
    assert not nobody_reads(io.StringIO())
    with open(os.devnull, "w") as stream:  # noqa: PTH123 - the name is no path
        assert not nobody_reads(stream)


@pytest.mark.parametrize(
    ("count", "rank", "launcher", "spoken"),
    [
        ("1", "0", "", [True, True, True]),
        ("2", "0", "", [True, True, True]),
        ("2", "1", "", [False, False, True]),
        ("2", "1", "7", [False, True, True]),  # who started it keeps what it says
        ("2", "x", "", [True, True, True]),  # which is the mistake that it tells of
        ("2", "2", "", [True, True, True]),
        ("", "1", "", [True, True, True]),
    ],
)
def test_first_process_speaks_for_all(
    count: str, rank: str, launcher: str, spoken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LORALAB_LAUNCHER", raising=False)
    if launcher:
        monkeypatch.setenv("LORALAB_LAUNCHER", launcher)
    monkeypatch.setenv("WORLD_SIZE", count)
    monkeypatch.setenv("RANK", rank)
    told = (None, ConfigError("x", where="x", fix="x"), WorkerError("x", where="x", fix="x"))
    assert [speaks(error) for error in told] == spoken
