"""When a run pushes while it trains."""

from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from loralab.training.pushing import PushCallback


@pytest.mark.parametrize(
    ("settings", "saved", "pushed"),
    [
        ({}, [2, 4, 6, 8], []),
        ({"every_save": True}, [2, 4, 6, 8], [2, 4, 6]),
        ({"steps": 3}, [2, 3, 4, 6, 8], [3, 6]),
    ],
)
def test_checkpoints_are_pushed(tmp_path: Path, settings: dict[str, int], saved: list[int], pushed: list[int]) -> None:
    pushes: list[int] = []
    callback = PushCallback(pushes.append, lambda: None, **settings)
    arguments, state, saves = TrainingArguments(output_dir=str(tmp_path)), TrainerState(max_steps=8), []
    for step in range(1, 9):
        state.global_step = step
        control = TrainerControl(should_save=step % 2 == 0)  # what save_steps: 2 asks for
        callback.on_step_end(arguments, state, control)
        if control.should_save:
            saves.append(step)
            callback.on_save(arguments, state, control)
    assert (saves, pushes) == (saved, pushed)
