"""What trackers are sent: each line once, across starts, and nothing more once one has failed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loralab.config.tracker_checks import check_trackers, hide_secrets
from loralab.errors import ConfigError
from loralab.training import trackers
from loralab.training.trackers import Beginning, TrackedRun, Trackers

Sent = list[tuple[int, dict[str, float]]]


class Recorder:
    """Keeps what it is sent; fails where it is told to."""

    def __init__(self, run: TrackedRun, sent: Sent, fails_at: int | None = None) -> None:
        self.identity = run.identity or "first"
        self.run = run
        self.sent = sent
        self.fails_at = fails_at

    def send(self, figures: dict[str, float], step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("no way to http://me:hunter2secret@host")
        self.sent.append((step, dict(figures)))

    def finish(self, *, failed: bool) -> None:
        self.sent.append((-1, {"failed": float(failed)}))


def begin(folder: Path, lines: list[dict[str, Any]], note: Callable[[str], None] = print, run: str = "a") -> Trackers:
    found = Trackers(["wandb"], folder, beginning=lambda: Beginning(run, "run", {}, lines), note=note)
    found.open()
    return found


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    sent: Sent = []
    monkeypatch.setitem(trackers.BUILDERS, "wandb", lambda run: Recorder(run, sent))
    return sent


def line(step: int, **figures: Any) -> dict[str, Any]:
    return {"step": step, "epoch": 0.5, **figures}


def test_each_line_is_sent_once_across_starts(tmp_path: Path, sent: Sent) -> None:
    first = begin(tmp_path, [])
    first.send(line(1, loss=2.0))
    first.send(line(2, loss=1.5))
    first.send(line(2, eval_loss=1.4))
    first.send(line(3, loss=1.2))
    second = begin(tmp_path, [line(1, loss=2.0), line(2, loss=1.5)])  # goes on from step 2
    second.send(line(2, eval_loss=1.4))
    second.send(line(3, loss=1.2))
    second.send(line(4, loss=1.1))
    second.close({"final/eval_loss": 1.0}, step=4, failed=False)
    assert [(step, *figures) for step, figures in sent] == [
        (1, "epoch", "loss"),
        (2, "epoch", "loss"),
        (2, "epoch", "eval_loss"),
        (3, "epoch", "loss"),
        (4, "epoch", "loss"),
        (4, "final/eval_loss"),
        (-1, "failed"),
    ]


def test_a_tracker_gets_what_it_missed_and_another_run_gets_all(tmp_path: Path, sent: Sent) -> None:
    lines = [line(1, loss=2.0), line(2, loss=None)]
    begin(tmp_path, lines)
    assert [figures for _, figures in sent] == [{"epoch": 0.5, "loss": 2.0}, {"epoch": 0.5}]  # what is no number is not
    begin(tmp_path, lines)
    assert len(sent) == 2
    begin(tmp_path, lines, run="b")
    assert len(sent) == 4


def test_a_failure_is_said_once_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: Sent = []
    monkeypatch.setitem(trackers.BUILDERS, "wandb", lambda run: Recorder(run, sent, fails_at=2))
    notes: list[str] = []
    found = begin(tmp_path, [], notes.append)
    for step in range(1, 5):
        found.send(line(step, loss=1.0))
    found.close(None, step=4, failed=True)
    assert [step for step, _ in sent] == [1]
    assert len(notes) == 1
    assert "tracker wandb failed" in notes[0]
    assert "hunter2" not in notes[0]


def test_a_damaged_state_begins_anew(tmp_path: Path, sent: Sent) -> None:
    notes: list[str] = []
    begin(tmp_path, [line(1, loss=2.0)])
    (tmp_path / "state.json").write_text("{", encoding="utf-8")
    begin(tmp_path, [line(1, loss=2.0)], notes.append)
    assert [step for step, _ in sent] == [1, 1]
    assert len(notes) == 1
    assert "begin anew" in notes[0]


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path: Path, sent: Sent) -> None:
    notes: list[str] = []
    (tmp_path / "file").write_text("")
    found = begin(tmp_path / "file", [line(1, loss=2.0)], notes.append)
    found.send(line(2, loss=1.5))
    found.close({"final/eval_loss": 1.0}, step=2, failed=False)
    assert sent == [(-1, {"failed": 1.0})]
    assert len(notes) == 1
    assert "cannot be written" in notes[0]


def test_secrets_are_hidden_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh12345")
    hidden = hide_secrets({"a": ["x abcdefgh12345 y", 3, None], "b": {"c": "s3://me:word@bucket/rows"}})
    assert hidden == {"a": ["x *** y", 3, None], "b": {"c": "s3://***@bucket/rows"}}


def test_wandb_without_a_login_is_refused_and_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    import wandb

    wandb.teardown()
    with pytest.raises(ConfigError, match="nobody is logged in") as caught:
        check_trackers(["wandb"])
    assert "WANDB_MODE=offline" in caught.value.problems[0].fix
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])
    wandb.teardown()


def test_mlflow_without_a_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: object() if name == "mlflow" else None)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI is not set"):
        check_trackers(["mlflow"])
