"""What a resume goes on with: settings of now, the machine of now, and the folder as a kill left it."""

import json
import logging
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import loralab
from loralab.errors import RunFolderError, StoppedBySignal
from loralab.training.checkpoint import find_checkpoint, list_checkpoints
from support import tiny
from support.reporters import Notes

Sections = dict[str, dict[str, Any]]
STEPS = 8  # of a run: 16 rows in steps of 4, two epochs
EVERY_TWO: Sections = {"training": {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2}}


@dataclass(frozen=True)
class World:
    """A tiny base and its rows; read only."""

    base: Path
    rows: Path

    def config(self, output: Path, *parts: Sections) -> dict[str, Any]:
        """Return a configuration; later parts add to earlier ones."""
        merged: Sections = {}
        for part in parts:
            for name, values in part.items():
                merged[name] = merged.get(name, {}) | values
        return tiny.run_config(self.base, self.rows, output, **merged)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    return World(tiny.save_base(folder / "base"), tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(16)))


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> loralab.Run:
    """An uninterrupted run with a checkpoint after every second step; read only."""
    keep: Sections = {"training": {"save_total_limit": None}}
    return loralab.train(world.config(tmp_path_factory.mktemp("whole") / "run", EVERY_TWO, keep))


def killed_after(whole: loralab.Run, step: int, folder: Path) -> Path:
    """Return a copy of a run as a kill soon after `step` leaves it."""
    run = Path(shutil.copytree(whole.path, folder))
    for path in list_checkpoints(run / "checkpoints"):
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)
    for name in ("adapter", "plots"):
        shutil.rmtree(run / name)
    (run / "report.html").unlink()
    unfinish(run)
    return run


def unfinish(run: Path, **changes: Any) -> None:
    """Mark a run as one that was killed."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps(record | {"status": "running"} | changes), encoding="utf-8")


def logged(run: loralab.Run) -> list[int]:
    return [line["step"] for line in run.metrics if "loss" in line]


def events(run: loralab.Run) -> list[str]:
    return [event["what"] for event in run.record["events"]]


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.fixture
def trainer_warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What Trainer warns of; transformers' loggers pass nothing on to those above."""
    logger = logging.getLogger("transformers.trainer_utils")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_settings_of_now_act(
    world: World, whole: loralab.Run, tmp_path: Path, trainer_warnings: pytest.LogCaptureFixture
) -> None:
    run = killed_after(whole, 4, tmp_path / "run")
    now: Sections = {"training": {"logging_steps": 3, "save_steps": 3, "save_total_limit": 2}}
    resumed = loralab.train(world.config(run, EVERY_TWO, now), resume=True)
    assert logged(resumed) == [1, 2, 3, 4, 6, 8]
    sums = {line["step"]: line["loss"] for line in resumed.metrics}
    assert sums[4] == {line["step"]: line["loss"] for line in whole.metrics}[4]
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["checkpoint-6", "checkpoint-8"]
    assert resumed.record["adapter_sha256"] == whole.record["adapter_sha256"]
    assert "training.logging_steps was 1, now 3" in events(resumed)[-1]
    assert trainer_warnings.messages == []


def test_save_strategy_of_now_acts(world: World, whole: loralab.Run, tmp_path: Path) -> None:
    run = killed_after(whole, 2, tmp_path / "run")
    now: Sections = {"training": {"num_train_epochs": 2, "save_strategy": "epoch", "save_total_limit": None}}
    resumed = loralab.train(world.config(run, now), resume=True)
    saved = [path.name for path in list_checkpoints(run / "checkpoints")]
    assert saved == ["checkpoint-2", "checkpoint-4", "checkpoint-8"]
    assert resumed.record["adapter_sha256"] == whole.record["adapter_sha256"]


