"""Adapters: masters, saving and hashing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from loralab.config.schema import LoraConfig
from loralab.errors import ModelError
from loralab.models.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    adapter_sha256,
    build_adapter,
    load_adapter,
    read_adapter_config,
)
from loralab.models.supervised import SupervisedPeftModel
from support import tiny

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


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_fresh_adapter_changes_nothing_and_trains_nothing_else(family: str) -> None:
    plain = base(family)
    before = plain(input_ids=IDS).logits
    model, choices = build_adapter(plain, LoraConfig(r=3, alpha=6, dropout=0.25), seed=0)
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


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapter_on_a_base_that_peft_rewrote_is_refused(start: Any, tmp_path: Path) -> None:
    """PEFT would rewrite the base at every load: without the adapter it would be no base."""
    settings = PeftLoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=start, task_type="CAUSAL_LM")
    get_peft_model(base(), settings).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"stands on a base that PEFT's {start} rewrote") as caught:
        load_adapter(base(), tmp_path)
    assert "path_initial_model_for_weight_conversion" in caught.value.problems[0].fix
