"""The self-check: what it says of models that take trees, and that broken ones fail it."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from loralab.config.schema import LoraConfig
from loralab.models.adapters import build_adapter
from loralab.models.attention_kernels import KERNELS, Kernel, PerTree
from loralab.models.precision import Resolved
from loralab.models.self_check import find_training_noise, find_tree_failure, resolve_tree_kernel
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.visibility import Visibility
from support import tiny
from support.families import build_family
from support.layouts import draw_adapter

VOCABULARY = 97
PER_TREE = KERNELS["per_tree"]


def build(family: str = "llama", *, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> SupervisedPeftModel:
    base = build_family(family, vocabulary=VOCABULARY).to(dtype)
    model, _ = build_adapter(base, LoraConfig(r=2, dropout=dropout), seed=0)
    draw_adapter(model, seed=1)
    return model


def masked(change: Callable[..., Tensor]) -> Kernel:
    """Return the dense kernel with another mask: `change(allowed, query, key)`."""

    def build_mask(seen: Visibility) -> PerTree:
        length, nothing = seen.roots[-1].end, torch.zeros((), dtype=torch.long)

        def changed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return change(lambda q, k: seen.allowed(nothing, nothing, q, k), query, key)

        return PerTree([(0, length)], [replace(seen, allowed=changed).additive(0, length)])

    return Kernel(build_mask, PER_TREE.attend)


def _without(name: str) -> Kernel:
    def attend(inputs: Any, mask: Any) -> Tensor:
        setattr(inputs, name, None)
        return PER_TREE.attend(inputs, mask)

    return Kernel(PER_TREE.build_mask, attend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "mistral-window", "gpt-oss"])
def test_sound_models_pass(family: str, dtype: torch.dtype) -> None:
    assert find_tree_failure(build(family, dtype=dtype), "per_tree") is None


# Each would train on a wrong loss, without any message. Family, kernel.
BROKEN: dict[str, tuple[str, Kernel]] = {
    "trees are one causal chain": ("llama", masked(lambda allowed, q, k: k <= q)),
    "a token does not see its prefix": ("llama", masked(lambda allowed, q, k: allowed(q, k) & (q - k < 3))),
    "a token sees the next": ("llama", masked(lambda allowed, q, k: allowed(q, k) | (k == q + 1))),
    "a branch sees the end of the one beside it": (
        "llama",
        masked(lambda allowed, q, k: allowed(q, k) | ((k == q - 1) & (q > 0))),
    ),
    "roots see each other": ("llama", masked(lambda allowed, q, k: allowed(q, k) | ((k == 0) & (q >= k)))),
    "the window counts in the row": (
        "mistral-window",
        masked(lambda allowed, q, k: allowed(q, k) & (q - k < 6)),
    ),
    "the cap of the scores is forgotten": ("gemma2", _without("softcap")),
    "sinks are forgotten": ("gpt-oss", _without("sinks")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", BROKEN)
def test_broken_attention_fails(what: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    family, kernel = BROKEN[what]
    model = build(family, dtype=dtype)
    monkeypatch.setitem(KERNELS, "broken", kernel)
    reason = find_tree_failure(model, "broken")
    assert reason is not None
    assert "logits" in reason
    assert find_tree_failure(model, "per_tree") is None  # the same model, the right kernel


def _sees_row(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + 0.2 * torch.arange(output.shape[1])[:, None] / output.shape[1]


def _convolves(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + 0.1 * output.roll(1, dims=1)


@pytest.mark.parametrize("hook", [_sees_row, _convolves])
def test_a_model_that_looks_at_its_row_fails(hook: Any) -> None:
    """Position and convolution past attention: no mask can mend them."""
    model = build()
    model.embedding.register_forward_hook(hook)
    assert "logits" in str(find_tree_failure(model, "per_tree"))


def test_half_precision_hides_no_place_in_the_row() -> None:
    """Each path alone is compared loosely there; two equal roots are not."""
    model = build(dtype=torch.bfloat16)
    model.embedding.register_forward_hook(lambda _module, _args, output: output + 0.003 * output.roll(1, dims=1))
    assert "equal roots give different logits" in str(find_tree_failure(model, "per_tree"))


def test_half_precision_hides_no_leak_between_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens hear a little of the whole row: equal roots stay equal, and only a changed branch shows it."""

    def attend(inputs: Any, mask: Any) -> Tensor:
        out = PER_TREE.attend(inputs, mask)
        value = inputs.value.repeat_interleave(out.shape[1] // inputs.value.shape[1], dim=1)
        return out + 0.05 * value.mean(dim=2, keepdim=True)

    monkeypatch.setitem(KERNELS, "leaking", Kernel(PER_TREE.build_mask, attend))
    assert "a branch moves logits outside it" in str(find_tree_failure(build(dtype=torch.bfloat16), "leaking"))


def test_a_model_that_makes_a_mask_of_its_own_fails() -> None:
    model = build()

    def forget(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"attention_mask": torch.ones(kwargs["attention_mask"].shape)}

    model.language_model.model.register_forward_pre_hook(forget, with_kwargs=True)
    assert "changed the attention mask" in str(find_tree_failure(model, "per_tree"))


def test_a_layer_with_attention_of_its_own_fails() -> None:
    model = build()
    layer = model.language_model.model.layers[1].self_attn
    own = copy.deepcopy(layer.config)
    own._attn_implementation = "eager"
    layer.config = own

    def dense(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"attention_mask": None}

    layer.register_forward_pre_hook(dense, with_kwargs=True)
    assert find_tree_failure(model, "per_tree") == "1 of 2 layers attend through transformers' attention interface"


@pytest.mark.parametrize("argument", ["position_bias", "an_argument_of_tomorrow"])
def test_an_argument_that_is_not_honoured_fails(argument: str) -> None:
    model = build()
    attention = model.language_model.model.layers[0].self_attn

    def pass_more(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {argument: torch.zeros(1)}

    attention.register_forward_pre_hook(pass_more, with_kwargs=True)
    assert f"the layer passes {argument}" in str(find_tree_failure(model, "per_tree"))


def test_weights_that_show_nothing_are_unknown() -> None:
    model = build()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name:
                weight.zero_()  # no token hears of another: every layout is right
    assert str(find_tree_failure(model, "per_tree")).startswith("unknown: a wrong layout changes logits")


@pytest.mark.parametrize("training", [True, False])
def test_checking_leaves_the_model_as_it_was(training: bool) -> None:
    model = build("gpt2")
    model.train(training)
    model.tree_kernel = "dense"
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert resolve_tree_kernel(model).value == "per_tree"
    assert (model.training, model.tree_kernel) == (training, "dense")
    assert model.language_model.config._attn_implementation == model.stock_attention
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_fault_of_ours_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(inputs: Any, mask: Any) -> Tensor:
        raise ZeroDivisionError

    monkeypatch.setitem(KERNELS, "faulty", Kernel(PER_TREE.build_mask, attend))
    with pytest.raises(ZeroDivisionError):
        find_tree_failure(build(), "faulty")


def test_base_that_draws_random_numbers_is_noticed() -> None:
    assert find_training_noise(build(dropout=0.5)) is None  # LoRA dropout is keyed
    noisy, _ = build_adapter(tiny.build_model("gpt2", vocabulary=VOCABULARY), LoraConfig(r=2), seed=0)
    state = torch.get_rng_state()
    noisy.eval()
    assert "draws random numbers" in str(find_training_noise(noisy))
    assert not noisy.training
    assert torch.equal(torch.get_rng_state(), state)


def test_code_from_elsewhere_takes_no_trees() -> None:
    """What it does beyond the probe row cannot be known."""

    class Elsewhere(LlamaForCausalLM):
        pass

    config = build_family("llama", vocabulary=VOCABULARY).config
    model, _ = build_adapter(Elsewhere(config), LoraConfig(r=2), seed=0)
    assert resolve_tree_kernel(model) == Resolved(None, "its code is not part of transformers")


def test_logits_that_are_no_numbers_fail() -> None:
    model = build()
    with torch.no_grad():
        model.language_model.model.norm.weight.fill_(float("nan"))
    assert find_tree_failure(model, "per_tree") is not None
