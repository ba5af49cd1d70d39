"""Layouts and kernels on an accelerator: the same equalities as on a CPU, where the kernels differ.

Skipped where there is none. In bfloat16 the bar is a share of what a deliberately wrong layout does.
"""

import pytest
import torch
from torch._dynamo.utils import counters

from gpu.world import DEVICE, ON_GPU, adapted, build_base, examples
from loralab.layout.planner import Layout, Planner
from loralab.models.determinism import resolve_determinism, restored_algorithms
from loralab.models.dropout import DropoutKeys, KeyedDropout, token_keys
from loralab.models.self_check import find_tree_failure, resolve_tree_kernel
from loralab.models.supervised import SupervisedPeftModel
from loralab.training.loss import run_micro_batches
from support.tiny import Family

FAMILIES: list[Family] = ["gpt2", "llama", "qwen2"]
# Compiling takes tens of seconds a family; grouped heads and one head per key are the two forms.
CASES: list[tuple[Family, str]] = [
    *((family, kernel) for family in FAMILIES for kernel in ("dense", "per_tree")),
    ("gpt2", "flex"),
    ("llama", "flex"),
]


def _loss_and_gradient(
    model: SupervisedPeftModel, planner: Planner, *, length: int = 100
) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    step = planner(examples(6, length=length))
    result = run_micro_batches(
        model, step.micro_batches, device=DEVICE, backward=torch.Tensor.backward, dropout_key=(3, 5)
    )
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return float(result.total) / result.count, gradient


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("family", "kernel"), CASES)
def test_every_kernel_gives_the_padded_loss_and_gradient_in_float32(family: Family, kernel: str) -> None:
    model = adapted(build_base(family))
    layouts: list[Layout] = ["packed", "shared"]
    expected, gradient = _loss_and_gradient(model, Planner(4096, layout="padded"))
    assert find_tree_failure(model, kernel) is None
    model.tree_kernel = kernel
    for layout in layouts:
        loss, found = _loss_and_gradient(model, Planner(4096, layout=layout))
        assert loss == pytest.approx(expected, rel=1e-5)
        assert _distance(found, gradient) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_takes_a_kernel_made_for_the_accelerator(family: Family) -> None:
    model = adapted(build_base(family), dtype=torch.bfloat16)
    chosen = resolve_tree_kernel(model)
    if ON_GPU:
        assert chosen.value == "varlen", chosen.reason
    model.tree_kernel = chosen.value
    expected, gradient = _loss_and_gradient(model, Planner(4096, layout="padded"))
    layouts: list[Layout] = ["packed", "shared"]
    for layout in layouts:  # one without branches, where the kernel goes another way than with them
        loss, found = _loss_and_gradient(model, Planner(4096, layout=layout))
        assert loss == pytest.approx(expected, rel=1e-2), layout
        assert _distance(found, gradient) < 0.05, layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_a_step_twice_is_the_same_to_the_last_bit(layout: Layout, dtype: torch.dtype) -> None:
    model = adapted(build_base("llama"), dtype=dtype, dropout=0.1).train()
    with restored_algorithms():
        found = resolve_determinism(model, DEVICE)
        assert all(choice.value == "on" for choice in found.values()), found
        model.tree_kernel = resolve_tree_kernel(model).value
        first, second = (_loss_and_gradient(model, Planner(4096, layout=layout), length=700) for _ in range(2))
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])


def test_rows_of_other_lengths_are_not_compiled_anew() -> None:
    model = adapted(build_base("llama"), dtype=torch.bfloat16).train()
    model.tree_kernel = "flex" if ON_GPU else "per_tree"
    planner = Planner(4096)
    for length in (40, 90):  # the first length is compiled as it is, the second one for all
        _loss_and_gradient(model, planner, length=length)
    before = counters["stats"]["unique_graphs"]
    for length in range(50, 500, 45):
        _loss_and_gradient(model, planner, length=length)
    assert counters["stats"]["unique_graphs"] - before <= 1  # rows of less than a block are a class of their own


def test_dropout_masks_are_those_of_the_cpu() -> None:
    masks = []
    for device in (torch.device("cpu"), DEVICE):
        layer = KeyedDropout(0.3, layer=2, keys=DropoutKeys())
        layer.keys.tokens = token_keys(7, 3, torch.arange(40, device=device))
        masks.append(layer(torch.ones(40, 33, device=device)).cpu())
    assert torch.equal(*masks)
