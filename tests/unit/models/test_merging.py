"""One layer at a time: PEFT's merge of the whole model, and weights as a quantized base holds them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from loralab.config.schema import ModelConfig
from loralab.errors import AdapterIntegrityError, ModelError
from loralab.models.load import load_base_model, load_model_config
from loralab.models.merge_quantized import quantized_names, requantize
from loralab.models.merge_source import open_checkpoint
from loralab.models.merging import Part, draw_skeleton
from loralab.models.quantization import resolve_quantization
from loralab.models.quantized import quantized_layers
from support import tiny
from support.quantized import CPU, KINDS, load, save_base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["gpt2, width 44", "llama, widths 44 and 172"])
def test_a_weight_is_quantized_as_loading_does(tmp_path: Path, kind: str, shape: str, dtype: torch.dtype) -> None:
    folder = save_base(tmp_path, shape)
    section = ModelConfig(name=str(folder), **KINDS[kind])
    chosen = resolve_quantization(section, load_model_config(section), CPU).value
    assert chosen is not None
    held: Any = load(folder, **KINDS[kind]) if dtype == torch.float32 else load_in(folder, dtype, KINDS[kind])
    plain = AutoModelForCausalLM.from_pretrained(folder)
    layers = dict(quantized_layers(held))
    assert set(layers) == quantized_names(plain)
    for name, layer in layers.items():
        original = plain.get_submodule(name)
        turned = isinstance(original, Conv1D)
        found = requantize(original.weight.detach(), chosen, dtype=dtype, device=CPU, turned=turned)
        expected = layer.dequantized(dtype).float()
        assert torch.equal(found, expected.T if turned else expected), name


def load_in(folder: Path, dtype: torch.dtype, settings: dict[str, Any]) -> Any:
    return load_base_model(ModelConfig(name=str(folder), **settings), dtype=dtype, device=CPU)[0]


def adapter_of(base: Path, folder: Path, **settings: Any) -> Any:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
    )
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.1)
    model.save_pretrained(folder)
    return model


def test_each_layer_is_that_of_pefts_own_merge(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", "llama")
    model = adapter_of(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])
    section = ModelConfig(name=str(base))
    skeleton = draw_skeleton(section, [Part(tmp_path / "adapter")], open_checkpoint(section))
    untouched = AutoModelForCausalLM.from_pretrained(base)
    expected = model.merge_and_unload()
    assert {name.rpartition(".")[2] for name in skeleton.layers} >= {"q_proj", "down_proj", "norm"}
    for name in skeleton.layers:
        own = {key: value.detach() for key, value in untouched.get_submodule(name).named_parameters()}
        for key, value in skeleton.merged(name, own).items():
            assert torch.equal(value, expected.get_submodule(name).get_parameter(key)), name
    assert all(weight.is_meta for key, weight in skeleton.base.named_parameters() if "base_layer" in key)


def test_a_layer_that_overflows_is_named(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", "llama")
    adapter_of(base, tmp_path / "adapter", target_modules=["q_proj"])
    section = ModelConfig(name=str(base))
    skeleton = draw_skeleton(section, [Part(tmp_path / "adapter")], open_checkpoint(section))
    name = next(iter(skeleton.layers))
    with pytest.raises(AdapterIntegrityError, match=f"layer {name} are not all finite"):
        skeleton.merged(name, {"weight": torch.full((32, 32), float("inf"))})


def test_an_adapter_of_another_shape_does_not_fit(tmp_path: Path) -> None:
    adapter_of(tiny.save_base(tmp_path / "one", "llama"), tmp_path / "adapter", target_modules=["q_proj"])
    section = ModelConfig(name=str(save_base(tmp_path / "two", "llama, widths 44 and 172")))
    with pytest.raises(ModelError, match="does not fit this base"):
        draw_skeleton(section, [Part(tmp_path / "adapter")], open_checkpoint(section))
