"""transformers' Trainer as the engine of steps: one dataloader item is one optimizer step.

Owns how a step runs: micro-batches on sums, exact normalisation over all ranks' supervised
tokens, one gradient synchronisation. Only public methods of Trainer are overridden.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from loralab.errors import TrainingDivergedError
from loralab.layout.collate import StepBatch
from loralab.training.loss import run_micro_batches
from loralab.training.state import RunState

Evaluate = Callable[[], dict[str, float]]


class StepTrainer(Trainer):
    """Trainer whose batches are whole optimizer steps.

    Args:
        steps: yields a `StepBatch` per optimizer step; its length is the steps of an epoch.
        run_state: running sums, shared with the callbacks.
        measure: measures the validation loss; None where there is no validation.
        **kwargs: for Trainer.
    """

    def __init__(
        self, *, steps: DataLoader[StepBatch], run_state: RunState, measure: Evaluate | None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._steps = steps
        self._run_state = run_state
        self._measure = measure

    def get_train_dataloader(self) -> DataLoader[StepBatch]:
        """Return the steps as they are: the sampler knows the ranks, so nothing may shard it again."""
        return self._steps

    def get_batch_samples(
        self, epoch_iterator: Iterator[StepBatch], num_batches: int, device: torch.device
    ) -> tuple[list[StepBatch], Tensor]:
        """Return the next step and its supervised tokens over all ranks (scalar)."""
        batch = next(epoch_iterator)
        count = torch.tensor(batch.supervised_tokens, dtype=torch.int64, device=device)
        return [batch], self.accelerator.reduce(count, reduction="sum")

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Run forward and backward of one optimizer step.

        Args:
            model: the wrapped model.
            inputs: this rank's part of the step.
            num_items_in_batch: supervised tokens of the step over all ranks.

        Returns:
            This rank's share of the step's mean loss, scaled so that the mean over ranks is exact.

        Raises:
            TrainingDivergedError: the loss is not finite; the rows are named.
        """
        step: StepBatch = inputs
        model.train()
        count = int(num_items_in_batch) if num_items_in_batch is not None else step.supervised_tokens
        scale = self.accelerator.num_processes / max(count, 1)

        def backward(loss: Tensor) -> None:
            self.accelerator.backward(loss * scale)

        def context(last: bool) -> contextlib.AbstractContextManager[object]:
            return contextlib.nullcontext() if last else self.accelerator.no_sync(model)

        result = run_micro_batches(
            model, step.micro_batches, device=self.args.device, backward=backward, context=context
        )
        total = float(result.total)
        if not math.isfinite(total):
            raise _diverged(total, step, self.state.global_step + 1)
        everyone = self.accelerator.reduce(result.total, reduction="sum")
        self._run_state.add_step(total=float(everyone), count=count, tokens=step.tokens, examples=len(step.rows))
        share: Tensor = result.total * scale
        return share

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Replace Trainer's mean of steps by the token-weighted mean over the logged window."""
        if "loss" in logs:
            logs["loss"], logs["tokens_per_second"] = self._run_state.close_window()
        super().log(logs, start_time)

    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        """Measure the validation loss with the callable that the workflow gave."""
        metrics = self._measure() if self._measure is not None else {}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: Trainer's own estimate cannot read a step."""
        return 0


def _diverged(total: float, step: StepBatch, number: int) -> TrainingDivergedError:
    rows = ", ".join(f"{row}" if source == 0 else f"{row} of source {source + 1}" for source, row in step.rows[:16])
    more = "" if len(step.rows) <= 16 else f" and {len(step.rows) - 16} more"
    return TrainingDivergedError(
        f"the loss is {total} at step {number}",
        where=f"training rows {rows}{more}",
        fix="lower training.learning_rate, set training.max_grad_norm: 1.0, or look at these rows; "
        "the last checkpoint is unharmed",
    )
