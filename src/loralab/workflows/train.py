"""A training run, from configuration to run folder, in time order.

This page is the table of contents of a run: read `train` top to bottom.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from loralab.config.load import LoadedConfig
from loralab.config.schema import Config
from loralab.data.dataset import PreparedData, prepare_data
from loralab.errors import ConfigError, RunFolderError, StoppedBySignal
from loralab.evaluation.perplexity import Interrupted, measure_loss
from loralab.layout.planner import Planner
from loralab.models.adapters import WEIGHTS_FILE, adapter_sha256, build_adapter
from loralab.models.load import (
    check_length,
    check_local_model,
    check_vocabulary,
    count_parameters,
    describe_model,
    load_base_model,
    load_model_config,
    load_tokenizer,
)
from loralab.models.precision import Resolved, resolve_device, resolve_precision, select_single_gpu
from loralab.models.supervised import SupervisedPeftModel
from loralab.progress import Reporter
from loralab.run import RunFolder, read_json, write_json
from loralab.training.arguments import build_arguments
from loralab.training.callbacks import (
    CheckpointSealer,
    EarlyStopper,
    EpochSetter,
    MetricsWriter,
    PendingEvaluation,
    ProgressReporter,
    SignalStop,
    StopRequest,
    catching_signals,
    check_finite,
    truncate_metrics,
)
from loralab.training.checkpoint import (
    STAGING,
    Checkpoint,
    find_checkpoint,
    read_checkpoint,
)
from loralab.training.sampler import StepSampler
from loralab.training.state import RunState
from loralab.training.trainer import StepTrainer
from loralab.workflows.configure import run_path
from loralab.workflows.evaluate import answer_samples, evaluate_split, resolve_split
from loralab.workflows.record import (
    RunRecord,
    check_output,
    check_same_config,
    clear_run,
    closing_record,
    describe_choices,
    hardware,
    now,
    peak_memory_bytes,
)
from loralab.workflows.report import build_report
from loralab.workflows.resume import find_start, resume_contract
from loralab.workflows.session import CONTRACT_FILE


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


def train(loaded: LoadedConfig, *, reporter: Reporter, resume: bool = False, overwrite: bool = False) -> RunFolder:
    """Train an adapter and evaluate it.

    Args:
        loaded: the configuration.
        reporter: told of progress and choices.
        resume: go on from the newest checkpoint of the output folder.
        overwrite: replace an earlier run in the output folder.

    Returns:
        The run folder.

    Raises:
        UserError: the configuration, data, model or folder cannot be used.
        StoppedBySignal: SIGINT or SIGTERM; a checkpoint was written if a step had been done.
    """
    folder = RunFolder(run_path(loaded))
    check_output(folder, resume=resume, overwrite=overwrite)
    if resume and read_json(folder.record).get("status") == "completed":
        check_same_config(folder, loaded.config)
        reporter.say(f"nothing to do: the run in {folder.path} is complete")
        return folder
    run = _prepare(loaded, folder, reporter)
    contract = resume_contract(run.config, data=run.data, choices=run.choices, device=run.device, model=run.base_facts)
    checkpoint = find_start(folder, contract, reporter=reporter) if resume else None
    if not resume:
        clear_run(folder)
    run.record = _begin_record(run, loaded, resumed=resume)
    with closing_record(run.record), catching_signals(lambda: reporter.say("stopping after this step")) as request:
        state = _run_steps(run, contract, checkpoint, request)
        _stop_if_asked(request, run)
        _keep_best(run, state)
        _save_adapter(run)
        _evaluate(run, request)
        _stop_if_asked(request, run)
        _finish_record(run, state)
        build_report(folder)
    reporter.say(f"done: {folder.path} (open {folder.report})")
    return folder


def _prepare(loaded: LoadedConfig, folder: RunFolder, reporter: Reporter) -> Run:
    """Load data and model; nothing is written to the run folder."""
    config = loaded.config
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            f"started as one of {os.environ['WORLD_SIZE']} processes; this version trains in one",
            where="environment variable WORLD_SIZE",
            fix="start `loralab train` directly",
        )
    check_local_model(config.model.name)
    note = select_single_gpu(config.model.device)
    device = resolve_device("cuda:0" if note else config.model.device)
    precision = resolve_precision(config.model, device.value)
    choices: dict[str, Resolved[Any]] = {"device": device, "precision": precision}
    if note:
        reporter.say(note)
    check_length(load_model_config(config.model), config.data.max_length)
    data = prepare_data(config.data, load_tokenizer(config.model), reporter=reporter)
    resolve_split(config.evaluation.split, data.splits)  # now, not after hours of training
    base, base_choices = load_base_model(config.model, dtype=precision.value, device=device.value)
    largest = max(*(split.largest_id for split in data.splits.values()), *data.prompter.stop.ids)
    check_vocabulary(base, largest)
    if config.training.gradient_checkpointing:
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    set_seed(config.training.seed)
    model, adapter_choices = build_adapter(base, config.lora, seed=config.training.seed)
    model.to(device.value)
    choices |= base_choices | adapter_choices | _resolve_evaluation(config)
    for name, choice in choices.items():
        reporter.say(f"{name}: {str(choice.value).removeprefix('torch.')} ({choice.reason})")
    base_facts = describe_model(config.model, base)
    return Run(config, folder, data, model, device.value, base_facts, choices, reporter, RunRecord(folder))


def _resolve_evaluation(config: Config) -> dict[str, Resolved[Any]]:
    if config.data.validation is None:
        return {"evaluation_strategy": Resolved("no", "data.validation is null")}
    return {"evaluation_strategy": Resolved(config.evaluation.strategy, "set in evaluation.strategy or by default")}


def _begin_record(run: Run, loaded: LoadedConfig, *, resumed: bool) -> RunRecord:
    total, trainable = count_parameters(run.model)
    config = run.config
    facts = {
        "resolved": describe_choices(run.choices),
        "hardware": hardware(run.device),
        "model": {
            **run.base_facts,
            "parameters": total,
            "trainable_parameters": trainable,
        },
        "data_fingerprint": run.data.fingerprint,
        "token_budget": {
            "value": config.training.per_device_train_batch_size * config.data.max_length,
            "reason": "B rows of at most max_length tokens per micro-batch",
        },
    }
    run.reporter.say(f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})")
    record = (RunRecord.reopen if resumed else RunRecord.begin)(run.folder, loaded, facts)
    write_json(run.folder.data, run.data.report)
    return record


def _run_steps(run: Run, contract: Mapping[str, Any], checkpoint: Checkpoint | None, request: StopRequest) -> RunState:
    """Run the optimizer's steps; return what the run remembers of them."""
    config, training = run.config, run.config.training
    state = RunState.load(checkpoint.path) if checkpoint else RunState()
    truncate_metrics(run.folder.metrics, checkpoint.step if checkpoint else 0)
    shutil.rmtree(run.folder.checkpoints / STAGING, ignore_errors=True)
    sampler = StepSampler(
        rows=len(run.data.splits["train"]),
        rows_per_step=training.per_device_train_batch_size * training.gradient_accumulation_steps,
        seed=training.seed,
    )
    planner = Planner(training.per_device_train_batch_size)
    steps: DataLoader[Any] = DataLoader(run.data.splits["train"], batch_sampler=sampler, collate_fn=planner)  # type: ignore[arg-type]
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
    )
    for shown in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown)
    state.start_clock()
    try:
        if checkpoint is None or state.stopped_because is None:  # an early stop stays one after a resume
            trainer.add_callback(PendingEvaluation(state, trainer.evaluate))
            trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        else:
            set_peft_model_state_dict(run.model, load_file(checkpoint.path / WEIGHTS_FILE))
            trainer.state.global_step = checkpoint.step
        check_finite(run.model, step=trainer.state.global_step)
    finally:
        shutil.rmtree(run.folder.checkpoints / STAGING, ignore_errors=True)
    state.train_seconds = state.elapsed_seconds
    run.record.content["steps"] = trainer.state.global_step
    run.record.content["epochs"] = round(trainer.state.epoch or 0.0, 6)
    return state


