"""Answers read off a forward over the references: the most likely token behind each of their tokens.

Owns what older scripts report as accuracy while training (argmax over shifted logits, decoded), and why
it is no answer. Kept so that their figures can be compared; `generate.py` gives what a user would see.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from loralab.data.prompts.prompter import Prompter
from loralab.evaluation.answers import Answered, Question
from loralab.evaluation.forwards import observe_batches
from loralab.evaluation.questions import as_example
from loralab.layout.collate import MicroBatch
from loralab.layout.planner import Planner
from loralab.models.token_loss import TokenLosses
from loralab.progress import Reporter
from loralab.training.distributed import ALONE, Processes

WHY_IT_FLATTERS = (
    "Each token is predicted behind the reference's own tokens, so the model is told how the answer begins and how "
    "long it is, and a mistake never leads to the next one. Figures are therefore better than those of answers that "
    "the model writes by itself."
)


def force_answers(
    model: nn.Module,
    questions: Sequence[Question],
    *,
    prompter: Prompter,
    planner: Planner,
    batch_size: int,
    device: torch.device,
    reporter: Reporter,
    label: str = "teacher-forced answers",
    should_stop: Callable[[], bool] = lambda: False,
    processes: Processes = ALONE,
) -> list[Answered]:
    """Return the most likely token at each position of every reference, as text up to the first stop token.

    Args:
        model: a `SupervisedPeftModel`; put into evaluation mode meanwhile.
        questions: what is asked.
        prompter: knows stop tokens and decoding.
        planner: lays out each batch; the answers are the same however it does.
        batch_size: questions per batch.
        device: where the model is.
        reporter: told of progress under `label`.
        label: name of the stage.
        should_stop: asked before every batch, in every process; they must agree.
        processes: those that share the work; all of them know all answers in the end.

    Returns:
        One answer per question, in order.

    Raises:
        Interrupted: `should_stop` answered yes.
    """
    batches = [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]
    predicted: dict[int, list[int]] = {}

    def observe(number: int, batch: MicroBatch, result: TokenLosses) -> None:
        if result.predicted is None:
            raise ValueError("a forward with statistics names the most likely tokens")
        # One branch per example, whose labels come in its order.
        for owner, token in zip(batch.label_examples.tolist(), result.predicted.tolist(), strict=True):
            predicted.setdefault(number * batch_size + owner, []).append(token)

    observe_batches(
        model,
        [len(batch) for batch in batches],
        lambda number: [as_example(question, [question.reference_ids]) for question in batches[number]],
        observe,
        planner=planner,
        device=device,
        reporter=reporter,
        label=label,
        should_stop=should_stop,
        processes=processes,
    )
    found = {index: ids for share in processes.gather(predicted) for index, ids in share.items()}
    return [Answered(question, _text(found[index], prompter)) for index, question in enumerate(questions)]


def _text(ids: Sequence[int], prompter: Prompter) -> str:
    end = next((place for place, token in enumerate(ids) if token in prompter.stop.ids), len(ids))
    return prompter.decode(ids[:end])
