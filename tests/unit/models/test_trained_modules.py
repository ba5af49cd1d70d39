"""Layers trained whole: names, ties, and float32 masters under a base in fewer bits."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from loralab.config.schema import LoraConfig
from loralab.errors import ConfigError
from loralab.models.adapters import build_adapter
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.trained_modules import TrainedCopy, is_tied, resolve_trained_modules, trained_names
from support import tiny
from support.families import build_family

VOCABULARY = 64
IDS = torch.arange(9)[None]


def base(family: Any = "llama") -> Any:
    return tiny.build_model(family, vocabulary=VOCABULARY).eval().requires_grad_(False)


def adapted(model: Any, *names: str, **lora: Any) -> SupervisedPeftModel:
    return build_adapter(model, LoraConfig(r=2, modules_to_save=list(names), **lora), seed=0)[0]


def whole(model: SupervisedPeftModel) -> dict[str, nn.Parameter]:
    """Return what is trained besides adapters, by short names."""
    return {
        name.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and "lora_" not in name
    }


def test_which_models_are_tied() -> None:
    assert [is_tied(base(family)) for family in ("gpt2", "llama", "qwen2")] == [True, False, True]


@pytest.mark.parametrize(
    ("family", "names", "trained"),
    [
        ("llama", ["norm"], {"model.norm.weight"}),  # not every layer whose name ends so
        (
            "llama",
            ["input_layernorm"],
            {"model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"},
        ),
        ("llama", ["layers.1.mlp.up_proj"], {"model.layers.1.mlp.up_proj.weight"}),
        ("llama", ["embed_tokens", "lm_head"], {"model.embed_tokens.weight", "lm_head.weight"}),
        ("gpt2", ["ln_f"], {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
    ],
)
def test_named_layers_are_trained_whole(family: str, names: list[str], trained: set[str]) -> None:
    plain = base(family)
    model = adapted(plain, *names)
    assert whole(model).keys() == trained
    chosen = resolve_trained_modules(base(family), LoraConfig(modules_to_save=names))["modules_to_save"]
    assert trained_names(base(family), chosen) == {name.rpartition(".")[0] for name in trained}


def test_a_layer_trained_whole_has_no_adapter_too() -> None:
    model = adapted(base(), "layers.1.mlp.up_proj")
    with_adapter = [name for name, _ in model.named_parameters() if "up_proj.lora_A" in name]
    assert len(with_adapter) == 1
    assert "layers.0" in with_adapter[0]
    with pytest.raises(ConfigError) as caught:
        adapted(base(), "up_proj", target_modules=["up_proj"])
    assert caught.value.problems[0].what == "no layer is left for 'up_proj'"
    assert caught.value.problems[0].where == "key lora.target_modules, key lora.modules_to_save"


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_matrix_stays_one(name: str, dtype: torch.dtype) -> None:
    model = adapted(base("qwen2").to(dtype), name)
    assert whole(model).keys() == {"model.embed_tokens.weight"}  # parameters count once
    embedding, head = model.embedding.modules_to_save["default"], model.head.modules_to_save["default"]
    assert head.weight is embedding.weight
    assert embedding.weight.dtype == torch.float32
    before = model(input_ids=IDS).logits
    with torch.no_grad():
        embedding.weight[3] += 1.0
    after = model(input_ids=IDS).logits
    assert not torch.equal(after[..., 3], before[..., 3])  # the head's row
    assert not torch.equal(after[0, 3:, 5], before[0, 3:, 5])  # the embedding's row


@pytest.mark.parametrize(
    ("family", "lora", "what", "fix"),
    [
        (
            "gpt2",
            {"modules_to_save": ["wte"]},
            "embedding and head of this model are one matrix, which PEFT cannot keep one with an embedding named 'wte'",
            "leave out wte and lm_head; for a few tokens: lora.trainable_token_indices",
        ),
        (
            "qwen2",
            {"modules_to_save": ["lm_head"], "variant": "vera"},
            "embedding and head of this model are one matrix, which PEFT cannot keep one with variant 'vera'",
            "leave out embed_tokens and lm_head",
        ),
        ("llama", {"modules_to_save": []}, "modules_to_save names no layer: []", "layers: down_proj, embed_tokens"),
        ("llama", {"modules_to_save": ["lm_heat"]}, "no layer is named 'lm_heat'", "did you mean 'lm_head'? layers of"),
        ("llama", {"modules_to_save": ["mlp"]}, "layer 'mlp' holds other layers (gate_proj, up_proj, down_proj)", "a"),
        ("llama", {"modules_to_save": ["act_fn"]}, "layer 'act_fn' has no weights", "name single layers"),
    ],
)
def test_layer_that_cannot_be_trained_whole(family: str, lora: dict[str, Any], what: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_trained_modules(base(family), LoraConfig(**lora))
    assert caught.value.problems[0].what == what
    assert fix in caught.value.problems[0].fix
    assert caught.value.problems[0].where == "key lora.modules_to_save"


@pytest.mark.parametrize(
    ("family", "names"), [("llama", ["norm", "lm_head", "embed_tokens"]), ("gpt2", ["ln_1", "c_proj"])]
)
def test_masters_are_float32_and_products_are_those_of_the_base(family: str, names: list[str]) -> None:
    """A fresh model computes what its base computes, and an update far below the base's last digit is kept."""
    expected = base(family).bfloat16()(input_ids=IDS).logits
    model = adapted(base(family).bfloat16(), *names)
    assert torch.equal(model.eval()(input_ids=IDS).logits, expected)
    weights = whole(model)
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    model(input_ids=IDS).logits.float().square().mean().backward()
    for name, weight in weights.items():
        assert weight.grad is not None, name
        assert weight.grad.dtype == torch.float32
        assert bool(weight.grad.any()), name
        before = weight.detach().clone()
        with torch.no_grad():
            weight.add_(1e-5)
        assert not torch.equal(weight, before)


def test_a_float32_base_keeps_pefts_own_copies() -> None:
    model = adapted(base(), "norm")
    assert not any(isinstance(module, TrainedCopy) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_norm_has_no_weight_decay_in_any_type(dtype: torch.dtype) -> None:
    model = adapted(base("gpt2").to(dtype), "ln_f", "c_proj")
    decayed = get_parameter_names(model, [nn.LayerNorm], ["bias"])
    found = {name for name in decayed if "modules_to_save" in name}
    assert {name.split(".modules_to_save")[0].rpartition(".")[2] for name in found} == {"c_proj"}


def test_a_layer_that_the_model_reads_without_calling_it_is_refused_in_bfloat16() -> None:
    mamba = build_family("mamba", vocabulary=VOCABULARY).bfloat16()
    with pytest.raises(ConfigError, match=r"does not run with float32 masters of .*\.dt_proj: ") as caught:
        adapted(mamba, "dt_proj")
    assert "model.precision: float32" in caught.value.problems[0].fix


def test_layers_are_trained_whole_beside_dropout_in_half_precision() -> None:
    model = adapted(base().to(torch.bfloat16), "norm", dropout=0.1)
    assert [weight.dtype for weight in whole(model).values()] == [torch.float32]
