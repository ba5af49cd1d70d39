"""Layouts and kernels on an accelerator: the same equalities as on a CPU, where the kernels differ.

Skipped where there is none. In bfloat16 the bar is a share of what a deliberately wrong layout does.
"""

import numpy as np
import pytest
import torch

from loralab.config.schema import LoraConfig
from loralab.data.example import Branch, TokenizedExample
from loralab.layout.planner import Layout, Planner
from loralab.models.adapters import build_adapter
from loralab.models.dropout import DropoutKeys, KeyedDropout, token_keys
from loralab.models.self_check import find_tree_failure, resolve_tree_kernel
from loralab.models.supervised import SupervisedPeftModel
from loralab.training.loss import run_micro_batches
from support.tiny import Family, build_model

VOCABULARY = 128
CUDA = torch.device("cuda")
FAMILIES: list[Family] = ["gpt2", "llama", "qwen2"]


def _model(family: Family, dtype: torch.dtype) -> SupervisedPeftModel:
    base = build_model(family, vocabulary=VOCABULARY).to(device=CUDA, dtype=dtype).requires_grad_(False)
    model, _ = build_adapter(base, LoraConfig(r=4), seed=0)
    model.to(CUDA)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = (torch.randn(weight.shape, generator=generator) * 0.1).to(weight)
    return model.eval()  # without the base's dropout


def _examples(count: int, *, length: int) -> list[TokenizedExample]:
    draw = np.random.default_rng(0)
    document = draw.integers(1, VOCABULARY, length)
    found = []
    for index in range(count):
        prompt = np.concatenate([document[: length - index % 3], draw.integers(1, VOCABULARY, 6)]).astype(np.int32)
        answer = draw.integers(1, VOCABULARY, 4).astype(np.int32)
        found.append(TokenizedExample(index + 1, 0, (Branch(prompt, answer),)))
    return found


def _loss_and_gradient(model: SupervisedPeftModel, planner: Planner) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    step = planner(_examples(6, length=100))
    result = run_micro_batches(model, step.micro_batches, device=CUDA, backward=torch.Tensor.backward)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return float(result.total) / result.count, gradient


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernel", ["dense", "per_tree", "flex"])
def test_every_kernel_gives_the_padded_loss_and_gradient_in_float32(family: Family, kernel: str) -> None:
    model = _model(family, torch.float32)
    layouts: list[Layout] = ["packed", "shared"]
    expected, gradient = _loss_and_gradient(model, Planner(4096, layout="padded"))
    assert find_tree_failure(model, kernel) is None
    model.tree_kernel = kernel
    for layout in layouts:
        loss, found = _loss_and_gradient(model, Planner(4096, layout=layout))
        assert loss == pytest.approx(expected, rel=1e-4)
        assert float((found - gradient).norm() / gradient.norm()) < 1e-3  # TF32 and kernels of another order of sums


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_takes_a_kernel_made_for_the_accelerator(family: Family) -> None:
    model = _model(family, torch.bfloat16)
    chosen = resolve_tree_kernel(model)
    assert chosen.value in {"varlen", "flex"}, chosen.reason
    model.tree_kernel = chosen.value
    expected, gradient = _loss_and_gradient(model, Planner(4096, layout="padded"))
    loss, found = _loss_and_gradient(model, Planner(4096))
    assert loss == pytest.approx(expected, rel=1e-2)
    assert float((found - gradient).norm() / gradient.norm()) < 0.05


def test_dropout_masks_are_those_of_the_cpu() -> None:
    masks = []
    for device in (torch.device("cpu"), CUDA):
        layer = KeyedDropout(0.3, layer=2, keys=DropoutKeys())
        layer.keys.tokens = token_keys(7, 3, torch.arange(40, device=device))
        masks.append(layer(torch.ones(40, 33, device=device)).cpu())
    assert torch.equal(*masks)
