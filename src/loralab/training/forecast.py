"""How long the steps of a run will take, told by its first ones.

Owns which steps are timed and how their rate is carried to the others: by tokens, since steps differ
in length far more than in speed.
"""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loralab.training.state import RunState

# The first step builds kernels and the optimizer's moments; the two behind it are timed.
_WARM_STEPS, _TIMED_STEPS = 1, 2


class TimeForecast(TrainerCallback):
    """Predicts the seconds of all steps, once.

    Args:
        run_state: its clock leaves evaluations and saves out.
        tokens: of all steps of the run, each branch by itself, as `RunState.train_tokens` counts them.
        note: told of the predicted seconds of the whole run, those before a resume included, and of the step.
    """

    def __init__(self, run_state: RunState, *, tokens: float, note: Callable[[float, int], None]) -> None:
        self.run_state = run_state
        self.tokens = tokens
        self.note = note
        self._steps = 0
        self._mark = (0.0, 0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Time the step, where it is one of those."""
        self._steps += 1
        now = (self.run_state.elapsed_seconds, self.run_state.train_tokens)
        if self._steps == _WARM_STEPS:
            self._mark = now
        elif self._steps == _WARM_STEPS + _TIMED_STEPS:
            seconds, tokens = (new - old for new, old in zip(now, self._mark, strict=True))
            remaining = max(self.tokens - now[1], 0.0)
            self.note(now[0] + seconds / max(tokens, 1) * remaining, state.global_step)
