"""Forwards over examples without gradients, their batches shared among processes.

Owns the loop: whose turn it is, stopping, and what is told of progress. What is made of the labels
is the caller's.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from loralab.data.example import TokenizedExample
from loralab.evaluation.perplexity import Interrupted
from loralab.layout.collate import MicroBatch
from loralab.layout.planner import Planner
from loralab.models.token_loss import TokenLosses
from loralab.progress import Reporter
from loralab.training.distributed import ALONE, Processes
from loralab.training.loss import run_micro_batches

# Given the number of the batch, a micro-batch and what is known of its labels.
Observe = Callable[[int, MicroBatch, TokenLosses], None]


def observe_batches(
    model: nn.Module,
    batches: Sequence[Sequence[TokenizedExample]],
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
        batches: examples that are laid out together.
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
    total, done = sum(map(len, batches)), 0
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(batches), processes.count):
            if should_stop():
                raise Interrupted
            number = first + processes.rank
            if number < len(batches):
                _run(model, batches[number], number, observe, planner=planner, device=device)
            done += sum(map(len, batches[first : first + processes.count]))
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
