"""Adapters: target layers, masters, saving and hashing."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loralab.config.schema import LoraConfig
from loralab.errors import ConfigError, ModelError
from loralab.models.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_sha256,
    build_adapter,
    load_adapter,
    read_adapter_config,
)
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.targets import linear_layers, resolve_target_modules
from loralab.models.variants import VARIANTS
from support import tiny
from support.families import build_family

VOCABULARY = 64
IDS = torch.arange(9)[None]


def base(family: Any = "llama") -> Any:
    return tiny.build_model(family, vocabulary=VOCABULARY).eval()


def adapted(family: Any = "llama", *, seed: int = 0, **lora: Any) -> SupervisedPeftModel:
    model, _ = build_adapter(base(family), LoraConfig(**{"r": 2, **lora}), seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def adapted_layers(model: SupervisedPeftModel) -> set[str]:
    return {
        re.sub(r"^base_model\.model\.|\.lora_A\..*", "", name)
        for name, _ in model.named_parameters()
        if "lora_A" in name
    }


@pytest.mark.parametrize(
    ("family", "last_parts"),
    [
        ("gpt2", ["c_attn", "c_fc", "c_proj"]),
        ("llama", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        ("qwen2", ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
    ],
)
def test_auto_is_every_linear_layer_but_the_head(family: str, last_parts: list[str]) -> None:
    model = base(family)
    chosen = resolve_target_modules(model, LoraConfig())
    assert (chosen.value, chosen.reason) == (last_parts, "all linear layers but the head")
    layers = set(linear_layers(model))
    assert "lm_head" not in layers
    assert adapted_layers(build_adapter(model, LoraConfig(r=2), seed=0)[0]) == layers


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_attention_is_the_layers_inside_attention(family: str) -> None:
    model = base(family)
    chosen = resolve_target_modules(model, LoraConfig(target_modules="attention"))
    assert chosen.value == ["k_proj", "o_proj", "q_proj", "v_proj"]
    wanted = {name for name in linear_layers(model) if "self_attn" in name}
    assert adapted_layers(adapted(family, target_modules="attention")) == wanted


def test_model_without_a_known_attention_lists_its_layers() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": VOCABULARY}
    with pytest.raises(ConfigError, match="no attention layer was recognised") as caught:
        resolve_target_modules(MambaForCausalLM(MambaConfig(**shape)), LoraConfig(target_modules="attention"))
    assert "in_proj" in caught.value.problems[0].fix


@pytest.mark.parametrize(
    ("setting", "layers"),
    [
        ("q_proj", {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        (["layers.1.mlp.up_proj"], {"model.layers.1.mlp.up_proj"}),
    ],
)
def test_named_layers(setting: Any, layers: set[str]) -> None:
    assert adapted_layers(adapted(target_modules=setting)) == layers


def test_layers_that_fused_kernels_read_past_an_adapter_are_left_out() -> None:
    mamba = build_family("mamba", vocabulary=VOCABULARY)
    chosen = resolve_target_modules(mamba, LoraConfig())
    assert chosen.value == ["dt_proj", "in_proj", "x_proj"]
    assert "conv1d, out_proj" in chosen.reason
    with pytest.raises(ConfigError, match="layer 'out_proj' is read by the model's fused kernels") as caught:
        resolve_target_modules(mamba, LoraConfig(target_modules=["in_proj", "out_proj"]))
    assert caught.value.problems[0].fix == "layers of this model: dt_proj, in_proj, x_proj"
    build_adapter(mamba, LoraConfig(), seed=0)  # PEFT takes what was chosen


@pytest.mark.parametrize(
    ("setting", "what", "fix"),
    [
        (
            ["q_proj", "q_prj"],
            "no linear layer is named 'q_prj'",
            "did you mean 'q_proj'? layers of this model: down_proj",
        ),
        ("proj", "no linear layer is named 'proj'", "layers of this model: "),
        (["lm_head"], "layer 'lm_head' is the output head, which takes no adapter in this version", "down_proj"),
        (["embed_tokens"], "layer 'embed_tokens' is an embedding, which takes no adapter in this version", "down_proj"),
        ([], "no linear layer is named (nothing)", "layers of this model: "),
    ],
)
def test_unknown_layer_is_an_error(setting: Any, what: str, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_target_modules(base(), LoraConfig(target_modules=setting))
    assert caught.value.problems[0].what == what
    assert fix in caught.value.problems[0].fix


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_fresh_adapter_changes_nothing_and_trains_nothing_else(variant: Any, family: str) -> None:
    plain = base(family)
    before = plain(input_ids=IDS).logits
    model, choices = build_adapter(plain, LoraConfig(variant=variant, r=3, alpha=6, dropout=0.25), seed=0)
    assert torch.equal(model.eval()(input_ids=IDS).logits, before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 6, 0.25)
    assert choices["head"].value == "gathered"


def test_weights_depend_on_the_seed_alone() -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        model, _ = build_adapter(base(), LoraConfig(r=2), seed=seed)
        return {name: parameter for name, parameter in model.named_parameters() if "lora_A" in name}

    first = weights(1)
    torch.rand(3)
    assert all(torch.equal(value, first[name]) for name, value in weights(1).items())
    assert not any(torch.equal(value, first[name]) for name, value in weights(2).items())


def test_adapter_is_float32_on_a_bfloat16_base(tmp_path: Path) -> None:
    model, _ = build_adapter(base().bfloat16(), LoraConfig(r=2), seed=0)
    types = {("lora_" in name): set() for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        types["lora_" in name].add(parameter.dtype)
    assert types == {True: {torch.float32}, False: {torch.bfloat16}}
    model.save_pretrained(tmp_path)
    loaded = load_adapter(base().bfloat16(), tmp_path)
    assert {p.dtype for name, p in loaded.named_parameters() if "lora_" in name} == {torch.float32}


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_saved_adapter_comes_back_frozen_and_equal(family: str, tmp_path: Path) -> None:
    model = adapted(family)
    model.save_pretrained(tmp_path)
    loaded = load_adapter(base(family), tmp_path)
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not loaded.training
    with loaded.disable_adapter():
        assert torch.equal(loaded(input_ids=IDS).logits, base(family)(input_ids=IDS).logits)


def test_folders_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        read_adapter_config(tmp_path / "gone")
    with pytest.raises(ModelError, match=r"no adapter_config\.json"):
        read_adapter_config(tmp_path)
    (tmp_path / CONFIG_FILE).write_text("{}")
    with pytest.raises(ModelError, match=r"no adapter_model.safetensors"):
        read_adapter_config(tmp_path)


@pytest.mark.parametrize("damage", ["other_family", "missing", "unexpected", "no_weights"])
def test_adapter_that_does_not_fit_is_refused(damage: str, tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    first = next(iter(tensors))
    if damage == "missing":
        del tensors[first]
    elif damage == "unexpected":
        tensors[first.replace("layers.0", "layers.9").replace("layers.1", "layers.9")] = tensors[first].clone()
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    if damage == "no_weights":
        (tmp_path / WEIGHTS_FILE).write_bytes(b"\0" * 40)
    with pytest.raises(ModelError, match="the adapter does not fit this base"):
        load_adapter(base("gpt2" if damage == "other_family" else "llama"), tmp_path)


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> str:
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS_FILE)
    return adapter_sha256(folder)


def test_hash_does_not_depend_on_the_order_in_the_file(tmp_path: Path) -> None:
    # safetensors sorts what it writes; the file with the other order is put together by hand.
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2, 3)}
    digest = saved(tmp_path / "one", tensors)
    other = tmp_path / "two"
    other.mkdir()
    header = (
        b'{"b":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
        b'"a":{"dtype":"F32","shape":[4],"data_offsets":[24,40]}}'
    )
    body = tensors["b"].numpy().tobytes() + tensors["a"].numpy().tobytes()
    (other / WEIGHTS_FILE).write_bytes(len(header).to_bytes(8, "little") + header + body)
    assert (other / WEIGHTS_FILE).read_bytes() != (tmp_path / "one" / WEIGHTS_FILE).read_bytes()
    assert adapter_sha256(other) == digest


def test_hash_is_changed_by_a_bit_a_name_a_shape_or_a_type(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(4), "b": torch.ones(2, 3)}
    bit = tensors["a"].clone()
    bit.view(torch.int32)[3] ^= 1
    variants = [
        tensors,
        {**tensors, "a": bit},
        {"c": tensors["a"], "b": tensors["b"]},
        {**tensors, "b": torch.ones(3, 2)},
        {**tensors, "a": torch.zeros(4, dtype=torch.int32)},
        {**tensors, "a": torch.zeros(8, dtype=torch.bfloat16)},
    ]
    assert len({saved(tmp_path / str(i), each) for i, each in enumerate(variants)}) == len(variants)
