"""What happens around the steps: lines of metrics, early stopping, signals."""

import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from loralab.progress import Reporter
from loralab.training.callbacks import (
    CheckpointSealer,
    CurrentIntervals,
    EpochSetter,
    EvaluationNote,
    MetricsWriter,
    ProgressReporter,
    SignalStop,
    StopRequest,
    catching_signals,
    owes_evaluation,
    truncate_metrics,
)
from loralab.training.checkpoint import read_checkpoint
from loralab.training.sampler import StepSampler
from loralab.training.state import RunState


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path_factory.mktemp("out")), use_cpu=True, report_to=[])


def at(step: int, *, of: int = 10) -> TrainerState:
    return TrainerState(global_step=step, max_steps=of, epoch=step / 4)


def test_metrics_are_one_object_per_logged_step(tmp_path: Path, arguments: TrainingArguments) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    line = {"loss": 1.5, "learning_rate": 0.1, "grad_norm": math.nan, "tokens_per_second": 3.0, "epoch": 9, "flos": 7}
    writer.on_log(arguments, at(2), TrainerControl(), logs=line)
    writer.on_log(arguments, at(2), TrainerControl(), logs={"eval_loss": 1.0, "eval_perplexity": math.inf})
    writer.on_log(arguments, at(3), TrainerControl(), logs={"train_runtime": 1.0})
    writer.on_log(arguments, at(3), TrainerControl(), logs=None)
    assert [json.loads(text) for text in path.read_text().splitlines()] == [
        {"step": 2, "epoch": 0.5, "loss": 1.5, "learning_rate": 0.1, "grad_norm": None, "tokens_per_second": 3.0},
        {"step": 2, "epoch": 0.5, "eval_loss": 1.0, "eval_perplexity": None},
    ]


@pytest.mark.parametrize(("step", "log"), [(9, False), (10, True)])
def test_last_step_is_logged(step: int, log: bool, arguments: TrainingArguments) -> None:
    control = TrainerControl()
    MetricsWriter(Path("unused")).on_step_end(arguments, at(step), control)
    assert control.should_log is log


@pytest.mark.parametrize(
    ("step", "evaluated", "left"),
    [(0, 0, []), (1, 0, [0]), (2, 0, [0, 1]), (2, 2, [0, 1, 2]), (3, 2, [0, 1, 2, 3]), (9, 9, [0, 1, 2, 3, 4])],
)
def test_truncated_metrics_end_at_the_step(step: int, evaluated: int, left: list[int], tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    truncate_metrics(path, step, evaluated_step=evaluated)
    assert not path.exists()
    lines = [
        f'{{"step": {n}, "{kind}": {n}.25}}\n'
        for n, kind in zip((1, 2, 2, 3, 3), ("loss", "loss", "eval_loss", "loss", "eval_loss"), strict=True)
    ]
    path.write_text("".join(lines) + '{"step": 4, "lo')
    truncate_metrics(path, step, evaluated_step=evaluated)
    assert path.read_text() == "".join(lines[n] for n in left)


def test_evaluation_is_noted_when_it_is_complete(arguments: TrainingArguments) -> None:
    state = RunState()
    note = EvaluationNote(state)
    note.on_evaluate(arguments, at(3), TrainerControl(), metrics={})
    assert state.evaluated_step == 0
    note.on_evaluate(arguments, at(5), TrainerControl(), metrics={"eval_loss": 1.0})
    assert state.evaluated_step == 5


@pytest.mark.parametrize(
    ("strategy", "step", "evaluated", "stopped", "owed"),
    [
        ("no", 10, 0, None, False),
        ("epoch", 5, 0, None, True),
        ("epoch", 5, 5, None, False),
        ("epoch", 6, 5, None, False),
        ("epoch", 12, 10, None, True),  # the last step ends an epoch, wherever it falls
        ("epoch", 6, 5, "early stopping", True),
        ("steps", 5, 0, None, False),
        ("steps", 6, 4, None, False),
        ("steps", 8, 4, None, True),
        ("steps", 8, 8, None, False),
        ("steps", 10, 8, "early stopping", False),
        ("steps", 12, 8, None, True),
    ],
)
def test_owed_evaluation(
    strategy: str, step: int, evaluated: int, stopped: str | None, owed: bool, tmp_path: Path
) -> None:
    own = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], eval_strategy=strategy, eval_steps=4)
    state = RunState(evaluated_step=evaluated, stopped_because=stopped)
    assert owes_evaluation(own, at(step, of=12), state, steps_per_epoch=5) == owed


def test_intervals_of_now_act_on_a_resume(tmp_path: Path) -> None:
    own = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], logging_steps=2, save_steps=3, eval_steps=4
    )
    state = TrainerState(global_step=1, max_steps=10, logging_steps=7, save_steps=8, eval_steps=9)
    CurrentIntervals().on_train_begin(own, state, TrainerControl())
    assert (state.logging_steps, state.save_steps, state.eval_steps) == (2, 3, 4)


