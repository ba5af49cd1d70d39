"""The watched figure: which step was the best, and when it is time to stop.

Owns what counts as an improvement.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loralab.config.training_schema import EarlyStopping
from loralab.training.state import RunState


class EarlyStopper(TrainerCallback):
    """Watches one figure: notes its best step, and stops when it no longer improves.

    Args:
        run_state: keeps the best value across a resume.
        figure: what is watched, without the `eval_` of its line; `loss` is the logged window's.
        better: which direction is better.
        early_stopping: when to stop, or None to only note the best step.
        save_best: whether every best step is saved.
    """

    def __init__(
        self,
        run_state: RunState,
        *,
        figure: str,
        better: Literal["higher", "lower"],
        early_stopping: EarlyStopping | None,
        save_best: bool,
    ) -> None:
        self.run_state = run_state
        self.figure = figure
        self.better = better
        self.early_stopping = early_stopping
        self.save_best = save_best

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Compare the figure with its best; an evaluation that leaves it undefined counts as none that is better."""
        key = self.figure if self.figure in ("loss", "eval_loss") else f"eval_{self.figure}"
        logged = logs or {}
        if key not in logged and (key == "loss" or "eval_loss" not in logged):
            return
        value = float(logged.get(key, math.nan))
        run_state, best = self.run_state, self.run_state.best_value
        if self._improves(value, best, by=0.0):
            run_state.best_value, run_state.best_step = value, state.global_step
            control.should_save |= self.save_best
        delta = self.early_stopping.min_delta if self.early_stopping else 0.0
        if self._improves(value, run_state.reference_value, by=delta):
            run_state.reference_value, run_state.without_improvement = value, 0
            return
        run_state.without_improvement += 1
        last = state.global_step >= state.max_steps  # where there is nothing left to stop
        patience = self.early_stopping.patience if self.early_stopping is not None else None
        if patience is not None and run_state.without_improvement >= patience and not last:
            control.should_training_stop = control.should_save = True
            run_state.stopped_because = (
                f"early stopping: {self.figure} has not been {self._beyond(run_state)} for {patience} observations"
            )

    def _improves(self, value: float, before: float | None, *, by: float) -> bool:
        if not math.isfinite(value) or before is None:
            return math.isfinite(value)
        return value < before - by if self.better == "lower" else value > before + by

    def _beyond(self, state: RunState) -> str:
        """Return what an improvement would have been."""
        best, reference = state.best_value, state.reference_value
        if best is None or reference is None:
            return "a number"
        side = "below" if self.better == "lower" else "above"
        if best == reference:
            return f"{side} {best:.4f} (step {state.best_step})"
        delta = self.early_stopping.min_delta if self.early_stopping else 0.0
        return f"{side} {reference:.4f} by more than {delta:g} (best {best:.4f}, step {state.best_step})"
