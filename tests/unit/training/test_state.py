"""Running sums: the window's exact mean, and what a resume restores."""

from dataclasses import asdict
from pathlib import Path

import pytest

from loralab.training import state as state_module
from loralab.training.state import RunState


class Clock:
    """Time that moves when it is told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(state_module.time, "perf_counter", clock)
    return clock


@pytest.fixture
def state(clock: Clock) -> RunState:
    state = RunState(_started=clock(), _window_started=clock())
    state.start_clock()
    return state


def test_window_is_the_token_weighted_mean(state: RunState, clock: Clock) -> None:
    state.add_step(total=6.0, count=2, tokens=10, laid_out_tokens=10, examples=1)
    state.add_step(total=1.0, count=8, tokens=30, laid_out_tokens=30, examples=3)
    clock.now += 5
    assert state.close_window() == (0.7, 8.0)
    state.add_step(total=3.0, count=1, tokens=4, laid_out_tokens=4, examples=1)
    clock.now += 2
    assert state.close_window() == (3.0, 2.0)
    assert (state.train_tokens, state.train_examples) == (44, 5)


def test_paused_time_is_left_out_of_one_window(state: RunState, clock: Clock) -> None:
    state.add_step(total=1.0, count=1, tokens=30, laid_out_tokens=30, examples=1)
    clock.now += 10
    state.pause_clock(3)
    state.pause_clock(4)
    assert state.close_window()[1] == 10.0
    state.add_step(total=1.0, count=1, tokens=30, laid_out_tokens=30, examples=1)
    clock.now += 10
    assert state.close_window()[1] == 3.0


def test_empty_window_is_no_division_by_zero(state: RunState) -> None:
    assert state.close_window() == (0.0, 0.0)


def test_state_survives_a_checkpoint(state: RunState, clock: Clock, tmp_path: Path) -> None:
    state.add_step(total=6.5, count=2, tokens=10, laid_out_tokens=10, examples=1)
    state.best_value, state.best_step, state.without_improvement = 1.25, 7, 2
    state.stopped_because = "early stopping"
    clock.now += 4
    state.save(tmp_path)
    clock.now += 1000
    loaded = RunState.load(tmp_path)
    wanted = {k: v for k, v in asdict(state).items() if not k.startswith("_")}
    wanted |= {"train_seconds": 4.0, "window_tokens": 0}
    assert {k: v for k, v in asdict(loaded).items() if not k.startswith("_")} == wanted
    loaded.start_clock()
    clock.now += 3
    assert loaded.elapsed_seconds == 7.0
    assert loaded.close_window()[0] == 3.25
