"""How long all steps will take, by tokens, from the first ones."""

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from loralab.training import state as state_module
from loralab.training.forecast import TimeForecast
from loralab.training.state import RunState


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(state_module, "time", clock)
    return clock


def run(state: RunState, clock: Clock, steps: list[tuple[float, int]], *, tokens: float) -> list[tuple[float, int]]:
    """Run steps of (seconds, tokens) and return what was forecast."""
    told: list[tuple[float, int]] = []
    forecast = TimeForecast(state, tokens=tokens, note=lambda seconds, step: told.append((seconds, step)))
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, report_to=[])
    state._started = clock.now
    for number, (seconds, size) in enumerate(steps, 1):
        clock.now += seconds
        state.add_step(total=1.0, count=1, tokens=size, laid_out_tokens=size, examples=1)
        forecast.on_step_end(arguments, TrainerState(global_step=number), TrainerControl())
    return told


def test_the_rate_of_the_second_and_third_step_is_carried_on_by_tokens(clock: Clock) -> None:
    # 10 s of start, then 400 tokens in 4 s; 1,500 of 2,000 tokens are left at 100 a second.
    assert run(RunState(), clock, [(10.0, 100), (1.0, 100), (3.0, 300), (99.0, 100)], tokens=2000) == [(29.0, 3)]


def test_a_run_of_two_steps_has_no_forecast(clock: Clock) -> None:
    assert run(RunState(), clock, [(1.0, 10), (1.0, 10)], tokens=20) == []


def test_evaluations_are_left_out(clock: Clock) -> None:
    state = RunState()
    told: list[float] = []
    forecast = TimeForecast(state, tokens=400, note=lambda seconds, _: told.append(seconds))
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, report_to=[])
    state._started = clock.now
    for _ in range(3):
        clock.now += 1.0
        state.add_step(total=1.0, count=1, tokens=100, laid_out_tokens=100, examples=1)
        forecast.on_step_end(arguments, TrainerState(), TrainerControl())
        clock.now += 50.0
        state.pause_clock(50.0)
    assert told == [4.0]


def test_a_resumed_run_counts_the_seconds_before_it(clock: Clock) -> None:
    state = RunState(train_seconds=100.0, train_tokens=1000)
    assert run(state, clock, [(1.0, 100)] * 3, tokens=1500) == [(105.0, 3)]
