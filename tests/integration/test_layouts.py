"""The layout never changes the maths: padded = packed = shared = any token budget = transformers' own loss."""

import pytest
import torch

from loralab.config.schema import LoraConfig
from loralab.data.example import TokenizedExample
from loralab.layout.planner import Planner
from loralab.models.adapters import build_adapter
from loralab.models.supervised import SupervisedPeftModel
from loralab.training.loss import model_inputs
from support.families import build_family
from support.layouts import (
    ALWAYS_SHARE,
    draw_adapter,
    largest_difference,
    loss_and_gradients,
    sharing_rows,
    transformers_loss_and_gradients,
)

VOCABULARY = 97
SAME = 1e-5
FAMILIES = ["gpt2", "llama", "qwen2"]
ALL = 1_000_000
PADDED = Planner(ALL, layout="padded")
PLANNERS = {
    "padded, all in one": PADDED,
    "padded, 90 tokens": Planner(90, layout="padded"),
    "padded, one row at a time": Planner(1, layout="padded"),
    "packed, all in one": Planner(ALL, layout="packed"),
    "packed, 90 tokens": Planner(90, layout="packed"),
    "packed, branches apart": Planner(ALL, layout="packed", cost=ALWAYS_SHARE),
    "shared, all in one": Planner(ALL),
    "shared, 64 tokens": Planner(64),
    "shared wherever possible": Planner(ALL, cost=ALWAYS_SHARE),
    "shared wherever possible, 50 tokens": Planner(50, cost=ALWAYS_SHARE),
    "shared, one path at a time": Planner(1, cost=ALWAYS_SHARE),
}


def build(family: str, *, seed: int, dropout: float = 0.0, checkpointing: bool = False) -> SupervisedPeftModel:
    base = build_family(family, vocabulary=VOCABULARY, seed=seed)
    if checkpointing:  # as training does
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    model, _ = build_adapter(base, LoraConfig(r=4, dropout=dropout), seed=seed)
    draw_adapter(model, seed=seed + 1)
    model.tree_kernel = "per_tree"
    return model


def rows(seed: int) -> list[TokenizedExample]:
    return sharing_rows(seed, vocabulary=VOCABULARY)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_gives_transformers_own_loss_and_gradients(family: str, seed: int, checkpointing: bool) -> None:
    model = build(family, seed=seed, checkpointing=checkpointing)
    own, own_gradients = transformers_loss_and_gradients(model, rows(seed))
    assert len(own_gradients) >= 14
    for name, planner in PLANNERS.items():
        loss, gradients, step = loss_and_gradients(model, planner, rows(seed))
        assert loss == pytest.approx(own, rel=SAME), name
        assert largest_difference(gradients, own_gradients) <= SAME, name
        assert (len(step.micro_batches) > 1) is (planner.token_budget < ALL), name


def test_the_layouts_that_are_compared_differ() -> None:
    laid_out = {name: planner(rows(0)).tokens for name, planner in PLANNERS.items()}
    assert laid_out["shared wherever possible"] <= laid_out["shared, all in one"] < laid_out["packed, all in one"]
    assert laid_out["shared wherever possible"] < 0.5 * laid_out["padded, all in one"]
    assert laid_out["shared, 64 tokens"] < laid_out["packed, all in one"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_layout_is_seen(family: str) -> None:
    """The comparison has power: one causal row in place of trees is far off."""
    model = build(family, seed=0)
    own, own_gradients = transformers_loss_and_gradients(model, rows(0))

    class OneChain(Planner):
        def __call__(self, examples):  # type: ignore[no-untyped-def]
            step = super().__call__(examples)
            for batch in step.micro_batches:
                batch.subtree_end.fill_(batch.input_ids.shape[1])
            return step

    loss, gradients, _ = loss_and_gradients(model, OneChain(ALL, cost=ALWAYS_SHARE), rows(0))
    assert abs(loss - own) / own > 100 * SAME
    assert largest_difference(gradients, own_gradients) > 100 * SAME


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_the_same_in_every_layout(family: str, seed: int, checkpointing: bool) -> None:
    model = build(family, seed=seed, dropout=0.3, checkpointing=checkpointing)
    examples, key = rows(seed), (seed, 5)
    loss, gradients, _ = loss_and_gradients(model, PADDED, examples, dropout_key=key)
    for name, planner in PLANNERS.items():
        found, found_gradients, _ = loss_and_gradients(model, planner, examples, dropout_key=key)
        assert found == pytest.approx(loss, rel=SAME), name
        assert largest_difference(found_gradients, gradients) <= SAME, name
    _, without, _ = loss_and_gradients(build(family, seed=seed), PADDED, examples)
    assert largest_difference(without, gradients) > 0.01  # it was on
    _, next_step, _ = loss_and_gradients(model, PADDED, examples, dropout_key=(seed, 6))
    assert largest_difference(next_step, gradients) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_in_flight_do_not_meet(family: str) -> None:
    """Recomputed layers see the tree that they saw, even where another went forward in between."""
    model = build(family, seed=0, checkpointing=True)
    planner = Planner(ALL, cost=ALWAYS_SHARE)
    model.train()

    def forward(seed: int) -> torch.Tensor:
        (batch,) = planner(rows(seed)).micro_batches
        losses: torch.Tensor = model(**model_inputs(batch)).losses
        return losses.mean()

    expected = [loss_and_gradients(model, planner, rows(seed))[1] for seed in (0, 1)]
    losses = [forward(0), forward(1)]
    for loss, gradients in zip(losses, expected, strict=True):
        model.zero_grad()
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert largest_difference(found, gradients) <= SAME
