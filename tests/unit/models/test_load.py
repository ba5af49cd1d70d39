"""Loading a base: what is checked before, what is chosen, and how failures read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config

from loralab.config.schema import ModelConfig
from loralab.errors import ModelError
from loralab.models.load import (
    check_length,
    check_local_model,
    count_parameters,
    load_base_model,
    load_model_config,
    load_tokenizer,
    model_sha256,
    model_source,
    resolve_attention,
)
from support import tiny
from support.families import build_family

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("models") / "tiny-gpt2", "gpt2")


def problem_of(name: str) -> Any:
    with pytest.raises(ModelError) as caught:
        check_local_model(name)
    (problem,) = caught.value.problems
    assert problem.where == "key model.name"
    return problem


def test_whole_folder_and_hub_ids_pass(base: Path) -> None:
    for name in (str(base), "gpt2", "owner/name"):
        check_local_model(name)


def test_missing_folder_suggests_its_neighbour(base: Path) -> None:
    problem = problem_of(str(base.with_name("tiny-gtp2")))
    assert problem.what == f"no such model folder: {str(base.with_name('tiny-gtp2'))!r}"
    assert problem.fix == f"did you mean {str(base)!r}?"
    assert problem_of("./nowhere/at-all").fix == "give a folder that exists, or a Hub id"


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("")
    assert problem_of(str(file)).what == f"not a folder: {str(file)!r}"
    assert problem_of(str(tmp_path)).what == f"no config.json in {str(tmp_path)!r}"
    (tmp_path / "adapter_config.json").write_text("{}")
    assert problem_of(str(tmp_path)).fix == "an adapter is no base model: name its base"


def test_pickled_weights_are_named_and_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_text("")
    problem = problem_of(str(tmp_path))
    assert problem.what == f"model folder without safetensors weights: {str(tmp_path)!r}; found pytorch_model.bin"


def test_model_source(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base.parent)
    assert model_source(base.name) == str(base)
    assert model_source("owner/name") == "owner/name"


def test_damaged_files_read_as_model_errors(base: Path, tmp_path: Path) -> None:
    model = ModelConfig(name=str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load the configuration of"):
        load_model_config(model)
    with pytest.raises(ModelError, match="cannot load the tokenizer of"):
        load_tokenizer(model)
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(ModelError, match="cannot load the weights of") as caught:
        load_base_model(model, dtype=torch.float32, device=CPU)
    assert caught.value.problems[0].fix.startswith("check that folder")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_is_frozen_in_its_dtype(base: Path, dtype: torch.dtype) -> None:
    model, choices = load_base_model(ModelConfig(name=str(base)), dtype=dtype, device=CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert count_parameters(model)[1] == 0
    assert (choices["attn_implementation"].value, choices["attn_implementation"].reason) == (
        "sdpa",
        "the model supports it",
    )
    tokenizer = load_tokenizer(ModelConfig(name=str(base)))
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0]


@pytest.mark.parametrize("setting", ["off", "as_configured"])
def test_base_dropout(base: Path, setting: Any) -> None:
    model, choices = load_base_model(ModelConfig(name=str(base), base_dropout=setting), dtype=torch.float32, device=CPU)
    chosen, names = choices["base_dropout"], ("embd_pdrop", "attn_pdrop", "resid_pdrop")
    assert chosen.value == setting
    assert all(name in chosen.reason for name in names)
    wanted = 0.0 if setting == "off" else 0.1
    assert {getattr(model.config, name) for name in names} == {wanted}
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {wanted}
    model.train()
    ids = torch.arange(6)[None]
    same = torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert same == (setting == "off")


def test_attention_can_be_set() -> None:
    model = ModelConfig(name="m", attn_implementation="eager")
    assert resolve_attention(model, GPT2Config()).reason == "set in model.attn_implementation"
    assert resolve_attention(model, GPT2Config()).value == "eager"


def test_check_length_is_the_models_positions() -> None:
    config = GPT2Config(n_positions=64)
    check_length(config, 64)
    with pytest.raises(ModelError, match="max_length 65 is more than the model's 64 positions"):
        check_length(config, 65)


def test_model_hash_follows_the_weights(base: Path, tmp_path: Path) -> None:
    assert model_sha256("gpt2") is None
    copy = tmp_path / "model.safetensors"
    content = (base / "model.safetensors").read_bytes()
    copy.write_bytes(content)
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    assert model_sha256(str(tmp_path)) == model_sha256(str(base))
    copy.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert model_sha256(str(tmp_path)) != model_sha256(str(base))
    assert json.loads((base / "config.json").read_text())["model_type"] == "gpt2"


def test_router_loss_is_switched_off_and_said(tmp_path: Path, base: Path) -> None:
    """A product of means over whatever lies in a batch would depend on the layout."""
    model = build_family("mixtral", vocabulary=64)
    model.config.output_router_logits = True
    model.save_pretrained(tmp_path)
    loaded, choices = load_base_model(ModelConfig(name=str(tmp_path)), dtype=torch.float32, device=CPU)
    assert loaded.config.output_router_logits is False
    assert choices["router_loss"].value == "off"
    assert "output_router_logits was true" in choices["router_loss"].reason
    _, choices = load_base_model(ModelConfig(name=str(base)), dtype=torch.float32, device=CPU)
    assert "router_loss" not in choices


@pytest.mark.parametrize("damage", ["[" * 100_000, '{"model": {"type": "Unheard"}}', "{", ""])
def test_damaged_tokenizer_of_an_adapter_names_its_folder(damage: str, tmp_path: Path) -> None:
    tiny.build_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(ModelError, match="cannot load the tokenizer in") as caught:
        load_tokenizer(ModelConfig(name="base"), folder=tmp_path)
    assert caught.value.problems[0].where == str(tmp_path)
