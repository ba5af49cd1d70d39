"""What the record of a run says of memory: predicted before its steps, measured after them.

Owns `memory` in `run.json`.
"""

from collections.abc import Sequence
from typing import Any

import torch

from loralab.config.schema import Config
from loralab.data.dataset import PreparedData
from loralab.data.tokens.store import TokenStore
from loralab.layout.planner import Planner
from loralab.models.blueprint import Blueprint
from loralab.training.arguments import count_steps
from loralab.training.distributed import ALONE, Processes
from loralab.workflows.memory_watch import MemoryWatch
from loralab.workflows.plan_steps import RunSteps, all_steps, evaluation_batch, largest_micro_batches
from loralab.workflows.step_layout import build_sampler
from loralab.workflows.step_memory import StepMeter, predict_memory

# Steps that are looked through for the largest micro-batch; of more, those at the beginning.
_MOST_STEPS = 10_000


def predict_run_memory(
    config: Config,
    data: PreparedData,
    planner: Planner,
    blueprint: Blueprint | str,
    *,
    data_bytes: int,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Return what a run will take, as `predict_memory` has it.

    Args:
        config: the configuration.
        data: its data.
        planner: how steps are laid out.
        blueprint: the model without numbers, or why there is none.
        data_bytes: what tokenizer and rows take of the device's memory, measured.
        processes: those that share each step.
    """
    if isinstance(blueprint, str):
        return {"predicted_bytes": None, "why": blueprint, "parts": {}}
    train = data.splits["train"]
    sampler, _ = build_sampler(config, train, shares=data.shares, processes=processes)
    total = count_steps(config.training, len(sampler))
    steps = all_steps(sampler, min(total, max(len(sampler), _MOST_STEPS)))
    size = processes.count
    own = (
        RunSteps([_own(step, processes.rank, size) for step in steps.steps], steps.per_epoch, steps.total)
        if size > 1
        else steps
    )
    largest, typical = largest_micro_batches(own, train, planner)
    meter = StepMeter(blueprint, planner.layout)
    evaluated = find_evaluated(config, data.splits)
    batch = evaluation_batch(evaluated, planner, config.evaluation.batch_size) if evaluated is not None else None
    return predict_memory(
        config, meter, batch=largest, typical=typical, evaluated=batch, data_bytes=data_bytes, processes=processes
    )


def _own(step: Sequence[int], rank: int, size: int) -> Sequence[int]:
    return step[len(step) * rank // size : len(step) * (rank + 1) // size] or step[:1]


def find_evaluated(config: Config, splits: dict[str, TokenStore]) -> TokenStore | None:
    """Return the split of the final evaluation, or None."""
    if config.evaluation.split != "auto":
        return splits.get(config.evaluation.split)
    return splits.get("test") or splits.get("validation")


def measured_memory(predicted: dict[str, Any], watch: MemoryWatch, device: torch.device) -> dict[str, Any]:
    """Return the entry of a finished run.

    Args:
        predicted: of `predict_run_memory`.
        watch: has measured the run.
        device: where it computed.
    """
    return {
        **predicted,
        "measured_bytes": watch.peak_bytes(device),
        "measured_by": watch.source(device),
        "level_bytes": watch.level_bytes,
    }
