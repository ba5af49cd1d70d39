"""A model without numbers has the parameters, the layers and the memory of the loaded one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from loralab.config.schema import LoraConfig, ModelConfig
from loralab.models.adapters import build_adapter
from loralab.models.blueprint import Blueprint, describe_trainable, describe_weights, draw_blueprint, expect_tree_kernel
from loralab.models.load import count_parameters, load_base_model
from loralab.models.quantized import describe_quantization
from loralab.models.self_check import resolve_tree_kernel
from support import quantized, tiny
from support.families import OTHER_FAMILIES, TREE_FAMILIES, build_family, lora_targets

CPU = torch.device("cpu")


def draw(folder: Path, lora: LoraConfig | None = None, **settings: Any) -> Blueprint:
    return draw_blueprint(
        ModelConfig(name=str(folder), **settings),
        lora or LoraConfig(r=4),
        dtype=torch.float32,
        device=CPU,
        checkpointing=False,
        seed=0,
    )


@pytest.mark.parametrize(
    "variant", ["lora", "rslora", "dora", "lora_plus", "pissa", "olora", "vera", "loha", "lokr", "ia3"]
)
def test_adapters_have_the_parameters_of_the_real_ones(tmp_path: Path, variant: str) -> None:
    folder, lora = tiny.save_base(tmp_path, "llama"), LoraConfig(r=4, variant=variant)
    base, _ = load_base_model(ModelConfig(name=str(folder)), dtype=torch.float32, device=CPU)
    model, _ = build_adapter(base, lora, seed=0)
    blueprint = draw(folder, lora)
    real = {(name, p.shape, p.requires_grad, p.dtype) for name, p in model.named_parameters()}
    assert {(name, p.shape, p.requires_grad, p.dtype) for name, p in blueprint.model.named_parameters()} == real
    assert (describe_weights(blueprint.model)["total"], describe_weights(blueprint.model)["trainable"]) == (
        count_parameters(model)
    )
    assert all(p.is_meta for p in blueprint.model.parameters())


@pytest.mark.parametrize("kind", quantized.KINDS)
@pytest.mark.parametrize("shape", ["gpt2", "qwen2, with bias", "llama, widths 44 and 172"])
def test_quantized_weights_take_the_bytes_of_the_real_ones(tmp_path: Path, shape: str, kind: str) -> None:
    folder = quantized.save_base(tmp_path, shape)
    base = quantized.load(folder, **quantized.KINDS[kind])
    model, _ = build_adapter(base, LoraConfig(r=4), seed=0)
    blueprint = draw(folder, **quantized.KINDS[kind])
    real, counted = describe_quantization(model), describe_weights(blueprint.model)
    assert real is not None
    assert counted["quantized"]["layers"] == real["layers"]
    assert counted["quantized"]["weights"] == real["weights"]
    assert counted["quantized"]["bytes"] == pytest.approx(real["bytes"], rel=0.01)
    assert (counted["total"], counted["trainable"]) == count_parameters(model)
    layers = {name: type(m).__mro__[-3:] for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert {n: type(m).__mro__[-3:] for n, m in blueprint.model.named_modules() if hasattr(m, "lora_A")} == layers


def test_trained_parameters_by_kind(tmp_path: Path) -> None:
    found = describe_trainable(draw(tiny.save_base(tmp_path), LoraConfig(r=4, target_modules=["q_proj"])).model)
    assert found == [
        {
            "kind": "q_proj",
            "parts": [
                {"part": "lora_A", "shape": [4, 32], "count": 2},
                {"part": "lora_B", "shape": [32, 4], "count": 2},
            ],
            "parameters": 512,
        }
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3", "opt", "gptj", "bloom", "lfm2"])
def test_expected_layout_is_the_one_of_the_loaded_model(tmp_path: Path, family: str) -> None:
    assert family in TREE_FAMILIES | OTHER_FAMILIES
    base = build_family(family, vocabulary=64)
    base.save_pretrained(tmp_path)
    lora = LoraConfig(r=2, target_modules=lora_targets(family))
    real = resolve_tree_kernel(build_adapter(base, lora, seed=0)[0])
    expected = expect_tree_kernel(draw(tmp_path, lora))
    assert expected.value == real.value, (expected.reason, real.reason)


def test_random_numbers_of_the_run_are_left_alone(tmp_path: Path) -> None:
    folder = tiny.save_base(tmp_path)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    draw(folder)
    assert torch.equal(torch.get_rng_state(), before)
