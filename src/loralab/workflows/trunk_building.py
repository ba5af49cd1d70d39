"""Filling the cache of what the frozen layers give.

Owns the order. The cache is filled before the first step, in an order and layout that the rows alone decide: so
what a path gives never depends on which step met it first, and a run that was killed and resumed, with the cache
or with a new one, sees the same numbers to the last bit.
"""

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loralab.data.example import TokenizedExample
from loralab.data.tokens.store import TokenStore
from loralab.layout.collate import MicroBatch
from loralab.models.precision import Resolved
from loralab.models.trunk import CachedTrunk, FrozenTrunk
from loralab.models.trunk_store import PathCollision, TrunkStore
from loralab.training.callbacks import StopRequest
from loralab.workflows.record import describe_choices, versions
from loralab.workflows.steps import Run
from loralab.workflows.trunk_check import keep_states, paths_of, trunk_states

RECORD = "frozen_trunk"
# Beside the checkpoints: what a resume goes on with, and nothing that outlives the run.
_FOLDER = "frozen-trunk"
# Rows are laid out in portions of so many token budgets; a stop waits for the end of one.
_PORTION = 8
# What checkpoints and adapter may still need.
_RESERVED_BYTES = 256 * 10**6
_COMMIT_SECONDS = 10.0
# All choices that the last bit of a number may depend on.
_CHOICES = (
    *("precision", "quantization", "layout", "attention", "attn_implementation"),
    *("activation", "normalization", "lora_forward"),
)


@dataclass(frozen=True, slots=True)
class TrunkPlan:
    """What a run caches.

    Attributes:
        trunk: the model's layers.
        width: numbers that a token has behind the frozen layers (D).
        dtype: their type.
        splits: whose rows, training first.
        token_budget: most tokens of a micro-batch in which they are computed; it never changes in a run.
        full_at: portion at which the disk was full before, or None.
        reason: why the run caches.
    """

    trunk: FrozenTrunk
    width: int
    dtype: torch.dtype
    splits: tuple[str, ...]
    token_budget: int
    full_at: int | None
    reason: str

    def facts(self) -> dict[str, Any]:
        """Return what the record of the run holds."""
        full = {} if self.full_at is None else {"full_at": self.full_at}
        return {
            "frozen_layers": self.trunk.first,
            "layers": len(self.trunk),
            "splits": list(self.splits),
            "token_budget": self.token_budget,
            **full,
        }


def trunk_folder(run: Run) -> Path:
    """Return where the cache lies while the run is under way."""
    return run.folder.checkpoints / _FOLDER


def note_trunk(run: Run, **facts: Any) -> None:
    """Add facts to what the record says of the cache."""
    run.record.update(**{RECORD: run.record.content[RECORD] | facts})


def shown_size(size: int) -> str:
    """Return bytes in words."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def build_trunk_cache(run: Run, plan: TrunkPlan, request: StopRequest) -> None:
    """Compute what is not stored yet, and let the model start behind the frozen layers.

    Args:
        run: the run.
        plan: what is cached.
        request: asks the run to stop.
    """
    started, was_training = time.perf_counter(), run.model.training
    store = TrunkStore(width=plan.width, dtype=plan.dtype, folder=trunk_folder(run), key=_key(run, plan))
    cached = CachedTrunk(plan.trunk, store)
    run.model.eval()
    try:
        if not _compute(run, plan, cached, request, start=_resumed_at(run, plan, cached)):
            store.clear()
            _turn_off(run, "the disk was full before all training rows were stored")
            return
        run.model.cached_trunk = cached
    except PathCollision:
        store.clear()
        _say_event(run, "two different token sequences have one hash: the frozen layers run in every step")
    finally:
        run.model.train(was_training)
    note_trunk(run, tokens=len(store), bytes=store.bytes, build_seconds=round(time.perf_counter() - started, 3))


def _key(run: Run, plan: TrunkPlan) -> dict[str, Any]:
    named = not run.base_facts["sha256"]  # a folder may be moved; its hash stays
    return {
        "model": {name: value for name, value in run.base_facts.items() if name != "name" or named},
        "choices": {name: str(run.choices[name].value) for name in _CHOICES if name in run.choices},
        "frozen_layers": plan.trunk.first,
        "width": plan.width,
        "dtype": str(plan.dtype),
        "token_budget": plan.token_budget,
        "rows": run.data.fingerprint,
        "splits": list(plan.splits),
        "device": str(run.device),
        "versions": versions(),
    }


def _resumed_at(run: Run, plan: TrunkPlan, cached: CachedTrunk) -> int:
    """Take up an earlier process's rows, if this one computes the same; return how many portions it did."""
    progress = cached.store.resume()
    if not progress or not len(cached.store):
        return 0
    batch = next(batch for _, portion in _portions(run, plan) for batch in portion)
    hashes, _ = paths_of(batch)
    rows = cached.store.find(hashes)
    if rows is not None:
        _, first = np.unique(hashes, return_index=True)
        own = trunk_states(run.model, plan.trunk, batch)[batch.attention_mask.bool().to(run.device)].cpu()
        if torch.equal(cached.store.read(rows[first]), own[first]):
            run.reporter.say(f"frozen layers: {shown_size(cached.store.bytes)} of an earlier process are used")
            return int(progress["portions"])
    cached.store.clear()
    _say_event(run, "what an earlier process kept of the frozen layers is not what this one computes: computed anew")
    return 0


