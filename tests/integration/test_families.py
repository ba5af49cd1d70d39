"""Every family either takes token trees and gives the same loss, or takes the padded layout and says why."""

from typing import Any

import pytest
import torch

from loralab.config.schema import Config, LoraConfig
from loralab.layout.planner import Planner
from loralab.models.adapters import build_adapter
from loralab.models.attention_kernels import KERNELS
from loralab.models.self_check import find_tree_failure, resolve_tree_kernel
from loralab.models.supervised import SupervisedPeftModel
from loralab.training.loss import model_inputs
from loralab.workflows.step_layout import resolve_planner
from support.families import OTHER_FAMILIES, TREE_FAMILIES, WINDOW, build_family, lora_targets
from support.layouts import (
    ALWAYS_SHARE,
    CPU,
    draw_adapter,
    largest_difference,
    loss_and_gradients,
    sharing_rows,
    transformers_loss_and_gradients,
)

VOCABULARY = 97
SAME = 1e-5
ALL = 1_000_000
SHARED = Planner(ALL, cost=ALWAYS_SHARE)
LONG = 140  # tokens of prefix: a mask that is right in short rows only shows here


def build(name: str, *, seed: int = 0) -> SupervisedPeftModel:
    base = build_family(name, vocabulary=VOCABULARY, seed=seed)
    model, _ = build_adapter(base, LoraConfig(r=4, target_modules=lora_targets(name)), seed=seed)
    draw_adapter(model, seed=seed + 1)
    return model


@pytest.mark.parametrize("prefix", [40, LONG], ids=["short", "long"])
@pytest.mark.parametrize("family", TREE_FAMILIES)
def test_family_takes_trees_and_gives_transformers_own_loss(family: str, prefix: int) -> None:
    model = build(family)
    kernel = resolve_tree_kernel(model)
    assert (kernel.value, kernel.reason) == ("per_tree", "equal to each path alone on a probe row")
    model.tree_kernel = kernel.value
    rows = sharing_rows(3, vocabulary=VOCABULARY, prefix=prefix)
    assert min(len(each.branches[0].prompt_ids) for each in rows[:-1]) < prefix
    own, own_gradients = transformers_loss_and_gradients(model, rows)
    planners = (
        Planner(ALL, layout="padded"),
        Planner(4 * prefix, layout="packed"),
        SHARED,
        Planner(3 * prefix // 2, cost=ALWAYS_SHARE),
    )
    for planner in planners:
        loss, gradients, _ = loss_and_gradients(model, planner, rows)
        assert loss == pytest.approx(own, rel=SAME), planner
        assert largest_difference(gradients, own_gradients) <= SAME, planner


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_family_takes_the_padded_layout_and_says_why(family: str) -> None:
    model = build(family)
    config = Config.model_validate({"model": {"name": "x"}, "data": {"train": "x"}, "output": {"dir": "x"}})
    planner, choices = resolve_planner(model, config, max_length=64, device=CPU)
    assert planner.layout == choices["layout"].value == "padded"
    assert model.tree_kernel is None
    assert OTHER_FAMILIES[family][2] in choices["layout"].reason
    assert choices["attention"].value == model.stock_attention
    rows = sharing_rows(3, vocabulary=VOCABULARY)
    own, own_gradients = transformers_loss_and_gradients(model, rows)
    loss, gradients, _ = loss_and_gradients(model, planner, rows)
    assert loss == pytest.approx(own, rel=SAME)
    assert largest_difference(gradients, own_gradients) <= SAME


# On a CPU FlexAttention is not compiled, and says so.
UNCOMPILED = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


def tree_losses(model: SupervisedPeftModel, kernel: str, rows: Any) -> torch.Tensor:
    model.tree_kernel = kernel
    (batch,) = SHARED(rows).micro_batches
    losses: torch.Tensor = model(**model_inputs(batch)).losses
    return losses


@UNCOMPILED
@pytest.mark.parametrize("family", TREE_FAMILIES)
def test_kernels_agree(family: str) -> None:
    """Per tree, dense and (forward only on a CPU) FlexAttention; variable lengths need an accelerator."""
    assert set(KERNELS) == {"per_tree", "products", "dense", "flex", "varlen"}
    model = build(family).eval()
    rows = sharing_rows(1, vocabulary=VOCABULARY, prefix=LONG)
    with torch.no_grad():
        expected = tree_losses(model, "per_tree", rows)
        for kernel in ("products", "dense"):
            torch.testing.assert_close(tree_losses(model, kernel, rows), expected, rtol=1e-4, atol=1e-5)
        if family == "gpt-oss":
            with pytest.raises(NotImplementedError, match="sinks"):
                tree_losses(model, "flex", rows)
        else:
            torch.testing.assert_close(tree_losses(model, "flex", rows), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "mistral-window", "gpt2", "gpt-oss"])
@pytest.mark.parametrize("kernel", ["products", "dense"])
def test_kernels_give_the_same_gradients(kernel: str, family: str) -> None:
    model = build(family)
    rows = sharing_rows(1, vocabulary=VOCABULARY)
    found = []
    for name in ("per_tree", kernel):
        assert find_tree_failure(model, name) is None
        model.tree_kernel = name
        found.append(loss_and_gradients(model, SHARED, rows))
    assert found[1][0] == pytest.approx(found[0][0], rel=SAME)
    assert largest_difference(found[1][1], found[0][1]) <= SAME


@UNCOMPILED
def test_flex_without_a_backward_sweep_is_turned_down() -> None:
    assert "backward" in str(find_tree_failure(build("llama"), "flex"))


def test_windows_and_caps_are_in_force() -> None:
    """What the matrix above compares would be worth nothing if windows, caps or sinks did nothing."""
    rows = sharing_rows(3, vocabulary=VOCABULARY)

    def loss(name: str, **changed: Any) -> float:
        kind, settings = TREE_FAMILIES[name]
        TREE_FAMILIES["changed"] = (kind, settings | changed)
        try:
            model = build("changed")
        finally:
            del TREE_FAMILIES["changed"]
        model.tree_kernel = "per_tree"
        return loss_and_gradients(model, SHARED, rows)[0]

    for name, changed in {
        "mistral-window": {"sliding_window": None},
        "gemma2": {"attn_logit_softcapping": None},
        "gemma3": {"sliding_window": 4 * WINDOW},
        "granite": {"logits_scaling": 2.0},
    }.items():
        assert abs(loss(name, **changed) - loss(name)) > 1e-3, name
