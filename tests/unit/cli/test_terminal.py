"""Turns out of lines, and the file of earlier inputs."""

import io
import os
import stat
import sys
from pathlib import Path

import pytest

from loralab.cli import terminal
from loralab.cli.terminal import TurnReader, history_path, keeping_history, read_edited, read_from, turn_reader
from loralab.errors import DataError

LINES = {
    "lines": ("one\ntwo\n", ["one", "two"]),
    "no end of line": ("one\ntwo", ["one", "two"]),
    "empty lines": ("one\n\n two \n", ["one", "", " two "]),
    "windows": ("one\r\ntwo\r\n", ["one", "two"]),
    "backslash": ("one \\\n  two\\\nthree\nfour\n", ["one \n  two\nthree", "four"]),
    "backslash at the end": ("one\\\n", ["one"]),
    "block": ('"""\none\n\n  two\n"""\nthree\n', ["one\n\n  two", "three"]),
    "block beside its text": ('"""one\ntwo"""\nthree\n', ["one\ntwo", "three"]),
    "block in a line": ('"""one""" \nthree\n', ["one", "three"]),
    "block with a backslash": ('"""\none\\\n"""\n', ["one\\"]),
    "block with blank ends": ('"""\n\none\n\n"""\n', ["\none\n"]),
    "empty block": ('"""\n"""\n""""""\n', ["", ""]),
    "quotes within": ('say """ now\n', ['say """ now']),
}


def read_all(text: str) -> list[tuple[str, bool, str]]:
    stream = io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8")
    reader = TurnReader(read_from(stream, None), numbered=True)
    found = []
    while (turn := reader("> ")) is not None:
        found.append((turn.text, turn.literal, turn.where))
    return found


@pytest.mark.parametrize("case", LINES.values(), ids=LINES)
def test_turns(case: tuple[str, list[str]]) -> None:
    text, turns = case
    assert [turn for turn, _, _ in read_all(text)] == turns


def test_only_texts_in_quotes_are_never_commands() -> None:
    turns = read_all('/base\n"""\n/base\n"""\n/system a\\\nb\n')
    assert [(text, literal) for text, literal, _ in turns] == [
        ("/base", False),
        ("/base", True),
        ("/system a\nb", False),
    ]
    assert [where for _, _, where in turns] == [f"standard input, line {number}" for number in (1, 2, 5)]


def test_pasted_lines_are_one_text() -> None:
    waiting = ["/one\ntwo"]
    reader = TurnReader(lambda _: waiting.pop() if waiting else None, numbered=False)
    turn = reader("> ")
    assert turn is not None
    assert (turn.text, turn.literal, turn.where) == ("/one\ntwo", True, "your turn")


def test_block_without_end_is_named() -> None:
    with pytest.raises(DataError, match="does not end") as caught:
        read_all('one\n"""\ntwo\n')
    assert caught.value.problems[0].where == "standard input, line 2"


def test_bytes_of_another_encoding_are_named() -> None:
    stream = io.TextIOWrapper(io.BytesIO("größe\n".encode("latin-1")), encoding="utf-8")
    with pytest.raises(DataError, match="not utf-8 text"):
        TurnReader(read_from(stream, None), numbered=True)("> ")


def test_prompts_keep_out_of_the_answers() -> None:
    shown = io.StringIO()
    reader = TurnReader(read_from(io.StringIO("one\\\ntwo\n"), shown), numbered=False)
    reader("to adapter> ")
    assert shown.getvalue() == "to adapter> ... "
    assert reader("to adapter> ") is None
    assert shown.getvalue() == "to adapter> ... to adapter> \n"  # the shell's prompt then begins a line


@pytest.mark.parametrize(("end", "turn"), [(EOFError, None), (KeyboardInterrupt, KeyboardInterrupt)])
def test_end_of_the_input_ends_the_line_of_the_prompt(
    end: type[BaseException], turn: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ending(_: str) -> str:
        raise end

    monkeypatch.setattr("builtins.input", ending)
    if turn is None:
        assert read_edited("> ") is None
    else:
        with pytest.raises(KeyboardInterrupt):
            read_edited("> ")
    assert capsys.readouterr().out == "\n"


def test_no_input_has_no_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert turn_reader()("> ") is None


def test_answers_cannot_command_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, wanted in (
        (Screen(), "a\u241b]52;c\u2407\nb\tü\ufffd\n"),
        (io.StringIO(), "a\x1b]52;c\x07\nb\tü\x9b\n"),
    ):
        monkeypatch.setattr(sys, "stdout", stream)
        terminal.write_answer("a\x1b]52;c\x07\nb\tü\x9b\n")
        assert stream.getvalue() == wanted


# --- the history -------------------------------------------------------------------------------------------------

readline = pytest.importorskip("readline")


@pytest.fixture(autouse=True)
def _empty_history() -> None:
    readline.clear_history()


def keep(path: Path, *lines: str) -> list[str]:
    """Type lines in a chat; return what the arrow keys had before, and clear it as a new process would."""
    notes: list[str] = []
    with keeping_history(path, notes.append):
        earlier = [readline.get_history_item(n + 1) for n in range(readline.get_current_history_length())]
        for line in lines:
            readline.add_history(line)
    readline.clear_history()
    assert notes == []
    return earlier


def test_history_is_kept_and_private(tmp_path: Path) -> None:
    path = tmp_path / "state" / "loralab" / "chat_history"
    assert keep(path, "one", "größe 世界") == []
    assert keep(path, "three") == ["one", "größe 世界"]
    assert keep(path) == ["one", "größe 世界", "three"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    path.chmod(0o644)
    keep(path, "four")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_history_stays_within_bounds(tmp_path: Path) -> None:
    keep(tmp_path / "history", *(f"line {number}" for number in range(1200)))
    kept = keep(tmp_path / "history")
    assert (len(kept), kept[-1]) == (1000, "line 1199")


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write everywhere")
def test_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    notes: list[str] = []
    with keeping_history(tmp_path / "loralab" / "chat_history", notes.append):
        pass
    assert [note.startswith("the input history is not kept: ") for note in notes] == [True]


def test_file_in_the_way_is_told(tmp_path: Path) -> None:
    (tmp_path / "loralab").write_text("a file, where a folder should be")
    notes: list[str] = []
    with keeping_history(tmp_path / "loralab" / "chat_history", notes.append):
        readline.add_history("one")
    assert [note.startswith("the input history is not kept: ") for note in notes] == [True]


def test_history_lies_in_the_folder_of_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "loralab" / "chat_history"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_path() == tmp_path / ".local" / "state" / "loralab" / "chat_history"
