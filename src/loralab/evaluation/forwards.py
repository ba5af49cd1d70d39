"""Forwards over examples without gradients, their batches shared among processes.

Owns the loop: whose turn it is, stopping, and what is told of progress. What is made of the labels
is the caller's.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from loralab.data.example import TokenizedExample
from loralab.layout.collate import MicroBatch
from loralab.layout.planner import Planner
from loralab.models.token_loss import TokenLosses
from loralab.progress import Reporter
from loralab.training.distributed import ALONE, Processes
from loralab.training.loss import run_micro_batches


class Interrupted(Exception):
    """A measurement was asked to stop."""


# Given the number of the batch, a micro-batch and what is known of its labels.
Observe = Callable[[int, MicroBatch, TokenLosses], None]


def observe_batches(
    model: nn.Module,
    sizes: Sequence[int],
    examples_of: Callable[[int], Sequence[TokenizedExample]],
    observe: Observe,
    *,
    planner: Planner,
    device: torch.device,
    reporter: Reporter,
    label: str,
    should_stop: Callable[[], bool] = lambda: False,
    processes: Processes = ALONE,
) -> None:
    """Run the model over batches; each process takes its share of them.

    Args:
        model: a `SupervisedPeftModel`; put into evaluation mode meanwhile.
        sizes: examples of each batch.
        examples_of: gives a batch's examples by its number, when they are needed.
        observe: called for every micro-batch of this process's batches.
        planner: lays out each batch.
        device: where the model is.
        reporter: told of progress under `label`.
        label: name of the stage.
        should_stop: asked before every batch, in every process; they must agree.
        processes: those that share the work.

    Raises:
        Interrupted: `should_stop` answered yes.
    """
    total, done = sum(sizes), 0
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(sizes), processes.count):
            if should_stop():
                raise Interrupted
            number = first + processes.rank
            if number < len(sizes):
                _run(model, examples_of(number), number, observe, planner=planner, device=device)
            done += sum(sizes[first : first + processes.count])
            reporter.progress(label, done, total)
    finally:
        model.train(was_training)
    reporter.finish(label)


def _run(
    model: nn.Module,
    examples: Sequence[TokenizedExample],
    number: int,
    observe: Observe,
    *,
    planner: Planner,
    device: torch.device,
) -> None:
    with torch.no_grad():
        run_micro_batches(
            model,
            planner(examples).micro_batches,
            device=device,
            observe=lambda batch, result: observe(number, batch, result),
        )
