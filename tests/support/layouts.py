"""Comparing layouts: rows that share prefixes, and the loss with every adapter gradient under a planner."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from loralab.data.example import Branch, TokenizedExample
from loralab.layout.collate import StepBatch
from loralab.layout.planner import Planner, SharingCost
from loralab.models.supervised import SupervisedPeftModel
from loralab.training.loss import run_micro_batches
from support.families import SPREAD

CPU = torch.device("cpu")
# Shares whatever can be shared: the real costs share no prefix below 16 tokens.
ALWAYS_SHARE = SharingCost(tokens_per_pair=0.0, min_tokens=1)
Gradients = dict[str, Tensor]


def draw_adapter(model: SupervisedPeftModel, *, seed: int) -> None:
    """Give every adapter weight a random value: with B at zero, half of all gradients are zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * SPREAD


def sharing_rows(seed: int, *, vocabulary: int, prefix: int = 40, count: int = 6) -> list[TokenizedExample]:
    """Return rows that begin alike at several depths; one stands there twice, one begins another, one is alone.

    Args:
        seed: of the tokens.
        vocabulary: token ids are below it.
        prefix: most tokens that rows have in common.
        count: rows before those.
    """
    draw = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return draw.integers(3, vocabulary, draw.integers(low, high)).astype(np.int32)

    document = draw.integers(3, vocabulary, prefix).astype(np.int32)
    rows: list[tuple[Branch, ...]] = []
    for _ in range(count):
        start = document[: draw.integers(prefix // 2, prefix)]
        rows.append(tuple(Branch(np.concatenate([start, ids(1, 6)]), ids(1, 6)) for _ in range(draw.integers(1, 3))))
    first = rows[0][0]
    rows.append(rows[0])
    rows.append((Branch(np.concatenate([first.prompt_ids, first.answer_ids]), ids(1, 2)),))  # one token to predict
    rows.append((Branch(ids(4, 8), ids(3, 6)),))
    order = draw.permutation(len(rows))
    return [TokenizedExample(place + 1, 0, rows[place]) for place in order]


def loss_and_gradients(
    model: SupervisedPeftModel,
    planner: Planner,
    examples: Sequence[TokenizedExample],
    *,
    dropout_key: tuple[int, int] | None = None,
) -> tuple[float, Gradients, StepBatch]:
    """Return loss per supervised token and its gradient by name, of a step in training mode."""
    model.zero_grad()
    model.train()
    step = planner(examples)
    result = run_micro_batches(
        model,
        step.micro_batches,
        device=CPU,
        backward=lambda loss: (loss / step.supervised_tokens).backward(),
        dropout_key=dropout_key,
    )
    assert result.count == step.supervised_tokens
    return float(result.total) / result.count, _gradients(model), step


def transformers_loss_and_gradients(
    model: SupervisedPeftModel, examples: Sequence[TokenizedExample]
) -> tuple[float, Gradients]:
    """Return the same of transformers' own loss: the padded batch, `labels` with -100, eager attention."""
    branches = [branch for example in examples for branch in example.branches]
    length = max(len(branch.prompt_ids) + len(branch.answer_ids) for branch in branches)
    ids = torch.zeros((len(branches), length), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, branch in enumerate(branches):
        prompt, end = len(branch.prompt_ids), len(branch.prompt_ids) + len(branch.answer_ids)
        ids[row, :end] = torch.from_numpy(np.concatenate([branch.prompt_ids, branch.answer_ids]))
        mask[row, :end] = 1
        labels[row, prompt:end] = ids[row, prompt:end]
    model.zero_grad()
    model.train()
    if model.stock_attention != "eager":
        model.language_model.set_attn_implementation("eager")
    loss = model.language_model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), _gradients(model)


def _gradients(model: SupervisedPeftModel) -> Gradients:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    assert found
    assert found.keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all(bool(gradient.any()) for gradient in found.values())
    return found


def largest_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest ||g - g'|| / ||g|| of all tensors."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - g).norm() / g.norm()) for name, g in expected.items())
