"""Answers: batched generation from prompt ids, stopped by the prompt's own stop tokens.

Owns generation settings; the prompts come from the `Prompter` (or from tokenized rows, which
came from it).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from transformers import GenerationConfig

from loralab.config.schema import EvaluationConfig
from loralab.data.prompts.prompter import Prompter
from loralab.errors import DataError, ModelError
from loralab.evaluation.perplexity import Interrupted
from loralab.models.load import max_positions
from loralab.models.supervised import SupervisedPeftModel
from loralab.progress import Reporter


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer.

    Attributes:
        text: without the stop token.
        stopped: whether it ended by a stop token, not by the length limit.
        tokens: number of generated tokens, stop token included.
    """

    text: str
    stopped: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How to generate.

    Attributes:
        max_new_tokens: longest answer, in tokens; None takes the run's own limit.
        temperature: 0 takes the most likely token (greedy).
        top_p: nucleus of the sampled tokens, 0 to 1.
        seed: of sampling.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def generate_answers(
    model: SupervisedPeftModel,
    prompts: Sequence[Sequence[int]],
    *,
    prompter: Prompter,
    settings: GenerationSettings,
    batch_size: int,
    reporter: Reporter,
    label: str = "generate",
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Answer]:
    """Answer prompts.

    Args:
        model: base with adapter (call within `model.disable_adapter()` for the base).
        prompts: prompt token ids, one list per prompt.
        prompter: knows stop tokens and decoding.
        settings: how to generate.
        batch_size: prompts at a time.
        reporter: told of progress.
        label: name of the stage.
        should_stop: asked before every batch.

    Returns:
        One answer per prompt, in order.

    Raises:
        DataError: a prompt has no tokens.
        ModelError: a prompt is longer than the model's positions.
        Interrupted: `should_stop` answered yes.
    """
    rooms = _fit_positions(model, prompts, settings, reporter)
    was_training = model.training
    model.eval()
    torch.manual_seed(settings.seed)
    answers: dict[int, Answer] = {}
    try:
        with torch.inference_mode():
            for room, batch in _batches(rooms, batch_size):
                if should_stop():
                    raise Interrupted
                chosen = replace(settings, max_new_tokens=room)
                made = _generate_batch(model, [prompts[index] for index in batch], prompter, chosen)
                answers |= dict(zip(batch, made, strict=True))
                reporter.progress(label, len(answers), len(prompts))
    finally:
        model.train(was_training)
    reporter.finish(label)
    return [answers[index] for index in range(len(prompts))]


def _fit_positions(
    model: SupervisedPeftModel, prompts: Sequence[Sequence[int]], settings: GenerationSettings, reporter: Reporter
) -> list[int]:
    """Return for each prompt how many tokens its answer may have."""
    wanted = settings.max_new_tokens or EvaluationConfig().max_new_tokens
    rooms = []
    for number, prompt in enumerate(prompts, start=1):
        where = f"prompt {number}"
        room = answer_room(model, prompt, wanted, where=where)
        if room < wanted:
            limit = max_positions(model.language_model.config)
            reporter.say(f"{where}: max_new_tokens {wanted} -> {room}, the model has {limit} positions")
        rooms.append(room)
    return rooms


def answer_room(model: SupervisedPeftModel, prompt: Sequence[int], wanted: int, *, where: str) -> int:
    """Return how many tokens the answer to a prompt may have: `wanted`, or the positions that are left.

    Raises:
        DataError: the prompt has no tokens.
        ModelError: it leaves no position for an answer.
    """
    if not len(prompt):
        raise DataError(
            "empty prompt: the template makes no token of it",
            where=where,
            fix="give it some text, or a system message",
        )
    limit = max_positions(model.language_model.config)
    room = wanted if limit is None else min(wanted, limit - len(prompt))
    if room < 1:
        raise ModelError(
            f"prompt of {len(prompt)} tokens, but the model has {limit} positions", where=where, fix="shorten it"
        )
    return room


def _batches(rooms: Sequence[int], batch_size: int) -> Iterator[tuple[int, list[int]]]:
    """Yield room and prompt numbers of each batch; a prompt with less room never shortens another's answer."""
    for room in sorted(set(rooms), reverse=True):
        members = [index for index, each in enumerate(rooms) if each == room]
        for start in range(0, len(members), batch_size):
            yield room, members[start : start + batch_size]


def _generate_batch(
    model: SupervisedPeftModel, prompts: Sequence[Sequence[int]], prompter: Prompter, settings: GenerationSettings
) -> list[Answer]:
    device = model.embedding.weight.device
    longest = max(len(prompt) for prompt in prompts)
    pad = prompter.stop.ids[0]
    ids = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, prompt in enumerate(prompts):  # padded on the left: generation goes on at the right
        ids[index, longest - len(prompt) :] = torch.as_tensor(list(prompt), dtype=torch.int64)
        mask[index, longest - len(prompt) :] = 1
    generate = cast(Callable[..., Tensor], model.generate)
    config = build_generation_config(settings, prompter)
    out = generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
    return [read_answer(row, prompter) for row in out[:, longest:].tolist()]


def build_generation_config(settings: GenerationSettings, prompter: Prompter) -> GenerationConfig:
    """Return the settings in the form that `generate` takes, with the prompt's own stop tokens."""
    sampling = (
        {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if settings.temperature > 0 else {}
    )
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.temperature > 0,
        eos_token_id=list(prompter.stop.ids),
        pad_token_id=prompter.stop.ids[0],
        use_cache=True,
        **sampling,
    )


def read_answer(ids: Sequence[int], prompter: Prompter) -> Answer:
    """Return the answer that generated ids hold: up to the first stop token."""
    end = next((position for position, token in enumerate(ids) if token in prompter.stop.ids), None)
    kept = ids if end is None else ids[:end]
    return Answer(prompter.decode(kept), end is not None, len(kept) + (end is not None))
