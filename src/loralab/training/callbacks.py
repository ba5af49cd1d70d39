"""What happens around the steps: logging, progress, checkpoints, signals.

Owns the reactions; `trainer.py` owns the steps themselves.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from transformers import IntervalStrategy, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loralab.errors import TrainingDivergedError
from loralab.progress import Reporter
from loralab.run import write_text
from loralab.training.checkpoint import rotate_checkpoints, seal_checkpoint
from loralab.training.distributed import ALONE, Processes
from loralab.training.sampler import StepSampler
from loralab.training.state import RunState

_ONE_SIGNAL_SECONDS = 2.0
LOGGED = ("loss", "learning_rate", "grad_norm", "tokens_per_second")


def logged_line(state: TrainerState, logs: Mapping[str, float] | None) -> dict[str, Any] | None:
    """Return a line of `metrics.jsonl`, or None where what was logged is neither of training nor of an evaluation.

    Args:
        state: Trainer's, at the step that was logged.
        logs: what was logged; numbers that JSON does not have become None.
    """
    chosen = {k: v for k, v in (logs or {}).items() if k in LOGGED or k.startswith("eval_")}
    if not chosen:
        return None
    finite = {k: (v if math.isfinite(v) else None) for k, v in chosen.items()}
    return {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6), **finite}


class MetricsWriter(TrainerCallback):
    """Appends one JSON object per logged step to `metrics.jsonl`.

    Args:
        path: the file, or None in a process that does not write.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Log the last step too, wherever it falls."""
        control.should_log |= state.global_step >= state.max_steps

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write what was logged, when it is a training or evaluation line."""
        line = logged_line(state, logs)
        if line is None or self.path is None:
            return
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def truncate_metrics(path: Path, step: int, *, evaluated_step: int) -> None:
    """Remove the lines that a resumed run writes again.

    Args:
        path: the file.
        step: step where the run goes on; later lines go.
        evaluated_step: newest evaluation that the run remembers; later evaluations go.
    """
    if not path.is_file():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # the line that a kill cut short
        if line["step"] <= (evaluated_step if "eval_loss" in line else step):
            kept.append(text)
    write_text(path, "".join(f"{line}\n" for line in kept))


class CurrentIntervals(TrainerCallback):
    """Makes the intervals of now act on a resume: Trainer takes those in the checkpoint, and warns that they differ."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set the steps between logs, evaluations and saves."""
        state.compute_steps(args, state.max_steps)


