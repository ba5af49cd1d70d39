"""transformers' Trainer as the engine of steps: one dataloader item is one optimizer step.

Owns how a step runs: micro-batches on sums, exact normalisation over all ranks' supervised
tokens, one gradient synchronisation. Only public methods of Trainer are overridden.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer

from loralab.errors import LoralabError, OutOfMemoryError, TrainingDivergedError
from loralab.layout.collate import StepBatch
from loralab.layout.planner import ShrinkingPlanner
from loralab.training.arguments import raise_rates
from loralab.training.distributed import ALONE, Processes
from loralab.training.liveness import check_reached, no_gradient_at_all
from loralab.training.loss import Backward, Context, LossSum, run_micro_batches
from loralab.training.loss_scaling import resolve_loss_scaler
from loralab.training.sharding import PlacedAccelerator, average_gradients
from loralab.training.state import RunState
from loralab.training.step_loader import next_step
from loralab.training.zero import MomentsInParts

logger = logging.getLogger(__name__)

Evaluate = Callable[[], dict[str, float]]
Shrunk = Callable[[int, int], None]


class StepTrainer(Trainer):
    """Trainer whose batches are whole optimizer steps.

    Args:
        steps: yields a `StepBatch` per optimizer step; its length is the steps of an epoch.
        run_state: running sums, shared with the callbacks.
        measure: measures the validation loss; None where there is no validation.
        planner: laid out the steps; lays a step out again when memory runs out.
        on_shrink: told of the step and the new token budget when that happened.
        processes: those that share each step.
        loraplus_lr_ratio: learning rate of every B, as a multiple of the others'.
        note: told of what happened to a step, besides running out of memory; by the first process.
        **kwargs: for Trainer.
    """

    def __init__(
        self,
        *,
        steps: DataLoader[StepBatch],
        run_state: RunState,
        measure: Evaluate | None,
        planner: ShrinkingPlanner,
        on_shrink: Shrunk,
        processes: Processes = ALONE,
        loraplus_lr_ratio: float = 1.0,
        note: Callable[[str], None] = logger.warning,
        **kwargs: Any,
    ) -> None:
        self._processes = processes  # asked while Trainer builds its accelerator
        self._parts: MomentsInParts | None = None
        super().__init__(**kwargs)
        self._steps = steps
        self._run_state = run_state
        self._measure = measure
        self._planner = planner
        self._on_shrink = on_shrink
        self._loraplus_lr_ratio = loraplus_lr_ratio
        trained: Any = self.model
        self._scaler = resolve_loss_scaler(trained, run_state, note=note if processes.first else _say_nothing)
        self._reduced_once = processes.count == 1 or processes.lockstep

    def create_accelerator_and_postprocess(self) -> None:
        """Take an accelerator that wraps nothing, where something lies in parts: DDP cannot hold these."""
        super().create_accelerator_and_postprocess()
        if self._processes.lockstep or self._processes.moments_in_parts:
            self.accelerator = PlacedAccelerator(norm=self._norm_of_parts)

    def _norm_of_parts(self) -> Tensor | None:
        return None if self._parts is None else self._parts.norm

    def get_train_dataloader(self) -> DataLoader[StepBatch]:
        """Return the steps as they are: the sampler knows the ranks, so nothing may shard it again."""
        return self._steps

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Give every B of a LoRA+ run its own learning rate, whatever the optimizer.

        Source: Hayou, Ghosh & Yu 2024, LoRA+, section 4.
        """
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if fresh and self._loraplus_lr_ratio != 1.0:
            trained: Any = self.model if model is None else model
            raised = [weight for name, weight in trained.named_parameters() if "lora_B" in name]
            raise_rates(optimizer, raised, self._loraplus_lr_ratio)
        if fresh and self._processes.moments_in_parts:
            max_norm, device = self.args.max_grad_norm, self.args.device
            self._parts = MomentsInParts(optimizer, max_norm=max_norm, processes=self._processes, device=device)
            self.optimizer = optimizer = self._parts
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter; before a checkpoint, fetch what its optimizer's state is made of."""
        if self._parts is not None:
            self._parts.gather()
        super().save_model(output_dir, _internal_call)

    def get_batch_samples(
        self, epoch_iterator: Iterator[StepBatch], num_batches: int, device: torch.device
    ) -> tuple[list[StepBatch], Tensor]:
        """Return the next step and its supervised tokens over all ranks (scalar)."""
        batch: StepBatch | LoralabError = next_step(epoch_iterator)
        if isinstance(batch, LoralabError):
            raise batch
        count = self._processes.sum(np.array([batch.supervised_tokens], dtype=np.float64))
        # On the CPU, whatever the device: read back from there, it would make the host wait for the step before.
        return [batch], torch.tensor(int(count[0]), dtype=torch.int64)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Run forward and backward of one optimizer step.

        Args:
            model: the wrapped model.
            inputs: this rank's part of the step.
            num_items_in_batch: supervised tokens of the step over all ranks.

        Returns:
            This rank's share of the step's mean loss, scaled so that the mean over ranks is exact.

        Raises:
            TrainingDivergedError: the loss is not finite, or float16 gradients under any scale; the rows are named.
            OutOfMemoryError: memory runs out with one example at a time.
        """
        step: StepBatch = inputs
        if step.token_budget > self._planner.planner.token_budget:  # made in advance, before memory ran out
            step = self._planner(step.examples)
        model.train()
        count = int(num_items_in_batch) if num_items_in_batch is not None else step.supervised_tokens
        scale, scaler, number = self._processes.count / max(count, 1), self._scaler, self.state.global_step + 1
        while True:
            result, step = self._run_step(model, step, scale if scaler is None else scale * scaler.scale)
            # Gradients are summed over the processes by now, and so is what follows: all of them go the same way.
            overflowed = scaler is not None and scaler.overflowed(model)
            attended = 0 if self._run_state.alive or not self._shows(step) else _deepest_label(step)
            own = [float(result.total), step.example_tokens, step.tokens, len(step.rows), attended, overflowed]
            sums = self._processes.sum(np.array(own, dtype=np.float64))
            total, tokens, laid_out, examples, deepest, overflows = (float(value) for value in sums)
            self._run_state.attended = deepest > 0
            if self._parts is not None and not self._run_state.alive:
                self._parts.show_gradients()  # to the check of liveness
            if not math.isfinite(total):
                parts = self._processes.gather((float(result.total), step.rows))
                raise _diverged(parts, number, half=scaler is not None)
            if scaler is None or not overflows:
                break
            if not scaler.lower():
                raise _overflowed(self._processes.gather(step.rows), number, scale=scaler.scale)
            model.zero_grad(set_to_none=True)
        if scaler is not None:
            scaler.unscale(model, step=number)
        self._run_state.add_step(
            total=total, count=count, tokens=int(tokens), laid_out_tokens=int(laid_out), examples=int(examples)
        )
        share: Tensor = result.total * scale
        return share

    def _shows(self, step: StepBatch) -> bool:
        """Return whether a step can tell of all that is trained: a vision tower learns nothing without pictures."""
        trained: Any = self.model
        return not trained.trains_vision or any(batch.pictures is not None for batch in step.micro_batches)

    def _run_step(self, model: nn.Module, step: StepBatch, scale: float) -> tuple[LossSum, StepBatch]:
        """Run a step's micro-batches; out of memory, run all of them again in smaller ones."""

        def backward(loss: Tensor) -> None:
            if not loss.requires_grad:
                raise no_gradient_at_all(self.state.global_step + 1)
            self.accelerator.backward(loss * scale)

        def context(last: bool) -> contextlib.AbstractContextManager[object]:
            return contextlib.nullcontext() if last else self.accelerator.no_sync(model)

        key = (self.args.seed, self.state.global_step)
        if self._processes.lockstep or self._parts is not None:
            return self._run_in_lockstep(model, step, scale, key), step
        if not self._reduced_once:
            # DDP orders its buckets anew after the first reduction, and with them the sums of three and more
            # processes. A reduction of zeros takes that out of the steps: a resumed run's sums are the same.
            self._join_reduction(model, context, key)
            self._reduced_once = True
        if not step.micro_batches:
            self._join_reduction(model, context, key)
        while True:
            try:
                result = run_micro_batches(
                    model,
                    step.micro_batches,
                    device=self.args.device,
                    backward=backward,
                    context=context,
                    dropout_key=key,
                )
                return result, step
            except torch.OutOfMemoryError:
                self._check_divisible(step)
            # Behind the handler: its traceback would hold the failed graph, and with it the memory.
            step = self._lay_out_smaller(model, step)

    def _run_in_lockstep(self, model: nn.Module, step: StepBatch, scale: float, key: tuple[int, int]) -> LossSum:
        """Run a step's micro-batches, and as many more without weight as it takes to run as many as any process."""
        own = step.micro_batches
        more = self._processes.largest(len(own)) - len(own)  # asked before: sweeps of the others wait for this one
        left = len(own) + more
        if self._parts is not None and not self._reduced_once:  # DeepSpeed would wait for what is not reached
            self._sweep_any_row(model, self._parts.probe, key)
            check_reached(model, step=self.state.global_step + 1)
            self._reduced_once = True

        def backward(loss: Tensor) -> None:
            nonlocal left
            left -= 1
            if self._parts is None:
                self.accelerator.backward(loss)
            else:
                self._parts.backward(loss, last=left == 0)

        def backward_own(loss: Tensor) -> None:
            if not loss.requires_grad:
                raise no_gradient_at_all(self.state.global_step + 1)
            backward(loss * scale)

        try:
            result = run_micro_batches(model, own, device=self.args.device, backward=backward_own, dropout_key=key)
            for _ in range(more):
                self._sweep_any_row(model, backward, key)
        except torch.OutOfMemoryError:
            self._check_divisible(step)
            raise
        if self._parts is None:
            average_gradients(model, self._processes)
        return result

    def _join_reduction(self, model: nn.Module, context: Context, key: tuple[int, int]) -> None:
        """Take part in a reduction of gradients with zeros, as where this process has no row of a short step."""
        self._sweep_any_row(model, self.accelerator.backward, key, context=context)
        check_reached(model, step=self.state.global_step + 1)

    def _sweep_any_row(
        self, model: nn.Module, backward: Backward, key: tuple[int, int], *, context: Context | None = None
    ) -> None:
        """Run forward and backward of a row whose loss has no weight."""
        any_row = self._planner([self.train_dataset[0]]).micro_batches[:1]  # type: ignore[index]

        def backward_zeros(loss: Tensor) -> None:
            if not loss.requires_grad:
                raise no_gradient_at_all(self.state.global_step + 1)
            backward(loss.nan_to_num() * 0.0)

        run_micro_batches(
            model, any_row, device=self.args.device, backward=backward_zeros, context=context, dropout_key=key
        )

    def _check_divisible(self, step: StepBatch) -> None:
        """Check that a step that ran out of memory can be cut into smaller micro-batches.

        Raises:
            OutOfMemoryError: it cannot.
        """
        before = self._planner.planner.token_budget
        alone = all(len(set(batch.label_examples.tolist())) == 1 for batch in step.micro_batches)
        if alone or self._processes.count > 1:
            why = "with one example at a time" if alone else "and several processes cannot shrink on their own"
            raise OutOfMemoryError(
                f"out of memory under a budget of {before} tokens, {why}",
                where=f"optimizer step {self.state.global_step + 1}",
                fix="lower data.max_length or training.token_budget (with pictures, data.image.max_pixels), or set "
                "training.gradient_checkpointing: true",
            )

    def _lay_out_smaller(self, model: nn.Module, step: StepBatch) -> StepBatch:
        model.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tried = max(batch.input_ids.numel() for batch in step.micro_batches)
        self._run_state.token_budget = self._planner.shrink(tried)
        self._on_shrink(self.state.global_step + 1, self._planner.planner.token_budget)
        return self._planner(step.examples)

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


