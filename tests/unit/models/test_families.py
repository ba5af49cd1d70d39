"""What is known of architectures before a model is loaded."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, T5Config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from loralab.models.families import LOGIT_TAILS, LogitTail, find_logit_tail, find_tree_obstacle
from support.families import OTHER_FAMILIES, TREE_FAMILIES

# What the configuration tells; of the others only the self-check knows.
TOLD = {"falcon-alibi", "mamba", "qwen3-next", "lfm2", "llama4"}


@pytest.mark.parametrize("family", TREE_FAMILIES)
def test_nothing_stands_against_families_that_take_trees(family: str) -> None:
    kind, settings = TREE_FAMILIES[family]
    assert find_tree_obstacle(CONFIG_MAPPING[kind](**settings)) is None


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_obstacles_are_told_by_the_configuration(family: str) -> None:
    kind, settings, reason = OTHER_FAMILIES[family]
    found = find_tree_obstacle(CONFIG_MAPPING[kind](**settings))
    assert (found is not None) is (family in TOLD)
    assert found is None or reason in found


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(), "it is an encoder-decoder"),
        (LlamaConfig(alibi=True), "ALiBi"),
        (LlamaConfig(attn_temperature_tuning=True), "temperature"),
        (
            LlamaConfig(layer_types=["full_attention", "indexed_attention"], num_hidden_layers=2),
            "layers of type indexed_attention",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_stand_against_trees(config: Any, reason: str) -> None:
    assert reason in str(find_tree_obstacle(config))


@pytest.mark.parametrize(
    ("settings", "tail"),
    [
        ({}, LogitTail()),
        ({"final_logit_softcapping": 30.0}, LogitTail(cap=30.0)),
        ({"logits_soft_cap": 5.0}, LogitTail(cap=5.0)),
        ({"output_logit_soft_cap": 7.0}, LogitTail(cap=7.0)),
        ({"logit_scale": 0.25}, LogitTail(factor=0.25)),
        ({"lm_head_multiplier": 3.0}, LogitTail(factor=3.0)),
        ({"output_multiplier": 2}, LogitTail(factor=2.0)),
        ({"logits_scaling": 8.0}, LogitTail(factor=0.125)),
        ({"logit_scale": 0.5, "final_logit_softcapping": 30.0}, LogitTail(factor=0.5, cap=30.0)),
        ({"final_logit_softcapping": None, "logit_scale": True}, LogitTail()),
    ],
)
def test_logit_tail_is_read_from_the_configuration(settings: dict[str, Any], tail: LogitTail) -> None:
    assert find_logit_tail(LlamaConfig(**settings)) == tail


def test_every_logit_tail_is_tested_above() -> None:
    marks = test_logit_tail_is_read_from_the_configuration.pytestmark  # type: ignore[attr-defined]
    assert {name for settings, _ in marks[0].args[1] for name in settings} == set(LOGIT_TAILS)


def test_logit_tail_scales_then_caps() -> None:
    logits = torch.tensor([-40.0, 0.0, 1.0, 40.0])
    assert LogitTail()(logits) is logits
    torch.testing.assert_close(LogitTail(2.0, 10.0)(logits), 10 * torch.tanh(logits * 2 / 10))


def test_configuration_without_text_settings_of_its_own() -> None:
    assert find_logit_tail(GPT2Config()) == LogitTail()