def _callbacks(
    run: Run, state: RunState, sampler: StepSampler, contract: Mapping[str, Any], request: StopRequest
) -> list[TrainerCallback]:
    training = run.config.training
    early_stopping = training.early_stopping
    metric = early_stopping.metric if early_stopping else "eval_loss"
    best = training.load_best_model_at_end
    callbacks: list[TrainerCallback] = [
        MetricsWriter(run.folder.metrics),
        ProgressReporter(run.reporter),
        EpochSetter(sampler),
        EarlyStopper(state, metric=metric, early_stopping=early_stopping, save_best=best),
        CheckpointSealer(run.folder.checkpoints, run_state=state, contract=contract, keep=training.save_total_limit),
        SignalStop(request, run_state=state, steps_per_epoch=len(sampler)),
    ]
    return callbacks


def _measure_validation(run: Run, state: RunState, request: StopRequest) -> Callable[[], dict[str, float]] | None:
    split = run.data.splits.get("validation")
    if split is None:
        return None

    def measure() -> dict[str, float]:
        started = time.perf_counter()
        try:
            result = measure_loss(
                run.model,
                split,
                batch_size=run.config.evaluation.batch_size,
                device=run.device,
                reporter=run.reporter,
                label="validate",
                should_stop=lambda: bool(request),
            )
        except Interrupted:
            state.pending_evaluation = True
            return {}
        finally:
            state.pause_clock(time.perf_counter() - started)
        return {"eval_loss": result.loss, "eval_perplexity": result.perplexity}

    return measure