class ProgressReporter(TrainerCallback):
    """Tells the reporter how far training is.

    Args:
        reporter: is told.
        headline: figures of evaluations that are said besides loss and perplexity, without their `eval_`.
    """

    def __init__(self, reporter: Reporter, *, headline: Sequence[str] = ()) -> None:
        self.reporter = reporter
        self.headline = headline
        self.detail = ""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Report the step."""
        self.reporter.progress("train", state.global_step, state.max_steps, detail=self.detail)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Take the newest figures; say evaluation results as a line."""
        logs = logs or {}
        if "loss" in logs:
            self.detail = f"loss {logs['loss']:.4f}, {logs['tokens_per_second']:,.0f} tokens/s"
        if "eval_loss" in logs:
            text = f"validation loss {logs['eval_loss']:.4f} (perplexity {logs['eval_perplexity']:.2f})"
            shown = [f"{name} {logs[f'eval_{name}']:.4f}" for name in self.headline if f"eval_{name}" in logs]
            self.reporter.say(f"step {state.global_step}: {', '.join([text, *shown])}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the stage."""
        self.reporter.finish("train")


class EpochSetter(TrainerCallback):
    """Gives the sampler its epoch; Trainer does so only after a resume, and the order must not differ."""

    def __init__(self, sampler: StepSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Choose the epoch that the step lies in."""
        self.sampler.set_epoch(state.global_step // len(self.sampler))


@dataclass
class StopRequest:
    """A signal that asked the run to stop.

    Attributes:
        signal_number: the signal, or None while there is none.
        notice: what a user is told when it comes: when the run will stop.
    """

    signal_number: int | None = None
    notice: str = "stopping after this step"

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def agree(self, processes: Processes) -> bool:
        """Return whether any process was asked; all of them are, from here on."""
        agreed = processes.largest(self.signal_number or 0)
        if agreed:  # never back to None: a signal may have come while the others were asked, and counts next time
            self.signal_number = agreed
        return agreed > 0


@contextmanager
def catching_signals(on_first: Callable[[StopRequest], None]) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; a second one ends the process at once.

    Two SIGTERMs within two seconds are one: what stops a whole group of processes, as systemd does, sends one to the
    launcher, which passes it on, and one to those that it started.
    """
    request, asked_at = StopRequest(), 0.0
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may handle signals; whoever owns it decides
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal asked_at
        first = asked_at == 0.0
        if not first and time.monotonic() - asked_at < _ONE_SIGNAL_SECONDS:
            return
        for each, handler in before.items():
            if not (first and each == number == signal.SIGTERM):
                signal.signal(each, handler)
        if not first:
            signal.raise_signal(number)
            return
        request.signal_number, asked_at = number, time.monotonic()
        on_first(request)

    for number in before:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class SignalStop(TrainerCallback):
    """Ends training at the next step, with a checkpoint, once a signal has asked for it.

    An evaluation that was due at that step is left to the resumed run.
    """

    def __init__(self, request: StopRequest, *, processes: Processes = ALONE) -> None:
        self.request = request
        self.processes = processes

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop; save at the last step in any case, since what follows may be interrupted."""
        control.should_save |= state.global_step >= state.max_steps
        self._stop(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop, when the signal came during the evaluation."""
        self._stop(control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave out what the end of an epoch would otherwise bring."""
        self._stop(control)

    def _stop(self, control: TrainerControl) -> None:
        if self.request.agree(self.processes):
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False


class EvaluationNote(TrainerCallback):
    """Remembers the newest complete evaluation, so that a resumed run knows whether one is owed."""

    def __init__(self, run_state: RunState) -> None:
        self.run_state = run_state

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Note the step; an evaluation that a signal cut short has no metrics."""
        if metrics:
            self.run_state.evaluated_step = state.global_step


def owes_evaluation(args: TrainingArguments, state: TrainerState, run_state: RunState, *, steps_per_epoch: int) -> bool:
    """Return whether the step of a checkpoint is one that is evaluated, and was not yet.

    A checkpoint may be written before the evaluation of its step: at the end of an epoch, on a signal.

    Args:
        args: with the intervals of now.
        state: Trainer's, as in the checkpoint.
        run_state: as in the checkpoint.
        steps_per_epoch: optimizer steps of an epoch.
    """
    step, strategy = state.global_step, args.eval_strategy
    if strategy == IntervalStrategy.NO or step <= run_state.evaluated_step:
        return False
    if strategy == IntervalStrategy.STEPS:
        return step >= state.max_steps or step % int(args.eval_steps or 1) == 0
    # Trainer ends an epoch, and so evaluates, wherever training stops for good.
    return step >= state.max_steps or step % steps_per_epoch == 0 or run_state.stopped_because is not None


def check_finite(model: nn.Module, *, step: int) -> None:
    """Check that all trained weights are finite.

    Raises:
        TrainingDivergedError: one is not; it is named.
    """
    for name, weight in model.named_parameters():
        if weight.requires_grad and not bool(torch.isfinite(weight).all()):
            raise TrainingDivergedError(
                f"trained weights are not finite after step {step}: {name}",
                where="optimizer step",
                fix="lower training.learning_rate or set training.max_grad_norm (earlier checkpoints are unharmed)",
            )


class CheckpointSealer(TrainerCallback):
    """Seals what Trainer has saved into the staging folder, and rotates."""

    def __init__(
        self,
        folder: Path,
        *,
        run_state: RunState,
        contract: Mapping[str, Any],
        keep: int | None,
        processes: Processes = ALONE,
    ) -> None:
        self.folder = folder
        self.run_state = run_state
        self.contract = contract
        self.keep = keep
        self.processes = processes

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Seal the newest checkpoint, unless its weights are no numbers any more."""
        if model is not None:
            check_finite(model, step=state.global_step)
        started = time.perf_counter()
        staged = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        self.processes.wait()  # each process has written its random state there
        if self.processes.first:
            self.run_state.save(staged)
            seal_checkpoint(staged, self.folder, contract=self.contract)
            rotate_checkpoints(self.folder, keep=self.keep, best_step=self.run_state.best_step)
        self.processes.wait()  # nobody writes the same step again while it is sealed
        self.run_state.pause_clock(time.perf_counter() - started)
