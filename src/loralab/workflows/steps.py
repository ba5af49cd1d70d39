"""The optimizer's steps of a run: what they are built of, and running them.

Owns sampler, planner, loader, trainer and callbacks of one run. Does not own what comes before
(data, model) or after (adapter, evaluation): `train.py` does.
"""

import functools
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    IntervalStrategy,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from loralab.config.metric_checks import watched_metric
from loralab.config.metric_facts import Better, better_of
from loralab.config.schema import Config
from loralab.data.dataset import PreparedData
from loralab.data.images.reader import PictureReader
from loralab.errors import ConfigError
from loralab.evaluation.forwards import Interrupted
from loralab.evaluation.perplexity import measure_loss
from loralab.layout.planner import Planner, ShrinkingPlanner
from loralab.models.adapters import WEIGHTS_FILE
from loralab.models.precision import Resolved
from loralab.models.supervised import SupervisedPeftModel
from loralab.progress import Reporter
from loralab.reports.wording import format_seconds
from loralab.run import RunFolder
from loralab.training.arguments import build_arguments, count_steps, expecting_other_intervals
from loralab.training.callbacks import (
    CheckpointSealer,
    CurrentIntervals,
    EpochSetter,
    EvaluationNote,
    MetricsWriter,
    ProgressReporter,
    SignalStop,
    StopRequest,
    check_finite,
    owes_evaluation,
    truncate_metrics,
)
from loralab.training.checkpoint import STAGING, TRAINER_STATE_FILE, Checkpoint
from loralab.training.distributed import ALONE, Processes
from loralab.training.early_stopping import EarlyStopper
from loralab.training.forecast import TimeForecast
from loralab.training.liveness import LivenessCheck
from loralab.training.sampler import StepSampler
from loralab.training.state import RunState
from loralab.training.step_loader import build_loader, resolve_decoders
from loralab.training.trackers import TrackerCallback, Trackers
from loralab.training.trainer import StepTrainer
from loralab.workflows.plan_steps import all_steps, tokens_alone
from loralab.workflows.record import RunRecord
from loralab.workflows.step_layout import build_sampler
from loralab.workflows.task import Task
from loralab.workflows.task_meter import TaskMeter

# A run that is over sooner needs no announcement.
_TOLD_SECONDS = 60.0


@dataclass
class Run:
    """Everything of a run that is under way.

    Attributes:
        config: the configuration.
        folder: the run folder.
        data: tokenized splits and prompter.
        model: base with adapter.
        device: where the model is.
        base_facts: what identifies the base model; its weights are hashed once.
        choices: automatic choices with their reasons.
        reporter: told of progress.
        record: `run.json`.
        planner: how steps are laid out.
        task: what is measured besides the loss.
        processes: those that share the run.
        memory: what the run is predicted to take.
        trackers: who else gets the figures, or None.
        pushing: pushes checkpoints to the Hub, or None.
    """

    config: Config
    folder: RunFolder
    data: PreparedData
    model: SupervisedPeftModel
    device: torch.device
    base_facts: dict[str, Any]
    choices: dict[str, Resolved[Any]]
    reporter: Reporter
    record: RunRecord
    planner: Planner
    task: Task
    processes: Processes = ALONE
    memory: dict[str, Any] = field(default_factory=dict)
    trackers: Trackers | None = None
    pushing: TrainerCallback | None = None


