"""What is chosen for a run's steps, and the reason that its record keeps."""

from typing import Any

import pytest
import torch

from loralab.config.schema import Config, LoraConfig
from loralab.errors import ConfigError
from loralab.layout.planner import Planner
from loralab.models.adapters import build_adapter
from loralab.models.supervised import SupervisedPeftModel
from loralab.workflows.step_layout import build_sampler, resolve_planner
from support import tiny
from support.families import build_family
from unit.layout.examples import example

CPU = torch.device("cpu")


def build(family: str = "llama") -> SupervisedPeftModel:
    return build_adapter(build_family(family, vocabulary=64), LoraConfig(r=2), seed=0)[0]


def config(**sections: dict[str, Any]) -> Config:
    settings: dict[str, dict[str, Any]] = {"model": {"name": "x"}, "data": {"train": "x"}, "output": {"dir": "x"}}
    return Config.model_validate(
        {name: settings.get(name, {}) | sections.get(name, {}) for name in settings | sections}
    )


def resolve(model: SupervisedPeftModel, /, **sections: dict[str, Any]) -> tuple[Planner, dict[str, Any]]:
    return resolve_planner(model, config(**sections), max_length=64, device=CPU)


@pytest.mark.parametrize(
    ("sections", "layout", "kernel", "because"),
    [
        ({}, "shared", "per_tree", "shared prefixes are computed once"),
        ({"training": {"layout": "shared"}}, "shared", "per_tree", "shared prefixes are computed once"),
        ({"training": {"layout": "packed"}}, "packed", "per_tree", "set in training.layout"),
        ({"training": {"layout": "padded"}}, "padded", None, "set in training.layout"),
        (
            {"model": {"attn_implementation": "eager"}},
            "padded",
            None,
            "model.attn_implementation is set to eager",
        ),
    ],
)
def test_layout_follows_the_settings(sections: dict[str, Any], layout: str, kernel: str | None, because: str) -> None:
    model = build()
    planner, choices = resolve(model, **sections)
    assert planner.layout == choices["layout"].value == layout
    assert because in choices["layout"].reason
    assert model.tree_kernel == kernel
    assert choices["attention"].value == (kernel or model.stock_attention)
    assert choices["attention"].reason


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_layout_that_the_model_cannot_take_is_refused(layout: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(build("lfm2"), training={"layout": layout})
    (problem,) = caught.value.problems
    assert problem.what == f"this model cannot take the layout {layout!r}: it has layers of type conv"
    assert problem.where == "key training.layout"
    assert "training.layout: auto" in problem.fix


def test_layout_is_refused_beside_an_attention_that_was_asked_for() -> None:
    with pytest.raises(ConfigError, match="attn_implementation is set to sdpa"):
        resolve(build(), training={"layout": "shared"}, model={"attn_implementation": "sdpa"})


def test_budget_is_that_of_the_settings() -> None:
    planner, choices = resolve(build(), training={"token_budget": 321})
    assert planner.token_budget == choices["token_budget"].value == 321
    automatic, _ = resolve(build())
    assert automatic.token_budget.bit_count() == 1


def test_sharing_is_weighed_by_the_size_of_the_model() -> None:
    """Pairs cost as much as two products of the hidden size per layer, a token two per weight."""
    model = build()
    planner, _ = resolve(model)
    weights = sum(p.numel() for p in model.language_model.parameters()) - model.embedding.weight.numel()
    assert planner.cost.tokens_per_pair == pytest.approx(2 * 32 * 2 / weights)


def test_noise_of_the_base_is_told() -> None:
    noisy, _ = build_adapter(tiny.build_model("gpt2", vocabulary=64), LoraConfig(r=2), seed=0)
    _, choices = resolve(noisy)
    assert "on average only" in choices["layout"].reason
    assert "on average only" not in resolve(build("gpt2"))[1]["layout"].reason


def test_random_sampling_says_so() -> None:
    examples = [example(([1, 2], [3])) for _ in range(10)]
    sampler, facts = build_sampler(
        config(training={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "seed": 7}), examples
    )
    assert (sampler.rows, sampler.rows_per_step, sampler.seed, sampler.groups) == (10, 6, 7, None)
    assert facts == {"value": "random", "rows_per_step": 6}


def test_grouped_sampling_reports_its_groups() -> None:
    documents = [[document] * 40 for document in range(5)]
    examples = [example(([*documents[i % 5], i], [3])) for i in range(15)]
    settings = {"sampling": "grouped", "per_device_train_batch_size": 3}
    sampler, facts = build_sampler(config(training=settings), examples)
    assert sorted(map(sorted, sampler.groups or ())) == [[i, i + 5, i + 10] for i in range(5)]
    assert facts == {
        "value": "grouped",
        "rows_per_step": 3,
        "groups": 5,
        "largest_group": 3,
        "distinct_groups_per_step": 1.0,
    }