def _turn_off(run: Run, reason: str) -> None:
    """Note that nothing is cached after all; a resume keeps to it."""
    run.choices["cache_frozen_trunk"] = Resolved("off", reason)
    run.record.update(
        resolved=describe_choices(run.choices),
        **{RECORD: run.record.content[RECORD] | {"value": "off", "reason": reason}},
    )


def _compute(run: Run, plan: TrunkPlan, cached: CachedTrunk, request: StopRequest, *, start: int) -> bool:
    """Store what the frozen layers give; return False where the disk is full before all training rows are in."""
    store, total = cached.store, sum(len(run.data.splits[name]) for name in plan.splits)
    done, finished, committed = 0, 0, time.perf_counter()
    for number, (rows, portion) in enumerate(_portions(run, plan)):
        if number >= start:
            if number == plan.full_at or request.agree(run.processes):
                break
            if not _add_portion(run, plan, cached, portion):
                note_trunk(run, full_at=number)
                if done < _training_rows(run, plan):
                    return False  # a step with one row that is not stored runs all layers for all of its rows
                break
            run.reporter.progress("frozen layers", done + rows, total)
        done, finished = done + rows, number + 1
        if time.perf_counter() - committed > _COMMIT_SECONDS:
            _commit(run, store, finished)
            committed = time.perf_counter()
    _commit(run, store, finished)
    run.reporter.finish("frozen layers")
    return True


def _training_rows(run: Run, plan: TrunkPlan) -> int:
    return len(run.data.splits["train"]) if "train" in plan.splits else 0


def _commit(run: Run, store: TrunkStore, portions: int) -> None:
    try:
        store.commit(portions=portions)
    except OSError as error:  # what is stored serves this process; a resume computes it anew
        _say_event(run, f"what is kept of the frozen layers could not be sealed ({error})")


def _add_portion(run: Run, plan: TrunkPlan, cached: CachedTrunk, portion: list[MicroBatch]) -> bool:
    """Store what the frozen layers give for some rows; return False, and store nothing, where the disk is full."""
    store, before = cached.store, len(cached.store)
    try:
        if shutil.disk_usage(run.folder.path).free < _RESERVED_BYTES:
            raise OSError(f"less than {shown_size(_RESERVED_BYTES)} free")
        for batch in portion:
            if len(store.missing(*paths_of(batch))):
                keep_states(store, batch, trunk_states(run.model, plan.trunk, batch))
    except OSError as error:
        with contextlib.suppress(OSError):
            store.keep(before)
        what = f"no more is kept of the frozen layers ({error}): they run for rows that are not stored"
        _say_event(run, what)
        return False
    return True


def _portions(run: Run, plan: TrunkPlan) -> Iterator[tuple[int, list[MicroBatch]]]:
    """Yield numbers of rows with their micro-batches.

    Training rows come first, so that what they give does not depend on what is evaluated.
    """
    planner = run.planner.with_budget(plan.token_budget)
    for name in plan.splits:
        for examples in _in_order(run.data.splits[name], tokens=_PORTION * plan.token_budget):
            yield len(examples), list(planner(examples).micro_batches)


def _in_order(split: TokenStore, *, tokens: int) -> Iterator[list[TokenizedExample]]:
    """Yield portions of a split, rows that begin alike together."""
    lengths = split.lengths()

    def beginning(place: int) -> bytes:
        branch = split[place].branches[0]
        return np.concatenate([branch.prompt_ids, branch.answer_ids]).astype(">u4").tobytes()

    portion: list[TokenizedExample] = []
    size = 0
    for place in sorted(range(len(split)), key=beginning):
        portion.append(split[place])
        size += int(lengths[place])
        if size >= tokens:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _say_event(run: Run, what: str) -> None:
    run.reporter.say(f"warning: {what}")
    run.record.add_event(what)