def run_steps(run: Run, contract: Mapping[str, Any], checkpoint: Checkpoint | None, request: StopRequest) -> RunState:
    """Run the optimizer's steps.

    Args:
        run: the run; its model is trained, its record gets the steps and epochs done.
        contract: sealed into every checkpoint.
        checkpoint: where to go on, or None to start from step 0.
        request: asks the run to stop.

    Returns:
        What the run remembers of its steps.

    Raises:
        TrainingDivergedError: the loss or a trained weight is not finite.
    """
    config = run.config
    state = RunState.load(checkpoint.path) if checkpoint else RunState()
    if run.processes.first:
        truncate_metrics(run.folder.metrics, checkpoint.step if checkpoint else 0, evaluated_step=state.evaluated_step)
        shutil.rmtree(run.folder.checkpoints / STAGING, ignore_errors=True)
    sampler, sampling = build_sampler(config, run.data.splits["train"], shares=run.data.shares, processes=run.processes)
    run.record.update(sampling=sampling)
    # Bit-equal sums need the same cuts: a resume goes on with the budget that the checkpoint had.
    state.token_budget = state.token_budget or run.planner.token_budget
    run.planner = run.planner.with_budget(state.token_budget)
    trainer = _build_trainer(run, state, sampler, contract, request)
    _say_what_best_means(run, trainer.args, steps_per_epoch=len(sampler))
    state.start_clock()
    try:
        if checkpoint is not None:
            _take_up(trainer, run.model, checkpoint)
            if owes_evaluation(trainer.args, trainer.state, state, steps_per_epoch=len(sampler)):
                trainer.evaluate()
        # An early stop stays one after a resume; and behind the last step Trainer would take one more, where that lies
        # inside an epoch.
        over = state.stopped_because is not None or trainer.state.global_step >= count_steps(
            config.training, len(sampler)
        )
        if not over and not request.agree(run.processes):
            with expecting_other_intervals():
                trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        check_finite(run.model, step=trainer.state.global_step)
    finally:
        if run.processes.first:
            shutil.rmtree(run.folder.checkpoints / STAGING, ignore_errors=True)
    state.train_seconds = state.elapsed_seconds
    run.record.content["layout_tokens"] = {
        "rows": state.train_tokens,
        "laid_out": state.laid_out_tokens,
        "share": round(state.laid_out_tokens / max(state.train_tokens, 1), 4),
    }
    if "time" in run.record.content:  # a run of one or two steps has no forecast
        run.record.content["time"]["measured_seconds"] = round(state.train_seconds, 3)
    run.record.content["steps"] = trainer.state.global_step
    run.record.content["epochs"] = round(trainer.state.epoch or 0.0, 6)
    return state


def _build_trainer(
    run: Run, state: RunState, sampler: StepSampler, contract: Mapping[str, Any], request: StopRequest
) -> StepTrainer:
    config = run.config
    planner = ShrinkingPlanner(run.planner)
    rows = run.data.splits["train"]
    pictures = run.planner.pictures
    decodes = rows.has_images and not (isinstance(pictures, PictureReader) and pictures.known is not None)
    decoders = resolve_decoders(config.data.num_workers, decodes=decodes, device=run.device)
    if decodes:
        run.reporter.say(f"decoding processes: {decoders.value} ({decoders.reason})")
    steps = build_loader(rows, sampler, planner, decoders=decoders.value)
    trainer = StepTrainer(
        model=run.model,
        args=build_arguments(
            config.training,
            staging=run.folder.checkpoints / STAGING,
            steps_per_epoch=len(sampler),
            evaluation=config.evaluation.model_copy(update={"strategy": run.choices["evaluation_strategy"].value}),
            device=run.device,
            further=config.advanced.trainer_args,
        ),
        train_dataset=run.data.splits["train"],
        eval_dataset=run.data.splits.get("validation"),
        callbacks=_callbacks(run, state, sampler, contract, request),
        steps=steps,
        run_state=state,
        measure=_measure_validation(run, state, request),
        planner=planner,
        on_shrink=functools.partial(_note_smaller_budget, run),
        processes=run.processes,
        loraplus_lr_ratio=config.lora.loraplus_lr_ratio if config.lora.variant == "lora_plus" else 1.0,
        note=functools.partial(_note_event, run),
    )
    if run.processes.rank > 0:  # dropout in the base model, where it is on, must not be the same everywhere
        torch.manual_seed(config.training.seed + run.processes.rank)
    for shown in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown)
    return trainer


def _note_smaller_budget(run: Run, step: int, token_budget: int) -> None:
    what = f"out of memory at step {step}: token budget lowered to {token_budget}, the step was run again"
    run.reporter.say(f"{what}; its loss is the same")
    run.planner = run.planner.with_budget(token_budget)  # evaluations follow
    run.record.content["token_budget"]["value"] = token_budget
    run.record.add_event(what)
    run.record.update()


def _note_forecast(run: Run, seconds: float, step: int) -> None:
    what = {"predicted_seconds": round(seconds, 3), "predicted_at_step": step, "without": "evaluations and checkpoints"}
    if seconds >= _TOLD_SECONDS:
        run.reporter.say(f"all steps will take about {format_seconds(seconds)}, without evaluations and checkpoints")
    run.record.update(time=what)


def _note_event(run: Run, what: str) -> None:
    run.reporter.say(what)
    run.record.add_event(what)
    run.record.update()