def test_epoch_of_the_sampler_follows_the_step(arguments: TrainingArguments) -> None:
    sampler = StepSampler(rows=10, rows_per_step=4, seed=0)
    for step, epoch in ((0, 0), (3, 1), (5, 1), (6, 2)):
        EpochSetter(sampler).on_epoch_begin(arguments, at(step), TrainerControl())
        assert sampler.epoch == epoch


def test_progress_carries_the_newest_figures(arguments: TrainingArguments) -> None:
    class Notes(Reporter):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def say(self, text: str) -> None:
            self.seen.append(text)

        def progress(self, label: str, done: int, total: int | None, *, detail: str = "") -> None:
            self.seen.append((label, done, total, detail))

        def finish(self, label: str) -> None:
            self.seen.append(label)

    notes = Notes()
    progress = ProgressReporter(notes)
    progress.on_log(arguments, at(1), TrainerControl(), logs={"loss": 1.5, "tokens_per_second": 1234.5})
    progress.on_step_end(arguments, at(2), TrainerControl())
    progress.on_log(arguments, at(2), TrainerControl(), logs={"eval_loss": 2.0, "eval_perplexity": 7.389})
    progress.on_train_end(arguments, at(2), TrainerControl())
    assert notes.seen == [
        ("train", 2, 10, "loss 1.5000, 1,234 tokens/s"),
        "step 2: validation loss 2.0000 (perplexity 7.39)",
        "train",
    ]


@pytest.fixture
def _own_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_own_handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_a_request_and_the_second_is_the_old_handlers(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    old: list[int] = []
    handlers = {each: lambda got, _: old.append(got) for each in (signal.SIGINT, signal.SIGTERM)}
    for each, handler in handlers.items():
        signal.signal(each, handler)
    told: list[str] = []
    with catching_signals(lambda asked: told.append(asked.notice)) as request:
        assert not request
        os.kill(os.getpid(), number)
        assert request.signal_number == number
        assert (bool(request), told, old) == (True, ["stopping after this step"], [])
        assert signal.getsignal(signal.SIGINT) == handlers[signal.SIGINT]
        if number == signal.SIGTERM:  # sent by the launcher, and once more by what ends the whole group of processes
            os.kill(os.getpid(), number)
            assert (told, old) == (["stopping after this step"], [])
            monkeypatch.setattr("loralab.training.callbacks._ONE_SIGNAL_SECONDS", 0.0)
        os.kill(os.getpid(), number)
        assert (told, old) == (["stopping after this step"], [number])
        os.kill(os.getpid(), number)
        assert old == [number, number]
    assert {each: signal.getsignal(each) for each in handlers} == handlers


@pytest.mark.usefixtures("_own_handlers")
def test_handlers_are_restored_without_a_signal_and_after_an_error() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def fail() -> None:
        with catching_signals(lambda _: None):
            assert signal.getsignal(signal.SIGTERM) is not before[signal.SIGTERM]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize("number", [None, 15])
def test_requested_stop_saves_and_ends_the_training(number: int | None, arguments: TrainingArguments) -> None:
    control = TrainerControl(should_evaluate=True)
    SignalStop(StopRequest(number)).on_step_end(arguments, at(1), control)
    asked = number is not None
    assert (control.should_save, control.should_training_stop, control.should_evaluate) == (asked, asked, not asked)


def test_saved_checkpoint_is_sealed_with_state_and_contract(tmp_path: Path) -> None:
    staging, folder = tmp_path / "staging", tmp_path / "checkpoints"
    folder.mkdir()
    own = TrainingArguments(output_dir=str(staging), use_cpu=True, report_to=[])
    state = RunState(best_step=3)
    sealer = CheckpointSealer(folder, run_state=state, contract={"seed": 1}, keep=1)
    for step in (3, 6, 9):
        staged = staging / f"checkpoint-{step}"
        staged.mkdir(parents=True)
        state.window_total = float(step)
        sealer.on_save(own, at(step), TrainerControl())
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-3", "checkpoint-9"]
    checkpoint = read_checkpoint(folder / "checkpoint-9")
    assert checkpoint is not None
    assert checkpoint.contract == {"seed": 1}
    assert RunState.load(checkpoint.path).window_total == 9.0


def test_a_signal_that_comes_while_the_others_are_asked_is_not_lost() -> None:
    request = StopRequest()

    class Asking:
        """Two processes, in both of which the signal comes while they say that there was none."""

        def largest(self, value: int) -> int:
            request.signal_number = signal.SIGINT
            return value

    asking: Any = Asking()
    assert not request.agree(asking)  # the same in both processes, whoever was signalled meanwhile
    assert request.agree(asking)
    assert request.signal_number == signal.SIGINT
