"""The token budget: a power of two that memory allows, or what was set."""

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from loralab.models import memory
from loralab.models.limits import Limits
from loralab.models.memory import TokenMemory, activation_bytes, free_bytes, pair_bytes, resolve_token_budget
from support.families import build_family

CPU = torch.device("cpu")
CONFIG = build_family("llama", vocabulary=64).config
OPTIONS: dict[str, Any] = {"config": CONFIG, "dtype": torch.float32, "device": CPU, "checkpointing": False}


def budget(monkeypatch: pytest.MonkeyPatch, tokens: float, **options: Any) -> Any:
    """Return the choice where half of free memory holds one tree of `tokens` tokens."""
    per_token = activation_bytes(CONFIG, dtype=torch.float32, checkpointing=False)
    per_pair = pair_bytes(CONFIG, dtype=torch.float32)
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(2 * (tokens * per_token + tokens**2 * per_pair)) + 99)
    return resolve_token_budget("auto", **{**OPTIONS, **options})


def test_number_that_is_set_is_taken() -> None:
    choice = resolve_token_budget(777, **OPTIONS)
    assert (choice.value, choice.reason) == (777, "set in training.token_budget")


@pytest.mark.parametrize(("tokens", "expected"), [(1024, 1024), (1023, 512), (2047, 1024), (3, 256), (0, 256)])
def test_budget_is_rounded_down_to_a_power_of_two(monkeypatch: pytest.MonkeyPatch, tokens: int, expected: int) -> None:
    choice = budget(monkeypatch, tokens)
    assert choice.value == expected
    assert "rounded down to a power of two" in choice.reason
    assert "GiB" in choice.reason


def test_processes_share_the_memory_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert budget(monkeypatch, 2048, sharing=2).value == 1024


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
def test_scores_by_hand_are_counted(family: str) -> None:
    """Caps and sinks keep all scores of all heads and layers."""
    config = build_family(family, vocabulary=64).config
    by_hand, plain = pair_bytes(config, dtype=torch.float32), pair_bytes(CONFIG, dtype=torch.float32)
    assert by_hand - plain >= 4 * 2 * 4 * 2  # float32 scores and weights of 4 heads in 2 layers
    assert plain == 2 * pair_bytes(CONFIG, dtype=torch.bfloat16)


def test_budget_ends_where_speed_does(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = budget(monkeypatch, 1e9)
    assert (choice.value, choice.reason) == (4096, "more tokens at once bring no speed on cpu")


def test_recomputing_and_half_precision_leave_room_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = budget(monkeypatch, 1000).value
    assert budget(monkeypatch, 1000, checkpointing=True).value > plain
    assert budget(monkeypatch, 1000, dtype=torch.bfloat16).value == 2 * plain


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "mixtral", "gpt-neox"])
def test_estimate_grows_with_what_is_kept(family: str) -> None:
    config = build_family(family, vocabulary=64).config
    whole = activation_bytes(config, dtype=torch.float32, checkpointing=False)
    assert 0 < activation_bytes(config, dtype=torch.float32, checkpointing=True) < whole
    assert activation_bytes(config, dtype=torch.bfloat16, checkpointing=False) == whole / 2
    deeper = build_family(family, vocabulary=64).config
    deeper.num_hidden_layers *= 3
    assert activation_bytes(deeper, dtype=torch.float32, checkpointing=False) == 3 * whole


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(2), 1000),
        (Limits(2, memory_bytes=700, used_bytes=300), 400),
        (Limits(1, memory_bytes=9999, used_bytes=0), 1000),
        (Limits(2, memory_bytes=100, used_bytes=300), 0),
        (Limits(None), 1000),
    ],
)
def test_free_memory_heeds_the_limit_of_the_container(
    monkeypatch: pytest.MonkeyPatch, limits: Limits, expected: int
) -> None:
    monkeypatch.setattr(memory, "read_limits", lambda: limits)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert free_bytes(CPU) == expected


def test_counted_tokens_take_the_place_of_the_rule_of_thumb() -> None:
    counted = TokenMemory(per_token=1e6, fixed=2e8)
    choice = resolve_token_budget("auto", **OPTIONS, counted=counted, free=int(2 * (2e8 + 1100e6)))
    assert choice.value == 1024
    assert "977 KiB of activations per token" in choice.reason
    less = resolve_token_budget("auto", **OPTIONS, counted=counted, free=int(2 * (2e8 + 1000e6)))
    assert less.value == 512
    nothing = resolve_token_budget("auto", **OPTIONS, counted=counted, free=int(1e8))
    assert nothing.value == 256
