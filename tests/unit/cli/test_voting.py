"""Voting in the terminal, where somebody sits: times, keys that are asked for again, and how it is left."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from loralab.cli import voting
from loralab.cli.voting import KEYS, TerminalVoting
from loralab.errors import JudgingError
from loralab.judging.folder import PreferenceFolder
from loralab.judging.sitting import Choice, Sitting
from support.preference_tests import make_items


@pytest.fixture
def sitting(tmp_path: Path) -> Iterator[Sitting]:
    items = make_items(3)
    folder = PreferenceFolder(tmp_path, tmp_path / "pictures")
    folder.keep_items(items)
    with folder.open_sitting(items, "anna") as found:
        yield found


def _hold(sitting: Sitting, *keys: str, person: bool = True) -> str:
    """Hold a sitting with these lines; return what was shown."""
    lines, screen = iter(keys), io.StringIO()

    def read_line(question: str) -> str | None:
        screen.write(question)
        return next(lines, None)

    TerminalVoting(sitting, read_line=read_line, screen=screen, person=person).hold()
    return screen.getvalue()


def test_times_are_taken_where_somebody_sits(sitting: Sitting, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 107.25, 200.0, 203.0, 300.0])
    monkeypatch.setattr("loralab.cli.voting.time.monotonic", lambda: next(clock))
    recorded: list[float | None] = []
    record = sitting.record

    def watch(item: str, choice: Choice, *, seconds: float | None) -> None:
        recorded.append(seconds)
        record(item, choice, seconds=seconds)

    monkeypatch.setattr(sitting, "record", watch)
    _hold(sitting, "a", "t")
    assert recorded == [7.2, 3.0]


def test_pair_that_lay_open_for_days_can_be_voted_on(sitting: Sitting, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 300_000.0, 300_001.0])
    monkeypatch.setattr("loralab.cli.voting.time.monotonic", lambda: next(clock))
    _hold(sitting, "a")
    assert list(sitting.answers.values()) == ["left"]


def test_unknown_key_is_asked_for_again(sitting: Sitting) -> None:
    shown = _hold(sitting, "left", "", "1", "b", "q")
    assert shown.count(KEYS) == 3
    assert list(sitting.answers.values()) == ["right"]


def test_unknown_key_on_a_pipe_is_an_error(sitting: Sitting) -> None:
    with pytest.raises(JudgingError, match="not a key: 'left'") as raised:
        _hold(sitting, "", "a", "left", person=False)
    assert "standard input, line 3" in str(raised.value)
    assert len(sitting.answers) == 1


def test_skipped_pairs_come_again_at_the_end(sitting: Sitting) -> None:
    _hold(sitting, "s", "a", "a", "b", "y")
    assert sitting.closed
    assert sitting.answers[sitting.pairs[0].item] == "right"


@pytest.mark.parametrize("last", ["n", "q", None])
def test_sitting_is_left_open_at_its_end(sitting: Sitting, last: str | None) -> None:
    shown = _hold(sitting, "a", "b", "t", "what", *([] if last is None else [last]))
    assert voting.END_KEYS in shown
    assert not sitting.closed
    assert len(sitting.answers) == 3


def test_back_from_the_end_and_from_an_earlier_time(sitting: Sitting) -> None:
    _hold(sitting, "a", "b", "t", "u", "n", "n")
    assert [sitting.answers[pair.item] for pair in sitting.pairs] == ["left", "right", "both_bad"]
    shown = _hold(sitting, "u", "u", "q")
    assert "3 pairs, 3 of them judged already" in shown
    assert "Taken back; the choice was n." in shown
    assert [sitting.answers.get(pair.item) for pair in sitting.pairs] == ["left", None, None]


def test_interrupt_leaves_the_sitting(sitting: Sitting, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> str:
        raise KeyboardInterrupt

    stdin = io.StringIO()
    monkeypatch.setattr(stdin, "readline", interrupt)
    monkeypatch.setattr("sys.stdin", stdin)
    voting.vote_in_terminal(sitting, screen=io.StringIO())
    assert not sitting.answers
    monkeypatch.setattr("sys.stdin", None)
    voting.vote_in_terminal(sitting, screen=io.StringIO())
