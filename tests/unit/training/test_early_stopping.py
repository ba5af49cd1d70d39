"""The watched figure: its best step, and when training stops for it."""

import math
from typing import Any, Literal

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from loralab.config.training_schema import EarlyStopping
from loralab.training.early_stopping import EarlyStopper
from loralab.training.state import RunState


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path_factory.mktemp("out")), use_cpu=True, report_to=[])


def at(step: int) -> TrainerState:
    return TrainerState(global_step=step, max_steps=10, epoch=step / 4)


def watch(
    arguments: TrainingArguments,
    values: list[float | None],
    *,
    metric: str = "eval_loss",
    better: Literal["higher", "lower"] = "lower",
    best: bool = False,
    **chosen: Any,
) -> tuple[RunState, list[TrainerControl]]:
    """Show a metric's values to an `EarlyStopper`, one per step; None is a line without the metric."""
    state = RunState()
    stopping = EarlyStopping(metric=metric, **chosen) if chosen else None
    stopper = EarlyStopper(state, figure=metric, better=better, early_stopping=stopping, save_best=best)
    controls = []
    key = metric if metric in ("loss", "eval_loss") else f"eval_{metric}"
    for step, value in enumerate(values, 1):
        controls.append(TrainerControl())
        logs = {"learning_rate": 0.1} if value is None else {key: value}
        stopper.on_log(arguments, at(step), controls[-1], logs=logs)
    return state, controls


@pytest.mark.parametrize("metric", ["eval_loss", "loss", "perplexity"])
def test_early_stopping_waits_for_its_patience(metric: str, arguments: TrainingArguments) -> None:
    state, controls = watch(arguments, [3.0, 2.0, None, 2.5, 2.0, None], metric=metric, patience=2)
    assert [control.should_training_stop for control in controls] == [False, False, False, False, True, False]
    assert (state.best_value, state.best_step) == (2.0, 2)
    assert state.stopped_because == (f"early stopping: {metric} has not been below 2.0000 (step 2) for 2 observations")


def test_improvement_begins_the_count_anew(arguments: TrainingArguments) -> None:
    state, controls = watch(arguments, [3.0, 3.1, 2.9, 3.1, 2.8, 3.1], patience=2)
    assert not any(control.should_training_stop for control in controls)
    assert (state.best_step, state.without_improvement, state.stopped_because) == (5, 1, None)


def test_min_delta_is_the_smallest_improvement(arguments: TrainingArguments) -> None:
    state, controls = watch(arguments, [3.0, 2.75, 2.5, 2.0], patience=2, min_delta=0.5)
    assert [control.should_training_stop for control in controls] == [False, False, True, False]
    assert state.best_step == 4  # 2.5 is not below 3.0 - 0.5; 2.0 is


def test_other_metrics_do_not_count(arguments: TrainingArguments) -> None:
    state = RunState()
    stopper = EarlyStopper(state, figure="eval_loss", better="lower", early_stopping=EarlyStopping(), save_best=False)
    stopper.on_log(arguments, at(1), TrainerControl(), logs={"loss": 1.0, "eval_perplexity": 2.0})
    stopper.on_log(arguments, at(1), TrainerControl(), logs=None)
    assert state.best_value is None


def test_best_steps_are_saved_where_asked_for(arguments: TrainingArguments) -> None:
    _, controls = watch(arguments, [3.0, 3.5, 2.0], best=True)
    assert [control.should_save for control in controls] == [True, False, True]
    assert not any(control.should_training_stop for control in controls)
    _, controls = watch(arguments, [3.0, 3.5, 2.0])
    assert not any(control.should_save for control in controls)


def test_a_higher_figure_may_be_the_better_one(arguments: TrainingArguments) -> None:
    values: list[float | None] = [0.5, 0.7, 0.6, 0.7]
    state, controls = watch(arguments, values, metric="yes_no_macro_f1", better="higher", best=True, patience=2)
    assert [control.should_training_stop for control in controls] == [False, False, False, True]
    assert [control.should_save for control in controls] == [True, True, False, True]
    assert (state.best_value, state.best_step) == (0.7, 2)
    assert state.stopped_because is not None
    assert "yes_no_macro_f1 has not been above 0.7000 (step 2)" in state.stopped_because


def test_at_the_last_step_there_is_nothing_to_stop(arguments: TrainingArguments) -> None:
    state = RunState()
    stopper = EarlyStopper(
        state, figure="eval_loss", better="lower", early_stopping=EarlyStopping(patience=1), save_best=False
    )
    for step, value in ((9, 1.0), (10, 2.0)):
        stopper.on_log(arguments, at(step), TrainerControl(), logs={"eval_loss": value})
    assert state.without_improvement == 1
    assert state.stopped_because is None


def test_an_evaluation_that_leaves_the_figure_undefined_is_no_improvement(arguments: TrainingArguments) -> None:
    state = RunState()
    stopping = EarlyStopping(metric="yes_no_f1_maybe", patience=2)
    stopper = EarlyStopper(state, figure="yes_no_f1_maybe", better="higher", early_stopping=stopping, save_best=True)
    control = TrainerControl()
    for logs in ({"eval_loss": 1.0, "eval_yes_no_f1_maybe": math.nan}, {"eval_loss": 1.0}):
        stopper.on_log(arguments, at(1), control, logs=logs)
    assert control.should_training_stop
    assert (state.best_step, state.without_improvement) == (None, 2)
    assert "has not been a number" in str(state.stopped_because)