def test_logging_steps_that_decide_on_the_stop_are_refused(world: World, tmp_path: Path) -> None:
    stopping: Sections = {"training": {"early_stopping": {"metric": "loss", "patience": 50}}}
    run = loralab.train(world.config(tmp_path / "run", EVERY_TWO, stopping))
    unfinish(run.path)
    with pytest.raises(RunFolderError, match=r"training\.logging_steps was 1, now 2"):
        loralab.train(world.config(run.path, EVERY_TWO, stopping, {"training": {"logging_steps": 2}}), resume=True)


def test_best_of_one_evaluation_is_said_to_be_that(world: World, tmp_path: Path) -> None:
    best: Sections = {"data": {"validation": 4}, "training": {"load_best_model_at_end": True, "max_steps": 3}}
    run = loralab.train(world.config(tmp_path / "run", best))
    said = "load_best_model_at_end: the only evaluation is that of the last step (3), whose adapter is kept"
    assert events(run) == [said]
    choice: Sections = {"evaluation": {"strategy": "steps", "steps": 2}}
    assert events(loralab.train(world.config(tmp_path / "choice", best, choice))) == []


# --- the machine -------------------------------------------------------------------------------------------------


def test_other_versions_are_a_warning(world: World, whole: loralab.Run, tmp_path: Path) -> None:
    run = killed_after(whole, 4, tmp_path / "run")
    old = whole.record["versions"]
    patch = ".".join([*old["peft"].split(".")[:2], "99"])  # a patch release is no other arithmetic
    unfinish(run, versions=old | {"torch": "1.0.0", "peft": patch})
    notes = Notes()
    resumed = loralab.train(world.config(run, EVERY_TWO), resume=True, reporter=notes)
    change = f"torch was 1.0.0, now {old['torch']}"
    assert [line for line in notes.said if line.startswith("warning")] == [
        f"warning: {change}; the adapter may differ in its last digits from an uninterrupted run's"
    ]
    assert events(resumed)[-1] == f"changed at a resume: {change}"
    assert resumed.record["versions"] == old


# --- the folder --------------------------------------------------------------------------------------------------


def only_the_lock(run: Path) -> None:
    shutil.rmtree(run)
    run.mkdir()
    (run / ".lock").write_text("4194305\n")


def before_the_record_was_whole(run: Path) -> None:
    only_the_lock(run)
    (run / ".run.json.4194305.tmp").write_text('{"loralab_ver')


def before_the_earlier_run_was_cleared(run: Path) -> None:
    """As `--overwrite` leaves it: the new record beside everything of an earlier run."""
    unfinish(run, status="starting")


def before_the_configuration(run: Path) -> None:
    for path in run.iterdir():
        if path.name != "run.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    unfinish(run, status="starting")


STARTS: list[tuple[Callable[[Path], None], dict[str, bool]]] = [
    (only_the_lock, {"resume": True}),
    (before_the_record_was_whole, {}),
    (before_the_earlier_run_was_cleared, {}),
    (before_the_earlier_run_was_cleared, {"resume": True}),
    (before_the_configuration, {"resume": True}),
    (before_the_configuration, {"overwrite": True}),
]


@pytest.mark.parametrize(("leave", "options"), STARTS)
def test_run_killed_while_it_started_is_started_again(
    leave: Callable[[Path], None], options: dict[str, bool], world: World, whole: loralab.Run, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole.path, tmp_path / "run"))
    leave(run)
    notes = Notes()
    again = loralab.train(world.config(run, EVERY_TWO), reporter=notes, **options)
    assert again.record["adapter_sha256"] == whole.record["adapter_sha256"]
    assert logged(again) == list(range(1, STEPS + 1))
    assert again.record["status"] == "completed"
    assert not list(run.glob(".*"))
    assert not [line for line in notes.said if line.startswith("resuming")]


def test_damaged_checkpoints_are_removed(world: World, whole: loralab.Run, tmp_path: Path) -> None:
    run = killed_after(whole, 4, tmp_path / "run")
    for path in list_checkpoints(run / "checkpoints"):
        (path / "manifest.json").unlink()
    resumed = loralab.train(world.config(run, EVERY_TWO), resume=True)
    assert resumed.record["adapter_sha256"] == whole.record["adapter_sha256"]
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["checkpoint-6", "checkpoint-8"]


