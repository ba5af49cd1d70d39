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
            if number < len(sizes) or processes.lockstep:
                _run(
                    model,
                    examples_of,
                    number,
                    observe,
                    last=len(sizes) - 1,
                    planner=planner,
                    device=device,
                    processes=processes,
                )
            done += sum(sizes[first : first + processes.count])
            reporter.progress(label, done, total)
    finally:
        model.train(was_training)
    reporter.finish(label)


def _run(
    model: nn.Module,
    examples_of: Callable[[int], Sequence[TokenizedExample]],
    number: int,
    observe: Observe,
    *,
    last: int,
    planner: Planner,
    device: torch.device,
    processes: Processes,
) -> None:
    """Run a batch; in lockstep, go on with rows that nobody looks at until every process is done with its own."""
    batches = planner(examples_of(min(number, last))).micro_batches
    own = batches if number <= last else batches[:0]
    more = processes.largest(len(own)) - len(own) if processes.lockstep else 0
    with torch.no_grad():
        run_micro_batches(model, own, device=device, observe=lambda batch, result: observe(number, batch, result))
        run_micro_batches(model, list(batches[:1]) * more, device=device, observe=lambda *_: None)
