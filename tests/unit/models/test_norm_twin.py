"""Norms as one operation: swapped where they compute the same, left alone where not."""

import copy
from typing import Any

import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from loralab.models.norm_twin import join_norms, swap_norms
from support import tiny


def random_norms() -> Any:
    model = tiny.build_model("llama", vocabulary=64).eval()
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def test_a_swapped_model_gives_the_same_logits_and_keeps_its_weights() -> None:
    model, ids = random_norms(), torch.arange(3, 20)[None]
    names, weight, before = list(model.state_dict()), model.model.norm.weight, model(input_ids=ids).logits
    assert swap_norms(model, torch.float32) == 2 * len(model.model.layers) + 1
    assert isinstance(model.model.norm, nn.RMSNorm)
    assert model.model.norm.weight is weight
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=1e-5, atol=1e-6)
    assert swap_norms(model, torch.float32) == 0


def test_in_half_precision_it_is_as_near_to_float32_as_the_models_own() -> None:
    model, ids = random_norms().to(torch.bfloat16), torch.arange(3, 60)[None]
    exact = copy.deepcopy(model).float()(input_ids=ids).logits.detach()
    before = model(input_ids=ids).logits.detach().float()
    assert swap_norms(model, torch.float32) == 0  # activations of another type than the weights
    assert swap_norms(model, torch.bfloat16) > 0
    after = model(input_ids=ids).logits.detach().float()
    assert float((after - exact).norm()) < 1.2 * float((before - exact).norm())


def test_a_norm_that_computes_something_else_stays() -> None:
    class Shifted(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * 1.05

    class Gated(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(hidden_states)

    hooked = LlamaRMSNorm(64)
    hooked.register_forward_hook(lambda *_: None)
    others = nn.ModuleList([Shifted(64), Gated(64), GemmaRMSNorm(64), nn.LayerNorm(64), hooked])
    for module in others.modules():  # a weight of ones would hide Gemma's 1 + w
        if isinstance(module, GemmaRMSNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    assert swap_norms(others, torch.float32) == 0


def test_nothing_is_swapped_on_a_cpu() -> None:
    model = tiny.build_model("llama", vocabulary=64)
    assert join_norms(model, device=torch.device("cpu"), dtype=torch.float32) == {}
    assert isinstance(model.model.norm, LlamaRMSNorm)