def test_half_an_adapter_is_swept(world: World, whole: loralab.Run, tmp_path: Path) -> None:
    run = killed_after(whole, 8, tmp_path / "run")
    (run / ".adapter-half").mkdir()
    (run / ".adapter-half" / "adapter_model.safetensors").write_bytes(b"half")
    resumed = loralab.train(world.config(run, EVERY_TWO), resume=True)
    assert resumed.record["adapter_sha256"] == whole.record["adapter_sha256"]
    assert not list(run.glob(".*"))


def test_report_of_a_complete_run_is_made_up_for(world: World, whole: loralab.Run, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole.path, tmp_path / "run"))
    (run / "report.html").unlink()
    notes = Notes()
    loralab.train(world.config(run, EVERY_TWO, {"training": {"save_total_limit": None}}), resume=True, reporter=notes)
    assert (run / "report.html").is_file()
    assert notes.said == [f"nothing to do: the run in {run} is complete"]


# --- evaluations -------------------------------------------------------------------------------------------------


class FailsIn(Notes):
    """Ends the run by a bug in the n-th validation, which comes after the checkpoint of its step."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left = number

    def progress(self, label: str, done: int, total: int | None, *, detail: str = "") -> None:
        self.left -= label == "validate"
        if self.left == 0:
            raise ZeroDivisionError


@pytest.mark.parametrize("number", [1, 2])
def test_evaluation_that_was_owed_decides_as_it_would_have(number: int, world: World, tmp_path: Path) -> None:
    """The second one stops the run: no step may follow it, as none follows in the uninterrupted run."""
    stopping: Sections = {
        "data": {"validation": 4},
        "training": {
            "num_train_epochs": 5,
            "save_steps": 3,  # of an epoch's three: each checkpoint is written before the evaluation of its step
            "load_best_model_at_end": True,
            "early_stopping": {"metric": "eval_loss", "patience": 1, "min_delta": 50.0},
        },
        "evaluation": {"batch_size": 4},
    }
    whole = loralab.train(world.config(tmp_path / "whole", EVERY_TWO, stopping))
    assert (whole.record["steps"], "early stopping" in whole.record["stopped_because"]) == (6, True)
    cut = world.config(tmp_path / "cut", EVERY_TWO, stopping)
    with pytest.raises(ZeroDivisionError):
        loralab.train(cut, reporter=FailsIn(number))
    resumed = loralab.train(cut, resume=True)
    for name in ("steps", "adapter_sha256", "stopped_because"):
        assert resumed.record[name] == whole.record[name], name
    evaluations = [[line for line in run.metrics if "eval_loss" in line] for run in (resumed, whole)]
    assert evaluations[0] == evaluations[1]


# --- signals -----------------------------------------------------------------------------------------------------


class SignalIn(Notes):
    """Sends SIGTERM to its own process when a stage begins."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label

    def progress(self, label: str, done: int, total: int | None, *, detail: str = "") -> None:
        if label == self.label:
            self.label = ""
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("train", "stopping after this step"),
        ("evaluate adapter", "stopping; --resume will repeat the final evaluation, no step is lost"),
    ],
)
def test_signal_says_what_will_happen(label: str, said: str, world: World, tmp_path: Path) -> None:
    data: Sections = {"data": {"validation": 6}, "evaluation": {"batch_size": 1, "strategy": "no"}}
    config = world.config(tmp_path / "run", data)
    notes = SignalIn(label)
    with pytest.raises(StoppedBySignal) as caught:
        loralab.train(config, reporter=notes)
    assert [line for line in notes.said if "stopping" in line] == [said]
    sealed = find_checkpoint(tmp_path / "run" / "checkpoints")
    assert sealed is not None
    assert f"go on from step {sealed.step} with" in caught.value.problems[0].fix
    assert loralab.train(config, resume=True).record["status"] == "completed"