def _say_what_best_means(run: Run, args: TrainingArguments, *, steps_per_epoch: int) -> None:
    """Say it where `load_best_model_at_end` has nothing to choose from: the only evaluation is the one at the end."""
    total = count_steps(run.config.training, steps_per_epoch)
    interval = steps_per_epoch if args.eval_strategy == IntervalStrategy.EPOCH else run.config.evaluation.steps
    if not run.config.training.load_best_model_at_end or (total - 1) // interval:
        return
    what = f"load_best_model_at_end: the only evaluation is that of the last step ({total}), whose adapter is kept"
    run.reporter.say(f"{what}; lower evaluation.steps for a choice")
    if all(event["what"] != what for event in run.record.content["events"]):
        run.record.add_event(what)
        run.record.update()


def _take_up(trainer: StepTrainer, model: SupervisedPeftModel, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights and progress in place, for what comes before the next step or instead of it."""
    set_peft_model_state_dict(model, load_file(checkpoint.path / WEIGHTS_FILE))
    trainer.state = TrainerState.load_from_json(str(checkpoint.path / TRAINER_STATE_FILE))


def _callbacks(
    run: Run, state: RunState, sampler: StepSampler, contract: Mapping[str, Any], request: StopRequest
) -> list[TrainerCallback]:
    training = run.config.training
    early_stopping, best = training.early_stopping, training.load_best_model_at_end
    callbacks: list[TrainerCallback] = [
        MetricsWriter(run.folder.metrics if run.processes.first else None),
        ProgressReporter(run.reporter, headline=run.task.headline),
        EpochSetter(sampler),
        EarlyStopper(
            state,
            figure=watched_metric(training),
            better=_watched_direction(run),
            early_stopping=early_stopping,
            save_best=best,
        ),
        CheckpointSealer(
            run.folder.checkpoints,
            run_state=state,
            contract=contract,
            keep=training.save_total_limit,
            processes=run.processes,
        ),
        EvaluationNote(state),
        TimeForecast(
            state,
            tokens=tokens_alone(all_steps(sampler, count_steps(training, len(sampler))), run.data.splits["train"]),
            note=functools.partial(_note_forecast, run),
        ),
        LivenessCheck(state, note=functools.partial(_note_event, run)),
        SignalStop(request, processes=run.processes),
        CurrentIntervals(),
    ]
    if run.pushing is not None:  # behind the sealer
        callbacks.append(run.pushing)
    if run.trackers is not None:
        run.trackers.open()
        callbacks.append(TrackerCallback(run.trackers))
    return callbacks


def _watched_direction(run: Run) -> Better:
    """Return which direction of the watched figure is better."""
    figure, stopping = watched_metric(run.config.training), run.config.training.early_stopping
    if stopping is not None and stopping.mode != "auto":
        return "lower" if stopping.mode == "min" else "higher"
    better = better_of(figure) or run.task.better(figure)
    if better is None:  # the configuration's rules know all but functions of the user's own
        raise ConfigError(
            f"neither direction of {figure!r} is better", where="key training", fix="watch another metric"
        )
    return better


def _measure_validation(run: Run, state: RunState, request: StopRequest) -> Callable[[], dict[str, float]] | None:
    split, evaluation = run.data.splits.get("validation"), run.config.evaluation
    if split is None:
        return None
    should_stop = functools.partial(request.agree, run.processes)
    meter = (
        TaskMeter(
            run.task,
            run.model,
            split,
            limit=evaluation.metric_rows,
            prompter=run.data.prompter,
            evaluation=evaluation,
            device=run.device,
            reporter=run.reporter,
            should_stop=should_stop,
            processes=run.processes,
        )
        if run.task.metrics and run.choices["evaluation_strategy"].value != "no"
        else None
    )

    def measure() -> dict[str, float]:
        started = time.perf_counter()
        try:
            result = measure_loss(
                run.model,
                split,
                planner=run.planner,
                batch_size=evaluation.batch_size,
                device=run.device,
                reporter=run.reporter,
                label="validate",
                should_stop=should_stop,
                processes=run.processes,
            )
            figures: dict[str, float] = {}
            if meter is not None:
                measured = meter.measure(result, run.planner, label="to validate", intervals=False)
                figures = run.processes.share(measured.values if run.processes.first else None)
        except Interrupted:
            return {}
        finally:
            state.pause_clock(time.perf_counter() - started)
        return {
            "eval_loss": result.loss,
            "eval_perplexity": result.perplexity,
            "eval_token_accuracy": result.token_accuracy,
            "eval_token_entropy": result.token_entropy,
            **{f"eval_{name}": value for name, value in figures.items()},
        }

    return measure
