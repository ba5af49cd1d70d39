"""What the steps of a run hold: how many, of which rows, how many tokens, and the largest micro-batch.

Owns counting, with the run's own sampler and planner on the run's own rows. Where there are very many
rows, a sample is laid out and the rest counted by its share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from loralab.config.schema import Config
from loralab.data.dataset import PreparedData
from loralab.data.tokens.store import TokenStore
from loralab.layout.collate import MicroBatch
from loralab.layout.planner import Layout, Planner
from loralab.progress import Reporter
from loralab.training.arguments import count_steps
from loralab.training.sampler import StepSampler

# Rows that are laid out in full; of more, a sample of steps.
_LAID_OUT_ROWS = 20_000
_SAMPLED_STEPS = 256
# Steps that are listed one by one; every epoch has the same rows in another order.
_LISTED_STEPS = 100_000
# Candidates for the largest micro-batch: the steps with most tokens, and some of the others.
_LONGEST_STEPS, _OTHER_STEPS = 8, 8


@dataclass(frozen=True, slots=True)
class RunSteps:
    """The rows of every step of a run, in order.

    Attributes:
        steps: positions in the training split; of a very long run, those of its first epochs.
        per_epoch: steps of an epoch.
        total: steps of the run.
    """

    steps: Sequence[Sequence[int]]
    per_epoch: int
    total: int


def all_steps(sampler: StepSampler, total: int) -> RunSteps:
    """Return the rows of the first `total` steps, epoch by epoch.

    Args:
        sampler: of the run; it is left at its first epoch.
        total: optimizer steps of the run.
    """
    steps: list[list[int]] = []
    epoch = 0
    while len(steps) < min(total, max(_LISTED_STEPS, len(sampler))):
        sampler.set_epoch(epoch)
        steps += sampler.steps()
        epoch += 1
    sampler.set_epoch(0)
    return RunSteps(steps[:total], len(sampler), total)


def tokens_alone(run: RunSteps, store: TokenStore) -> float:
    """Return the tokens of all steps, each branch by itself.

    Args:
        run: rows of the steps; where not all are listed, the others are taken to be like them.
        store: the training split.
    """
    alone = store.tokens_alone()
    listed = sum(int(alone[np.asarray(step)].sum()) for step in run.steps)
    return listed * run.total / max(len(run.steps), 1)


def fullest_step(run: RunSteps, store: TokenStore) -> Sequence[int]:
    """Return the rows of the step with most tokens.

    Args:
        run: rows of the steps.
        store: the training split.
    """
    alone = store.tokens_alone()
    return max(run.steps, key=lambda step: int(alone[np.asarray(step)].sum()))


def largest_micro_batches(run: RunSteps, store: TokenStore, planner: Planner) -> tuple[MicroBatch, MicroBatch]:
    """Return the largest micro-batch of the steps that are likely to hold it, and one of the middle.

    The steps with most tokens are laid out, and some of the others.

    Args:
        run: rows of the steps.
        store: the training split.
        planner: how they are laid out.
    """
    alone = store.tokens_alone()
    totals = np.array([int(alone[np.asarray(step)].sum()) for step in run.steps])
    longest = np.argsort(-totals, kind="stable")[:_LONGEST_STEPS]
    others = np.linspace(0, len(totals) - 1, min(_OTHER_STEPS, len(totals))).astype(np.int64)
    found = [
        batch
        for place in dict.fromkeys([*longest.tolist(), *others.tolist()])
        for batch in planner([store[row] for row in run.steps[place]]).micro_batches
    ]
    ordered = sorted(found, key=lambda batch: batch.input_ids.numel())
    return ordered[-1], ordered[len(ordered) // 2]


def evaluation_batch(store: TokenStore, planner: Planner, batch_size: int) -> MicroBatch:
    """Return the largest micro-batch of an evaluation.

    Args:
        store: the split.
        planner: how rows are laid out.
        batch_size: `evaluation.batch_size`.
    """
    lengths = store.lengths()
    starts = range(0, len(store), batch_size)
    place = max(starts, key=lambda start: int(lengths[start : start + batch_size].sum()))
    batches = planner(store[place : place + batch_size]).micro_batches
    return max(batches, key=lambda batch: batch.input_ids.numel())  # every stored row has a label


def count_layouts(
    run: RunSteps, store: TokenStore, planner: Planner, *, possible: Sequence[Layout], reporter: Reporter
) -> dict[str, Any]:
    """Return the tokens of the run, and of an epoch under every layout that is possible.

    Args:
        run: rows of the steps.
        store: the training split.
        planner: as the run lays out.
        possible: layouts that the model can take.
        reporter: told of progress.

    Returns:
        `rows` (tokens of the rows, each branch on its own), `laid_out`, `supervised`, `micro_batches` of the whole
        run, `epoch` (laid-out tokens by layout, padding included), `largest_step_tokens`, and `laid_out_steps`,
        how many of `steps` were laid out: the rest is counted by their share.
    """
    places = _sampled(run, store)
    share = dict.fromkeys(possible, 0)
    alone = store.tokens_alone()
    supervised = store.supervised()
    taken = own = batches = largest = 0
    for done, place in enumerate(places, 1):
        rows = [store[row] for row in run.steps[place]]
        first_epoch = place < run.per_epoch
        for layout in possible:
            if layout != planner.layout and not first_epoch:
                continue
            step = replace(planner, layout=layout)(rows)
            padded = sum(batch.input_ids.numel() for batch in step.micro_batches)
            if first_epoch:
                share[layout] += padded
            if layout == planner.layout:
                taken, own = taken + step.tokens, own + step.example_tokens
                batches += len(step.micro_batches)
                largest = max(largest, step.tokens)
        reporter.progress("lay out", done, len(places))
    reporter.finish("lay out")
    order = np.fromiter((row for step in run.steps for row in step), dtype=np.int64)
    rows_tokens = int(alone[order].sum())
    scale = rows_tokens / max(own, 1)  # exactly 1 where all steps were laid out
    repeated = run.total / len(run.steps)  # exactly 1 where all steps are listed
    first = [place for place in places if place < run.per_epoch]
    epoch_scale = min(run.per_epoch, len(run.steps)) / max(len(first), 1)
    return {
        "rows": round(rows_tokens * repeated),
        "laid_out": round(taken * scale * repeated),
        "supervised": round(int(supervised[order].sum()) * repeated),
        "micro_batches": round(batches * scale * repeated),
        "epoch": {layout: round(tokens * epoch_scale) for layout, tokens in share.items()},
        "largest_step_tokens": largest,
        "laid_out_steps": len(places),
        "steps": run.total,
    }


def _sampled(run: RunSteps, store: TokenStore) -> list[int]:
    rows = sum(map(len, run.steps))
    if rows <= _LAID_OUT_ROWS:
        return list(range(len(run.steps)))
    return sorted(set(np.linspace(0, len(run.steps) - 1, _SAMPLED_STEPS).astype(np.int64).tolist()))


def possible_layouts(chosen: Layout, takes_trees: bool) -> list[Layout]:
    """Return the layouts to count tokens for."""
    return [layout for layout in get_args(Layout) if layout in (chosen, "padded") or takes_trees]


def describe_schedule(config: Config, data: PreparedData, sampler: StepSampler) -> dict[str, Any]:
    """Return steps, rows, warm-up and evaluations, as the run will have them.

    Args:
        config: the configuration.
        data: its data.
        sampler: of the run.
    """
    training, per_epoch = config.training, len(sampler)
    total = count_steps(training, per_epoch)
    warmup = training.warmup_steps or int(np.ceil(training.warmup_ratio * total))
    return {
        "rows_per_step": sampler.rows_per_step,
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "processes": sampler.world_size,
        "rows_per_epoch": sampler.rows_per_epoch,
        "steps_per_epoch": per_epoch,
        "total_steps": total,
        "epochs": round(total / per_epoch, 4),
        "warmup_steps": warmup,
        "evaluations": _evaluations(config, data, per_epoch, total),
        "checkpoints": _marks(_interval(training.save_strategy, training.save_steps, per_epoch), total),
    }


def _interval(strategy: str, steps: int, per_epoch: int) -> int | None:
    return {"epoch": per_epoch, "steps": steps}.get(strategy)


def _evaluations(config: Config, data: PreparedData, per_epoch: int, total: int) -> int:
    if "validation" not in data.splits:
        return 0
    interval = _interval(config.evaluation.strategy, config.evaluation.steps, per_epoch)
    return _marks(interval, total) if interval is not None else 0


def _marks(interval: int | None, total: int) -> int:
    """Return how often an interval ends within the steps; the last step counts where it is no multiple."""
    if interval is None:
        return 1  # at the last step
    return total // interval + (1 if total % interval else 0)
