"""The frozen layers below the adapter, computed once per run and kept on disk: whether, and for which rows.

Owns the decision, its reason and what the record says of it. Computing is `trunk_building.py`'s.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loralab.config.schema import Config
from loralab.data.dataset import PreparedData
from loralab.models.device_map import is_spread
from loralab.models.families import find_positions, find_tree_obstacle
from loralab.models.precision import Resolved
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.trunk import FrozenTrunk, UncuttableModel, find_trunk
from loralab.models.trunk_store import TrunkStore
from loralab.models.vision import vision_family
from loralab.training.arguments import count_steps
from loralab.training.callbacks import StopRequest
from loralab.training.sampler import StepSampler
from loralab.workflows.record import describe_choices
from loralab.workflows.steps import Run
from loralab.workflows.trunk_building import RECORD, TrunkPlan, build_trunk_cache, note_trunk, shown_size, trunk_folder
from loralab.workflows.trunk_check import examine_trunk

# A smaller share of the layers saves less than it costs to keep their output.
_LEAST_SHARE = 0.25
_MOST_BYTES = 32 * 10**9
_SHARE_OF_DISK = 0.5


class _NoCache(Exception):
    """Why nothing is cached."""


def open_frozen_trunk(run: Run, request: StopRequest) -> None:
    """Decide whether the run keeps what its frozen layers give, and compute that.

    The choice and what came of it go into the run's choices and record; a resumed run follows its record.

    Args:
        run: the run; from here on its model may start behind the frozen layers.
        request: asks the run to stop; what is computed until then is kept for the resume.
    """
    recorded = run.record.content.get(RECORD)
    plan: TrunkPlan | None = None
    try:
        plan = _plan(run, recorded)
        choice = Resolved("on", plan.reason)
    except _NoCache as error:
        choice = Resolved("off", str(error))
    run.choices["cache_frozen_trunk"] = choice
    run.reporter.say(f"cache_frozen_trunk: {choice.value} ({choice.reason})")
    if recorded and recorded["value"] != choice.value:
        what = "the run began with a cache of its frozen layers: the adapter may differ in its last digits"
        run.reporter.say(f"warning: {what}")
        run.record.add_event(f"warning: {what}")
    facts = {"value": choice.value, "reason": choice.reason, **({} if plan is None else plan.facts())}
    run.record.update(resolved=describe_choices(run.choices), **{RECORD: facts})
    if plan is not None:
        build_trunk_cache(run, plan, request)
    elif run.processes.first:
        shutil.rmtree(trunk_folder(run), ignore_errors=True)


def leave_frozen_trunk(run: Run) -> None:
    """Use the cache no more, and note how often it was: `loralab eval` measures without it, to the same last bit."""
    cached, run.model.cached_trunk = run.model.cached_trunk, None
    if cached is not None and cached.hits + cached.misses:
        note_trunk(run, forwards_from_cache=cached.hits, forwards_in_full=cached.misses)


def remove_frozen_trunk(run: Run) -> None:
    """Remove the cache of a run that has nothing more to do."""
    if run.processes.first:
        shutil.rmtree(trunk_folder(run), ignore_errors=True)


def _plan(run: Run, recorded: Mapping[str, Any] | None) -> TrunkPlan:
    """Return what will be cached.

    Args:
        run: the run.
        recorded: what the run decided when it began, or None.

    Raises:
        _NoCache: nothing will.
    """
    if recorded and recorded["value"] == "off":
        raise _NoCache(recorded["reason"])
    _check_run(run.config, run.model, run.processes.count)
    strategy = str(run.choices["evaluation_strategy"].value)
    splits = recorded["splits"] if recorded else _splits_passed_again(run.config, run.data, strategy)
    trunk = _cut(run.model)
    planner = run.planner.with_budget(int(recorded["token_budget"])) if recorded else run.planner
    kind = examine_trunk(run.model, trunk, planner)
    if isinstance(kind, str):
        raise _NoCache(kind)
    reason = recorded["reason"] if recorded else _check_size(run, trunk, kind, splits)
    full_at = recorded.get("full_at") if recorded else None
    return TrunkPlan(trunk, kind.width, kind.dtype, tuple(splits), planner.token_budget, full_at, reason)


def expected_bytes(config: Config, data: PreparedData, model: SupervisedPeftModel, strategy: str) -> int | None:
    """Return what the cache would take on disk at most, or None where a run would have none.

    Args:
        config: the configuration.
        data: its data.
        model: base with adapter; without numbers will do.
        strategy: when validation is measured, resolved.
    """
    try:
        _check_run(config, model, 1)
        _cut(model)
        size = _size(data, _splits_passed_again(config, data, strategy), model)
    except _NoCache:
        return None
    return size if size <= _MOST_BYTES else None


def _size(data: PreparedData, splits: Sequence[str], model: SupervisedPeftModel) -> int:
    width = int(model.language_model.config.get_text_config().hidden_size)
    return (
        sum(int(data.splits[name].lengths().sum()) for name in splits) * width * model.embedding.weight.dtype.itemsize
    )


def _check_run(config: Config, model: SupervisedPeftModel, processes: int) -> None:
    base = model.language_model.config
    positions, obstacle = find_positions(base), find_tree_obstacle(base)
    if config.training.cache_frozen_trunk == "off":
        raise _NoCache("set in training.cache_frozen_trunk")
    if vision_family(base) is not None:
        raise _NoCache("a model that reads pictures keeps the features of these instead (data.image.cache_features)")
    if processes > 1:
        raise _NoCache(f"{processes} processes share the run, and each would need all of it")
    if is_spread(model):
        raise _NoCache("model.device_map spreads the layers over several GPUs")
    if config.model.base_dropout == "as_configured":
        raise _NoCache("model.base_dropout is as_configured: the frozen layers may give something else each time")
    if positions.kind != "static" and config.data.max_length > (positions.threshold or 0):
        raise _NoCache(f"positions depend on the longest row of a batch ({positions.kind} rope)")
    if obstacle is not None:
        raise _NoCache(obstacle)


def _cut(model: SupervisedPeftModel) -> FrozenTrunk:
    try:
        trunk = find_trunk(model.body, layers=int(model.language_model.config.get_text_config().num_hidden_layers))
    except UncuttableModel as error:
        raise _NoCache(str(error)) from None
    if trunk.first < max(1.0, _LEAST_SHARE * len(trunk)):
        raise _NoCache(
            f"{trunk.first} of {len(trunk)} layers lie below the adapter; it pays from {_LEAST_SHARE:.0%} of them on"
        )
    return trunk


def _check_size(run: Run, trunk: FrozenTrunk, kind: TrunkStore, splits: Sequence[str]) -> str:
    size = sum(int(run.data.splits[name].lengths().sum()) for name in splits) * kind.width * kind.dtype.itemsize
    bound = _bound(run.folder.path)
    if size > bound:
        raise _NoCache(
            f"it could take {shown_size(size)}, and at most {shown_size(bound)} are used: {shown_size(_MOST_BYTES)} "
            "or half of what is free"
        )
    return (
        f"the lower {trunk.first} of {len(trunk)} layers are frozen: what they give for the rows of "
        f"{', '.join(splits)} is computed once, up to {shown_size(size)} on disk until the run is done; loss and "
        "gradients are the same"
    )


def _splits_passed_again(config: Config, data: PreparedData, strategy: str) -> list[str]:
    """Return the splits whose rows go through the model more than once, training first."""
    splits = data.splits
    rows, training = len(splits["train"]), config.training
    step_rows = training.per_device_train_batch_size * training.gradient_accumulation_steps
    sampler = StepSampler(rows=rows, rows_per_step=step_rows, seed=training.seed, shares=data.shares)
    total = count_steps(training, len(sampler))
    passes: dict[str, float] = dict.fromkeys(("train", "validation", "test"), 0.0)
    passes["train"] = total * sampler.rows_per_epoch / (len(sampler) * rows)
    if "validation" in splits:
        evaluations = {"no": 0, "epoch": -(-total // len(sampler)), "steps": total // config.evaluation.steps}
        passes["validation"] = evaluations[strategy]
    if max(passes.values()) <= 1:
        raise _NoCache("no row goes through the model more than once while it is trained")
    return [name for name, count in passes.items() if count > 1]


def _bound(path: Path) -> int:
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    return min(_MOST_BYTES, int(shutil.disk_usage(there).free * _SHARE_OF_DISK))
