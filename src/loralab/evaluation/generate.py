"""Answers: batched generation from prompt ids, stopped by the prompt's own stop tokens.

Owns generation settings; the prompts come from the `Prompter` (or from tokenized rows, which
came from it).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from transformers import GenerationConfig

from loralab.config.schema import EvaluationConfig
from loralab.data.prompter import Prompter
from loralab.errors import ModelError
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

    Returns:
        One answer per prompt, in order.

    Raises:
        ModelError: a prompt is longer than the model's positions.
    """
    settings = _fit_positions(model, prompts, settings, reporter)
    was_training = model.training
    model.eval()
    torch.manual_seed(settings.seed)
    answers: list[Answer] = []
    with torch.inference_mode():
        for start in range(0, len(prompts), batch_size):
            answers += _generate_batch(model, prompts[start : start + batch_size], prompter, settings)
            reporter.progress(label, len(answers), len(prompts))
    model.train(was_training)
    reporter.finish(label)
    return answers


def _fit_positions(
    model: SupervisedPeftModel, prompts: Sequence[Sequence[int]], settings: GenerationSettings, reporter: Reporter
) -> GenerationSettings:
    if settings.max_new_tokens is None:
        settings = replace(settings, max_new_tokens=EvaluationConfig().max_new_tokens)
    limit = max_positions(model.language_model.config)
    if limit is None or not prompts:
        return settings
    longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
    room = limit - len(prompts[longest])
    if room < 1:
        raise ModelError(
            f"prompt of {len(prompts[longest])} tokens, but the model has {limit} positions",
            where=f"prompt {longest + 1}",
            fix="shorten it",
        )
    if room >= (settings.max_new_tokens or 0):
        return settings
    reporter.say(f"max_new_tokens {settings.max_new_tokens} -> {room}: the model has {limit} positions")
    return replace(settings, max_new_tokens=room)


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
    sampling = (
        {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0} if settings.temperature > 0 else {}
    )
    config = GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        do_sample=settings.temperature > 0,
        eos_token_id=list(prompter.stop.ids),
        pad_token_id=pad,
        use_cache=True,
        **sampling,
    )
    generate = cast(Callable[..., Tensor], model.generate)
    out = generate(input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config)
    return [_read_answer(row, prompter) for row in out[:, longest:].tolist()]


def _read_answer(ids: list[int], prompter: Prompter) -> Answer:
    end = next((position for position, token in enumerate(ids) if token in prompter.stop.ids), None)
    kept = ids if end is None else ids[:end]
    return Answer(prompter.decode(kept), end is not None, len(kept) + (end is not None))
