"""A training run, from configuration to run folder, in time order.

This page is the table of contents of a run: read `train` top to bottom.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import set_seed

from loralab.config.load import LoadedConfig
from loralab.config.schema import Config
from loralab.config.tracker_checks import check_trackers
from loralab.data.dataset import PreparedData, prepare_data
from loralab.errors import ConfigError, StoppedBySignal
from loralab.layout.planner import Planner
from loralab.models.adapters import build_adapter
from loralab.models.allocator import release_freed_memory
from loralab.models.determinism import resolve_determinism, restored_algorithms
from loralab.models.device_map import resolve_device_map, select_gpus
from loralab.models.kernel_caches import bound_kernel_caches
from loralab.models.load import (
    check_length,
    check_local_model,
    count_parameters,
    describe_model,
    load_model_config,
    load_tokenizer,
)
from loralab.models.precision import Resolved, resolve_device, resolve_precision
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.threads import resolve_threads
from loralab.models.trainable_tokens import new_tokens_of, settle_tokens
from loralab.progress import Reporter
from loralab.run import RunFolder, read_json, write_json
from loralab.training.arguments import check_optimizer
from loralab.training.callbacks import StopRequest, catching_signals
from loralab.training.checkpoint import find_checkpoint
from loralab.training.distributed import Processes, joined, naming_losses
from loralab.training.sharding import place_model
from loralab.workflows.adapter_folder import describe_base, save_adapter
from loralab.workflows.adapter_start import (
    activation_batches,
    check_warm_start,
    find_saved_start,
    warn_of_absent_tokens,
)
from loralab.workflows.configure import run_path
from loralab.workflows.final_evaluation import evaluate_at_end, finish_record, keep_best
from loralab.workflows.frozen_trunk import leave_frozen_trunk, open_frozen_trunk, remove_frozen_trunk
from loralab.workflows.hub_pushes import HubPlan, HubPushes, settle_hub
from loralab.workflows.kept_features import keep_features
from loralab.workflows.memory_record import predict_run_memory
from loralab.workflows.memory_watch import MemoryWatch, forget_peak, process_bytes
from loralab.workflows.output import claim_output, has_begun
from loralab.workflows.pictures import check_pictures, open_pictures, reading_pictures
from loralab.workflows.push import push_owed
from loralab.workflows.record import (
    RunRecord,
    UnwrittenRecord,
    check_same_config,
    closing_record,
    describe_choices,
    environment_changes,
    hardware,
    versions,
)
from loralab.workflows.report import build_report
from loralab.workflows.resume import find_start
from loralab.workflows.run_base import RunBase, load_run_base
from loralab.workflows.same_start import agree_on_contract, check_same_settings
from loralab.workflows.split_evaluation import measured_splits, resolve_evaluation
from loralab.workflows.step_layout import resolve_planner
from loralab.workflows.steps import Run, run_steps
from loralab.workflows.task import resolve_task
from loralab.workflows.tracking import tracking
from loralab.workflows.warm_start import apply_warm_start


def train(
    loaded: LoadedConfig,
    *,
    reporter: Reporter,
    resume: bool = False,
    overwrite: bool = False,
    warm_start: Path | Mapping[str, str] | None = None,
) -> RunFolder:
    """Train an adapter and evaluate it.

    Args:
        loaded: the configuration.
        reporter: told of progress and choices.
        resume: go on from the newest checkpoint of the output folder.
        overwrite: replace an earlier run in the output folder.
        warm_start: run or adapter folder whose weights the new run starts from, or the `warm_start`
            that an earlier run recorded, to start from the very same weights.

    Returns:
        The run folder.

    Raises:
        UserError: the configuration, data, model or folder cannot be used.
        StoppedBySignal: SIGINT or SIGTERM; a checkpoint was written if a step had been done.
    """
    if resume and warm_start is not None:
        raise ConfigError(
            "--warm-start with --resume, which goes on with the run's own weights",
            where="options --warm-start, --resume",
            fix="start a new run with --warm-start, or go on with --resume alone",
        )
    folder = RunFolder(run_path(loaded))
    with contextlib.ExitStack() as stack:
        watch = stack.enter_context(MemoryWatch())
        stack.enter_context(restored_algorithms())
        processes = stack.enter_context(joined(loaded.config.model.device, loaded.config.training.distributed))
        beginning = None
        if processes.first:
            claim = claim_output(folder, resume=resume, overwrite=overwrite, start=str(warm_start or ""))
            stack.enter_context(claim)
            beginning = _find_beginning(folder, loaded.config, resume=resume, warm_start=warm_start)
        else:
            reporter = Reporter()
        beginning = processes.share(beginning)
        check_same_settings(loaded.config, processes)
        if beginning.completed:
            return _nothing_to_do(folder, loaded, reporter) if processes.first else folder
        loaded, hub = settle_hub(
            loaded, folder, going_on=beginning.going_on, overwrite=overwrite, reporter=reporter, processes=processes
        )
        if resume and not beginning.going_on:
            reporter.say("the run had not begun: starting from step 0")
        return _train(loaded, folder, reporter=reporter, beginning=beginning, processes=processes, watch=watch, hub=hub)


@dataclass(frozen=True, slots=True)
class _Beginning:
    """Where a run begins, as its folder says: read by one process, followed by all.

    Attributes:
        completed: there is nothing left to do.
        going_on: the folder's run goes on.
        warm_start: whose weights the run starts from when it has no checkpoint.
        token_budget: what the run laid its steps out under so far, or None: another would change
            the last bits of its sums.
        recomputes: whether the run recomputed activations so far, or None.
        saved: checkpoint whose weights take the place of computed first ones, or None.
    """

    completed: bool
    going_on: bool
    warm_start: Path | Mapping[str, str] | None
    token_budget: int | None
    recomputes: bool | None
    saved: Path | None


def _find_beginning(
    folder: RunFolder, config: Config, *, resume: bool, warm_start: Path | Mapping[str, str] | None
) -> _Beginning:
    going_on = resume and has_begun(folder)
    completed = going_on and read_json(folder.record).get("status") == "completed"
    start = read_json(folder.record).get("warm_start") if resume and folder.exists() else warm_start
    record = read_json(folder.record) if going_on else {}
    budget = record.get("token_budget", {}).get("value")
    recomputed = record.get("resolved", {}).get("gradient_checkpointing", {}).get("value")
    if start is not None:
        check_warm_start(config)
    saved = find_saved_start(config, folder) if going_on and not completed else None
    recomputes = None if recomputed is None else recomputed == "True"
    return _Beginning(completed, going_on, start, budget, recomputes, saved)


def _nothing_to_do(folder: RunFolder, loaded: LoadedConfig, reporter: Reporter) -> RunFolder:
    check_same_config(folder, loaded.config)
    if not folder.report.is_file():  # a kill came just before it
        build_report(folder)
    if not push_owed(folder, loaded.config, reporter):
        reporter.say(f"nothing to do: the run in {folder.path} is complete")
    return folder


def _train(
    loaded: LoadedConfig,
    folder: RunFolder,
    *,
    reporter: Reporter,
    beginning: _Beginning,
    processes: Processes,
    watch: MemoryWatch,
    hub: HubPlan,
) -> RunFolder:
    run = prepare_run(
        loaded,
        folder,
        reporter=reporter,
        processes=processes,
        saved=beginning.saved,
        recomputes=beginning.recomputes,
    )
    if beginning.token_budget is not None:
        run.planner = run.planner.with_budget(beginning.token_budget)
        run.choices["token_budget"] = Resolved(
            beginning.token_budget, "as when the run began or last ran out of memory"
        )
    contract = agree_on_contract(run)
    checkpoint = None
    if beginning.going_on:
        checkpoint = processes.share(find_start(folder, contract, reporter=reporter) if processes.first else None)
    start = beginning.warm_start
    source = apply_warm_start(run, start) if start is not None and checkpoint is None else None
    processes.wait()  # the record's first entry clears an earlier run, which may hold what was just read
    run.record = _begin_record(run, loaded, resumed=beginning.going_on, source=source)
    pushes = HubPushes(run, hub)
    with (
        closing_record(run.record),
        catching_signals(lambda request: reporter.say(request.notice)) as request,
        naming_losses(processes),
        tracking(run),
    ):
        keep_features(run, request)
        _stop_if_asked(request, run)
        open_frozen_trunk(run, request)
        state = run_steps(run, contract, checkpoint, request)
        _stop_if_asked(request, run)
        leave_frozen_trunk(run)
        request.notice = "stopping; --resume will repeat the final evaluation, no step is lost"
        keep_best(run, state)
        if processes.first:
            facts = describe_base(run.config.model, run.base_facts, run.choices["precision"].value)
            save_adapter(folder.adapter, run.model, run.data.prompter, facts=facts)
        evaluate_at_end(run, request)
        processes.wait()  # the first one alone lets the models answer
        _stop_if_asked(request, run)
        request.notice = "finishing: only the report is left"
        remove_frozen_trunk(run)
        if processes.first:
            finish_record(run, state, watch)
            build_report(folder)
    pushes.finish()
    reporter.say(f"done: {folder.path} (open {folder.report})")
    return folder


def prepare_run(
    loaded: LoadedConfig,
    folder: RunFolder,
    *,
    reporter: Reporter,
    processes: Processes,
    saved: Path | None,
    recomputes: bool | None = None,
) -> Run:
    """Load data and model; nothing is written to the run folder.

    Args:
        loaded: the configuration.
        folder: of the run.
        reporter: told of progress and choices.
        processes: those that share the run.
        saved: checkpoint whose weights take the place of computed first ones, or None.
        recomputes: whether the run that goes on recomputed activations so far, or None.

    Raises:
        UserError: data, model or settings cannot be used.
    """
    config = loaded.config
    check_local_model(config.model.name)
    choices = _choose_device(config, processes, reporter)
    device, precision = choices["device"], choices["precision"]
    forget_peak(device.value)
    check_length(load_model_config(config.model), config.data.max_length)
    pictures = open_pictures(config)
    before = process_bytes(device.value)
    tokenizer = load_tokenizer(config.model)
    lora = settle_tokens(config.lora, tokenizer)  # before the data, which new tokens stand in
    with processes.first_goes_ahead():  # the others find the tokenized rows in the cache
        data = prepare_data(config.data, tokenizer, reporter=reporter, pictures=pictures)
    data_bytes = max(process_bytes(device.value) - before, 0)
    # Now, not after hours of training.
    task, task_choices = resolve_task(config, data, splits=measured_splits(config, data.splits))
    warn_of_absent_tokens(new_tokens_of(lora), data, reporter)
    start = load_run_base(
        config,
        lora,
        data,
        dtype=precision.value,
        device=device.value,
        processes=processes,
        keeps_residual=saved is None,
        recomputes=recomputes,
    )
    base, config, blueprint = start.model, start.recomputation.config, start.recomputation.blueprint
    set_seed(config.training.seed)
    batches = activation_batches(config, data)
    model, adapter_choices = build_adapter(base, lora, seed=config.training.seed, batches=batches, saved=saved)
    choices |= place_model(model, device.value, config.training.distributed, processes=processes)
    task.check_room(model)
    choices |= resolve_determinism(model, device.value)
    planner, layout_choices = _choose_layout(model, config, start, data, processes=processes)
    choices |= start.choices | adapter_choices | layout_choices | resolve_evaluation(config) | task_choices
    _tell(choices, reporter)
    base_facts = describe_model(config.model, base) | {"base_parameters": start.own_parameters}
    memory = predict_run_memory(config, data, planner, blueprint, data_bytes=data_bytes, processes=processes)
    release_freed_memory()
    record, at = RunRecord(folder), device.value
    return Run(config, folder, data, model, at, base_facts, choices, reporter, record, planner, task, processes, memory)


def _choose_layout(
    model: SupervisedPeftModel, config: Config, start: RunBase, data: PreparedData, *, processes: Processes
) -> tuple[Planner, dict[str, Resolved[Any]]]:
    """Choose how steps are laid out, and what reads their pictures."""
    planner, choices = resolve_planner(
        model,
        config,
        max_length=config.data.max_length,
        device=model.embedding.weight.device,
        sharing=processes.local_count,
        blueprint=start.recomputation.blueprint,
        known=start.recomputation.counted,
    )
    planner = reading_pictures(planner, data.prompter, model)
    if data.prompter.pictures is not None:
        choices["pictures"] = check_pictures(model, data.prompter.pictures)
    # The least of all, so that a resume, which goes on with the recorded one, cuts every process's steps alike.
    planner = planner.with_budget(-processes.largest(-planner.token_budget))
    choices["token_budget"] = replace(choices["token_budget"], value=planner.token_budget)
    return planner, choices


def _choose_device(config: Config, processes: Processes, reporter: Reporter) -> dict[str, Resolved[Any]]:
    """Choose where and in which precision to compute, settle the libraries below, and check that the optimizer can."""
    note = select_gpus(config.model)
    device = resolve_device("cuda:0" if note else processes.device_setting(config.model.device))
    if processes.count > 1:
        device = replace(device, reason=f"each of {processes.count} processes takes its own")
    if note:
        reporter.say(note)
    check_optimizer(config.training.optim, device.value)
    check_trackers(config.output.trackers)
    precision = resolve_precision(config.model, device.value)
    threads = resolve_threads(device.value, sharing=processes.local_count)
    spread = resolve_device_map(config.model, device.value, processes=processes.count)
    return {"device": device, "precision": precision, **spread, **threads, **bound_kernel_caches(device.value)}


def _tell(choices: Mapping[str, Resolved[Any]], reporter: Reporter) -> None:
    for name, choice in choices.items():
        reporter.say(f"{name}: {str(choice.value).removeprefix('torch.')} ({choice.reason})")


def _begin_record(run: Run, loaded: LoadedConfig, *, resumed: bool, source: Mapping[str, str] | None) -> RunRecord:
    total, trainable = count_parameters(run.model)
    facts: dict[str, Any] = {
        "resolved": describe_choices(run.choices),
        "versions": versions(),
        "hardware": hardware(run.device),
        "model": {
            **run.base_facts,
            "parameters": total,
            "trainable_parameters": trainable,
        },
        "processes": run.processes.count,
        "data_fingerprint": run.data.fingerprint,
        "data_identity": run.data.identity,
        "token_budget": {"value": run.planner.token_budget, "reason": run.choices["token_budget"].reason},
        "memory": run.memory,
    }
    if source is not None:
        facts["warm_start"] = dict(source)
    if not run.processes.first:
        return UnwrittenRecord(run.folder, {"events": [], **facts})
    run.reporter.say(f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})")
    changes = environment_changes(read_json(run.folder.record), facts) if resumed else []
    record = (RunRecord.reopen if resumed else RunRecord.begin)(run.folder, loaded, facts)
    for change in changes:
        run.reporter.say(f"warning: {change}; the adapter may differ in its last digits from an uninterrupted run's")
        record.add_environment_change(change)
    record.update()
    write_json(run.folder.data, run.data.report)
    return record


def _stop_if_asked(request: StopRequest, run: Run) -> None:
    if request.agree(run.processes) and request.signal_number is not None:
        sealed = find_checkpoint(run.folder.checkpoints)
        command = f"loralab train {run.folder.config} --resume"
        if (count := run.processes.count) > 1:
            here = f"loralab launch {run.folder.config} --resume --num-processes {count}"
            command = here if count == run.processes.local_count else f"{command}, in {count} processes as before"
        raise StoppedBySignal(
            request.signal_number,
            where=str(run.folder.path),
            fix=f"go on from step {sealed.step if sealed else 0} with: {command}",
        )
