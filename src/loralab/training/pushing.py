"""When a run pushes its adapter to the Hub while it trains."""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class PushCallback(TrainerCallback):
    """Asks for a push when a checkpoint is sealed; stands behind `CheckpointSealer`.

    Args:
        push: starts the push of a step's checkpoint; returns at once.
        look: takes up the pushes that ended meanwhile.
        every_save: whether each checkpoint is pushed.
        steps: steps between two pushed checkpoints, which are written for that; None writes none.
    """

    def __init__(
        self,
        push: Callable[[int], None],
        look: Callable[[], object],
        *,
        every_save: bool = False,
        steps: int | None = None,
    ) -> None:
        self.push = push
        self.look = look
        self.every_save = every_save
        self.steps = steps

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Have a checkpoint written where one is to be pushed."""
        control.should_save |= self._is_due(state)
        self.look()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Push what was sealed; the last step's goes up at the end, with the full card."""
        if state.global_step < state.max_steps and (self.every_save or self._is_due(state)):
            self.push(state.global_step)

    def _is_due(self, state: TrainerState) -> bool:
        return self.steps is not None and state.global_step % self.steps == 0
