"""The probe of `plan`: the run's own model, and a few of its own steps, measured.

Owns which steps are run and what follows from them for the whole run. Nothing is kept: the model that
was trained for a few steps is thrown away.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer

from loralab.config.load import LoadedConfig
from loralab.layout.collate import MicroBatch
from loralab.layout.planner import Planner
from loralab.models.precision import Resolved
from loralab.progress import Reporter
from loralab.run import RunFolder
from loralab.training.arguments import build_arguments, count_steps
from loralab.training.distributed import ALONE
from loralab.training.loss import run_micro_batches
from loralab.workflows.memory_watch import MemoryWatch
from loralab.workflows.plan_steps import all_steps, largest_micro_batches
from loralab.workflows.step_layout import build_sampler
from loralab.workflows.steps import Run
from loralab.workflows.train import prepare_run

# The largest micro-batch comes first, for the kernels that are built on first use; then both are timed. Memory
# that the C library keeps grows over the first steps.
_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Probe:
    """What was measured.

    Attributes:
        planner: how the run lays out its steps.
        choices: of model and layout, with reasons.
        peak_bytes: most memory above the level after imports.
        source: what it was read from.
        tokens: laid-out tokens of the timed micro-batches.
        seconds: of the timed micro-batches, the optimizer included.
        first_seconds: what the very first one took longer than the same one later.
    """

    planner: Planner
    choices: dict[str, Resolved[Any]]
    peak_bytes: int
    source: str
    tokens: int
    seconds: float
    first_seconds: float

    def memory(self, predicted: Mapping[str, Any]) -> dict[str, Any]:
        """Return a prediction with the measured peak in the place of the counted one."""
        return {
            **predicted,
            "predicted_bytes": self.peak_bytes,
            "counted_bytes": predicted["predicted_bytes"],
            "probe": {"measured_bytes": self.peak_bytes, "measured_by": self.source},
        }

    def time(self, tokens: Mapping[str, Any], schedule: Mapping[str, Any]) -> dict[str, Any]:
        """Return the time of a run.

        Args:
            tokens: of `count_layouts`.
            schedule: of `describe_schedule`.
        """
        rate = self.tokens / max(self.seconds, 1e-9)
        seconds = tokens["laid_out"] / rate + self.first_seconds
        return {
            "seconds": round(seconds, 3),
            "seconds_per_step": round(seconds / max(schedule["total_steps"], 1), 3),
            "laid_out_tokens_per_second": round(rate, 1),
            "probed_tokens": self.tokens,
            "without": "evaluations, checkpoints and loading",
        }


def run_probe(loaded: LoadedConfig, path: Path, *, reporter: Reporter) -> Probe:
    """Load the run's model and run its largest and a typical micro-batch.

    Args:
        loaded: the configuration.
        path: where the run folder would be; nothing is written there.
        reporter: told of progress.

    Raises:
        UserError: what `train` would raise before its first step.
    """
    with MemoryWatch() as watch:
        run = prepare_run(loaded, RunFolder(path), reporter=reporter, processes=ALONE, saved=None)
        train, config = run.data.splits["train"], run.config
        sampler, _ = build_sampler(config, train, shares=run.data.shares)
        steps = all_steps(sampler, count_steps(config.training, len(sampler)))
        largest, typical = largest_micro_batches(steps, train, run.planner)
        optimizer = _build_optimizer(run, path, steps_per_epoch=len(sampler))
        run.model.train()
        first = _step(run, largest, optimizer)
        timed: dict[str, list[float]] = {"typical": [], "largest": []}
        for done in range(_ROUNDS):
            timed["typical"].append(_step(run, typical, optimizer))
            timed["largest"].append(_step(run, largest, optimizer))
            reporter.progress("probe", done + 1, _ROUNDS)
        reporter.finish("probe")
        peak = watch.peak_bytes(run.device)
        return Probe(
            planner=run.planner,
            choices=run.choices,
            peak_bytes=peak,
            source=watch.source(run.device),
            tokens=_ROUNDS * (typical.tokens + largest.tokens),
            seconds=sum(map(sum, timed.values())),
            first_seconds=max(first - min(timed["largest"]), 0.0),
        )


def _build_optimizer(run: Run, path: Path, *, steps_per_epoch: int) -> torch.optim.Optimizer:
    """Return the run's own kind of optimizer with a rate of zero, so that the probe's steps change nothing."""
    arguments = build_arguments(
        run.config.training,
        evaluation=run.config.evaluation.model_copy(update={"strategy": "no"}),
        staging=path / "probe",  # named only: nothing is written
        steps_per_epoch=steps_per_epoch,
        device=run.device,
        further=run.config.advanced.trainer_args,
    )
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    trained = [weight for weight in run.model.parameters() if weight.requires_grad]
    return cast(torch.optim.Optimizer, kind(trained, **{**settings, "lr": 0.0}))


def _step(run: Run, batch: MicroBatch, optimizer: torch.optim.Optimizer) -> float:
    """Run one micro-batch and the optimizer, and return the seconds that took."""
    started = time.perf_counter()
    run_micro_batches(run.model, [batch], device=run.device, backward=torch.Tensor.backward, dropout_key=(0, 0))
    optimizer.step()
    optimizer.zero_grad()
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    return time.perf_counter() - started