def _stop_if_asked(request: StopRequest, run: Run) -> None:
    if request.signal_number is not None:
        sealed = find_checkpoint(run.folder.checkpoints)
        raise StoppedBySignal(
            request.signal_number,
            where=str(run.folder.path),
            fix=f"go on from step {sealed.step if sealed else 0} with: loralab train {run.folder.config} --resume",
        )


def _keep_best(run: Run, state: RunState) -> None:
    """Put the best checkpoint's adapter into the model, when that was asked for."""
    if not run.config.training.load_best_model_at_end or state.best_step is None:
        return
    if state.best_step == run.record.content["steps"]:
        return
    best = run.folder.checkpoints / f"checkpoint-{state.best_step}"
    if read_checkpoint(best) is None:
        raise RunFolderError(
            f"the best checkpoint is gone: {best.name}", where=str(best.parent), fix="train again with --overwrite"
        )
    set_peft_model_state_dict(run.model, load_file(best / WEIGHTS_FILE))
    run.reporter.say(f"using the adapter of step {state.best_step}, the best of the run ({state.best_value:.4f})")


def _save_adapter(run: Run) -> None:
    """Write the adapter folder in one step: PEFT's files, tokenizer and prompt contract."""
    staging = Path(tempfile.mkdtemp(prefix=".adapter-", dir=run.folder.path))
    try:
        run.model.save_pretrained(str(staging), safe_serialization=True)
        run.data.prompter.tokenizer.save_pretrained(str(staging))
        (staging / CONTRACT_FILE).write_text(
            json.dumps(run.data.prompter.contract(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        staging.chmod(0o755)
        for path in staging.iterdir():
            path.chmod(0o644)  # temporary folders and safetensors make theirs private
        shutil.rmtree(run.folder.adapter, ignore_errors=True)
        staging.rename(run.folder.adapter)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _evaluate(run: Run, request: StopRequest) -> None:
    """Compare base and adapter on the final split, and let both answer a few of its prompts."""
    name = resolve_split(run.config.evaluation.split, run.data.splits)
    if name is None:
        run.reporter.say("no final evaluation: there is no validation or test split")
        return
    split, evaluation = run.data.splits[name], run.config.evaluation
    try:
        result = evaluate_split(
            run.model,
            split,
            name=name,
            evaluation=evaluation,
            max_length=run.config.data.max_length,
            device=run.device,
            reporter=run.reporter,
            should_stop=lambda: bool(request),
        )
    except Interrupted:
        return  # the caller asks why
    write_json(run.folder.evaluation, result)
    if evaluation.num_samples:
        samples = answer_samples(
            run.model, split, prompter=run.data.prompter, evaluation=evaluation, reporter=run.reporter
        )
        write_json(run.folder.samples, {"split": name, "max_new_tokens": evaluation.max_new_tokens, "samples": samples})


def _finish_record(run: Run, state: RunState) -> None:
    seconds = max(state.train_seconds, 1e-9)
    run.record.update(
        status="completed",
        finished_at=now(),
        adapter_sha256=adapter_sha256(run.folder.adapter),
        stopped_because=state.stopped_because,
        train_seconds=round(state.train_seconds, 3),
        tokens_per_second=round(state.train_tokens / seconds, 1),
        examples_per_second=round(state.train_examples / seconds, 2),
        peak_memory_bytes=peak_memory_bytes(run.device),
    )