def _deepest_label(step: StepBatch) -> int:
    """Return how many tokens the deepest label of a step has before the one that predicts it."""
    depths = [batch.depth.flatten()[batch.label_positions] for batch in step.micro_batches if len(batch.labels)]
    return max((int(depth.max()) for depth in depths), default=0)


def _say_nothing(_: str) -> None:
    pass


def _diverged(
    parts: Sequence[tuple[float, Sequence[tuple[int, int]]]], number: int, *, half: bool
) -> TrainingDivergedError:
    """Name the rows whose loss is no number, given each process's loss and its rows."""
    total, found = next((total, rows) for total, rows in parts if not math.isfinite(total))
    calm = "lower training.learning_rate, set training.max_grad_norm: 1.0, or look at these rows"
    wider = "set model.precision: float32 (in float16 the base may exceed 65,504, which no loss scale helps), "
    return TrainingDivergedError(
        f"the loss is {total} at step {number}",
        where=f"training rows {_listed(found)}",
        fix=f"{wider if half else ''}{calm}; the last checkpoint is unharmed",
    )


def _overflowed(parts: Sequence[Sequence[tuple[int, int]]], number: int, *, scale: float) -> TrainingDivergedError:
    """Name the rows whose gradients no loss scale keeps finite, given each process's rows."""
    return TrainingDivergedError(
        f"gradients are not finite at step {number}, down to a loss scale of {scale:g}",
        where=f"training rows {_listed([row for rows in parts for row in rows])}",
        fix="set model.precision: float32, lower training.learning_rate, or look at these rows; "
        "the last checkpoint is unharmed",
    )


def _listed(found: Sequence[tuple[int, int]]) -> str:
    rows = ", ".join(f"{row}" if source == 0 else f"{row} of source {source + 1}" for source, row in found[:16])
    return rows if len(found) <= 16 else f"{rows} and {len(found) - 16} more"
