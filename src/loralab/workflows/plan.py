"""The `plan` command: what `train` would do, told before it does it.

Reads top to bottom in the order of the work. Without the probe no weight is loaded: the model is built
on the meta device, the rows are the real ones, and everything that is counted is counted on those.
"""

from dataclasses import replace
from typing import Any

import torch

from loralab.config.load import LoadedConfig
from loralab.config.schema import Config
from loralab.data.dataset import PreparedData, prepare_data
from loralab.errors import ModelError
from loralab.layout.planner import Planner
from loralab.models.blueprint import Blueprint, Untraceable, describe_trainable, describe_weights
from loralab.models.determinism import restored_algorithms
from loralab.models.device_map import resolve_device_map, select_gpus, visible_devices
from loralab.models.load import check_length, check_local_model, load_model_config, load_tokenizer
from loralab.models.memory import free_bytes
from loralab.models.precision import Resolved, resolve_device, resolve_precision
from loralab.models.trainable_tokens import settle_tokens
from loralab.models.variants import needs_activations
from loralab.progress import Reporter
from loralab.training.arguments import check_optimizer
from loralab.training.distributed import Processes
from loralab.workflows.base_share import held_base
from loralab.workflows.configure import run_path
from loralab.workflows.frozen_trunk import expected_bytes
from loralab.workflows.memory_record import predict_run_memory
from loralab.workflows.memory_watch import process_bytes
from loralab.workflows.pictures import open_pictures, reading_pictures
from loralab.workflows.pinning import name_commits
from loralab.workflows.plan_advice import Situation, advise
from loralab.workflows.plan_disk import predict_disk
from loralab.workflows.plan_probe import Probe, run_probe
from loralab.workflows.plan_steps import (
    RunSteps,
    all_steps,
    count_layouts,
    describe_schedule,
    fullest_step,
    possible_layouts,
)
from loralab.workflows.recomputation import Recomputation, settle_recomputation
from loralab.workflows.record import describe_choices
from loralab.workflows.split_evaluation import measured_splits, resolve_evaluation
from loralab.workflows.step_layout import build_blueprint, build_sampler, expect_planner
from loralab.workflows.step_memory import needed_bytes, optimizer_bytes, trained_shapes
from loralab.workflows.task import resolve_task


def plan(loaded: LoadedConfig, *, probe: bool, reporter: Reporter, processes: int = 1) -> dict[str, Any]:
    """Say what a run would do, without writing to its folder.

    Args:
        loaded: the configuration.
        probe: load the model and run a few of the run's own steps, for memory and time as they are.
        reporter: told of progress.
        processes: how many share the run on one machine; memory is that of each.

    Returns:
        `parameters`, `schedule`, `tokens`, `memory`, `fits`, `advice`, `time`, `disk`, and `choices` with reasons.

    Raises:
        UserError: what `train` would raise before its first step.
    """
    loaded = name_commits(loaded, reporter)
    config, team = loaded.config, Processes(count=processes, local_count=processes)
    choices, drawn, data, data_bytes = _gather(loaded, reporter, processes)
    free = _free_bytes(config, drawn.device, processes)
    settled = _settle(config, drawn, data, free=free, team=team)
    # What could be drawn keeping its activations can be drawn recomputing them.
    config, blueprint = settled.config, drawn if isinstance(settled.blueprint, str) else settled.blueprint
    loaded = replace(loaded, config=config)
    left = max(free - _held_bytes(config, blueprint, team), 0) // len(visible_devices(config.model, drawn.device))
    planner, chosen = expect_planner(blueprint, config, free=left, known=settled.counted)
    planner = reading_pictures(planner, data.prompter, blueprint.model)
    memory = predict_run_memory(config, data, planner, blueprint, data_bytes=data_bytes, processes=team)
    unprobed = "--no-probe" if not probe else "the probe is one process" if processes > 1 else None
    measured = unprobed or _probe(loaded, needed_bytes(memory), free=free, reporter=reporter)
    if isinstance(measured, Probe):
        if measured.planner != planner:
            planner = measured.planner
            memory = predict_run_memory(config, data, planner, blueprint, data_bytes=data_bytes)
        chosen, memory = measured.choices, measured.memory(memory)
    choices |= blueprint.choices | chosen | resolve_evaluation(config) | {"gradient_checkpointing": settled.choice}
    if needs_activations(config.lora):
        what = "its ranks are dealt out by what the layers see when the run starts: parameters may differ from these"
        choices["first_weights"] = Resolved(config.lora.variant, what)
    sampler, sampling = build_sampler(config, data.splits["train"], shares=data.shares, processes=team)
    schedule = describe_schedule(config, data, sampler)
    run = all_steps(sampler, schedule["total_steps"])
    trees = blueprint.model.tree_kernel is not None or planner.layout != "padded"
    possible, blind = possible_layouts(planner.layout, trees), replace(planner, pictures=None)
    tokens = count_layouts(run, data.splits["train"], blind, possible=possible, reporter=reporter)
    needed, strategy = needed_bytes(memory), choices["evaluation_strategy"].value
    return {
        "name": loaded.name,
        "choices": describe_choices(choices),
        "parameters": {
            **describe_weights(blueprint.model),
            "by_layer": describe_trainable(blueprint.model),
        },
        "schedule": schedule | {"sampling": sampling},
        "tokens": tokens | {"token_budget": planner.token_budget, "layout": planner.layout},
        "memory": memory | {"needed_bytes": needed, "free_bytes": free, "device": str(blueprint.device)},
        "fits": None if needed is None else needed <= free,
        "advice": advise(
            _situation(config, data, run, planner, blueprint=blueprint, data_bytes=data_bytes, team=team), free=free
        )
        if needed and needed > free
        else [],
        "time": measured.time(tokens, schedule)
        if isinstance(measured, Probe)
        else {"seconds": None, "why": f"not measured: {measured}"},
        "disk": predict_disk(
            config,
            data,
            optimizer=optimizer_bytes(config.training.optim, trained_shapes(blueprint)),
            model=blueprint.model,
            checkpoints=schedule["checkpoints"],
            folder=run_path(loaded),
        )
        | {"frozen_trunk_bytes": None if processes > 1 else expected_bytes(config, data, blueprint.model, strategy)},
    }


def _probe(loaded: LoadedConfig, needed: int | None, *, free: int, reporter: Reporter) -> Probe | str:
    """Run the probe, or return why it is not run: what does not fit is not tried, since the system would kill it."""
    if needed is not None and needed > free:
        return "the run would not fit into memory"
    try:
        with restored_algorithms():
            return run_probe(loaded, run_path(loaded), reporter=reporter)
    except torch.OutOfMemoryError:
        return "the probe ran out of memory"


def _free_bytes(config: Config, device: torch.device, processes: int) -> int:
    """Return what is free for one process: on a CPU a share, on GPUs all of its own, or of those it spreads over."""
    free = sum(free_bytes(each) for each in visible_devices(config.model, device))
    return free // processes if device.type == "cpu" else free


def _gather(
    loaded: LoadedConfig, reporter: Reporter, processes: int
) -> tuple[dict[str, Resolved[Any]], Blueprint, PreparedData, int]:
    """Resolve and check in the order of `train`, up to the point where it loads weights."""
    config = loaded.config
    check_local_model(config.model.name)
    note = select_gpus(config.model)
    device = resolve_device("cuda:0" if note else config.model.device)
    precision = resolve_precision(config.model, device.value)
    check_optimizer(config.training.optim, device.value)
    check_length(load_model_config(config.model), config.data.max_length)
    before = process_bytes(device.value)
    tokenizer = load_tokenizer(config.model)
    lora = settle_tokens(config.lora, tokenizer)
    pictures = open_pictures(config)
    data = prepare_data(config.data, tokenizer, reporter=reporter, pictures=pictures)
    data_bytes = max(process_bytes(device.value) - before, 0)
    _, measured = resolve_task(config, data, splits=measured_splits(config, data.splits))
    try:
        blueprint = build_blueprint(config, lora, dtype=precision.value, device=device.value)
    except Untraceable as error:
        dora = config.lora.variant == "dora" and config.model.quantization != "none"
        raise ModelError(
            "DoRA reads the weights of a quantized base while it is built, and a plan has none" if dora else str(error),
            where="key lora.variant" if dora else "key model.name",
            fix="start the run with training.max_steps=2: run.json says what it took",
        ) from error
    settled = blueprint.settled
    held = Resolved(str(settled.quantization.value or "none"), settled.quantization.reason)
    chosen: dict[str, Resolved[Any]] = {
        "device": device,
        "precision": precision,
        "quantization": held,
        "attn_implementation": settled.attention,
    }
    chosen |= resolve_device_map(config.model, device.value, processes=processes)
    return chosen | settled.others | measured, blueprint, data, data_bytes


def _situation(
    config: Config,
    data: PreparedData,
    run: RunSteps,
    planner: Planner,
    *,
    blueprint: Blueprint,
    data_bytes: int,
    team: Processes,
) -> Situation:
    train = data.splits["train"]
    step = fullest_step(run, train)
    examples = [train[row] for row in step[: -(-len(step) // team.count)]]  # of one process
    dtype = blueprint.model.embedding.weight.dtype
    by_id = config.model_copy(update={"lora": blueprint.lora})
    return Situation(by_id, examples, planner, blueprint.device, dtype, data_bytes, team)


def _settle(config: Config, blueprint: Blueprint, data: PreparedData, *, free: int, team: Processes) -> Recomputation:
    """Choose whether activations are recomputed, as `train` does."""
    return settle_recomputation(
        config,
        blueprint.lora,
        blueprint,
        base=blueprint.model.language_model.config,
        dtype=blueprint.model.embedding.weight.dtype,
        device=blueprint.device,
        rows=data.splits["train"],
        free=max(free - held_base(config, blueprint, team).own, 0),
    )


def _held_bytes(config: Config, blueprint: Blueprint, team: Processes) -> int:
    """Return what is taken once the model is there, of what is free now."""
    return held_base(config, blueprint, team).own + int(describe_weights(blueprint.model)["trainable_bytes"])
