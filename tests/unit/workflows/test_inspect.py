"""What an adapter is: adapters of every kind that PEFT writes, damaged ones, and those of other tools."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loralab.config.schema import LoraConfig
from loralab.errors import ModelError, RunFolderError
from loralab.models.adapters import CONFIG_FILE, WEIGHTS_FILE, adapter_sha256, build_adapter
from loralab.workflows import inspect
from loralab.workflows.inspect import inspect_adapter
from loralab.workflows.inspect_base import attach
from loralab.workflows.inspect_tensors import read_name, read_tensors
from support import tiny

VOCABULARY = 64
RANK, ALPHA = 4, 8


def lora(**changed: Any) -> peft.LoraConfig:
    given = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**given, **changed})


def save(folder: Path, config: peft.PeftConfig | None = None, *, train: bool = True, **model: Any) -> Path:
    """Write an adapter on a tiny model as PEFT does, its weights moved from where they began."""
    adapted = get_peft_model(tiny.build_model(**{"vocabulary": VOCABULARY, **model}), config or lora())
    if train:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in adapted.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    adapted.save_pretrained(str(folder))
    return folder


def look(folder: Path) -> dict[str, Any]:
    result, _ = inspect_adapter(folder)
    assert json.dumps(result)
    return result


def said(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Return severity and text of the findings, but for the missing contract that no tool but loralab writes."""
    assert all(each["why"] and each["fix"] for each in result["findings"])
    return [(f["severity"], f["what"]) for f in result["findings"] if "prompt_contract" not in f["what"]]


def edit(folder: Path, **changed: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({name: t.contiguous() for name, t in change(tensors).items()}, folder / WEIGHTS_FILE)


def kind(result: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [each for each in result["kinds"] if each["kind"] == name]
    return found


# --- what a trained adapter is -----------------------------------------------------------------------------------


def test_facts_of_a_trained_adapter(tmp_path: Path) -> None:
    folder = save(tmp_path)
    result = look(folder)
    assert said(result) == []
    assert (result["variant"], result["rank"], result["alpha"], result["scale"]) == ("lora", RANK, ALPHA, ALPHA / RANK)
    weights = load_file(folder / WEIGHTS_FILE)
    assert result["parameters"] == sum(weight.numel() for weight in weights.values())
    assert result["tensors"] == len(weights) == 8
    assert result["file_bytes"] == (folder / WEIGHTS_FILE).stat().st_size
    query = kind(result, "q_proj")
    assert (query["count"], query["rank"], query["untrained"]) == (2, [RANK], [])
    assert query["shapes"] == {"lora_A": [[RANK, 32]], "lora_B": [[32, RANK]]}
    norms = [float(weight.double().norm()) for name, weight in weights.items() if "q_proj.lora_B" in name]
    assert query["norms"]["lora_B"]["min"] == pytest.approx(min(norms), rel=1e-6)
    assert query["norms"]["lora_B"]["max"] == pytest.approx(max(norms), rel=1e-6)


def test_norm_of_the_update_is_that_of_the_product(tmp_path: Path) -> None:
    folder = save(tmp_path, lora(use_rslora=True))
    weights = load_file(folder / WEIGHTS_FILE)
    updates = []
    for name, first in weights.items():
        if "v_proj.lora_A" in name:
            product = weights[name.replace("lora_A", "lora_B")].double() @ first.double()
            updates.append(float(product.norm()) * ALPHA / math.sqrt(RANK))
    result = look(folder)
    assert result["variant"] == "rslora"
    spread = kind(result, "v_proj")["update_norm"]
    assert (spread["min"], spread["max"]) == pytest.approx((min(updates), max(updates)), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_hash_and_norms_in_every_type(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save(tmp_path)
    rewrite(folder, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    tensors, sha256 = read_tensors(folder / WEIGHTS_FILE)
    assert sha256 == adapter_sha256(folder)
    stored = load_file(folder / WEIGHTS_FILE)
    for tensor in tensors:
        assert tensor.dtype == str(dtype).removeprefix("torch.")
        assert tensor.norm == pytest.approx(float(stored[tensor.name].double().norm()), rel=1e-6)


def test_types_without_numbers_and_empty_tensors(tmp_path: Path) -> None:
    odd = {"a.lora_A.weight": torch.zeros(0, 4), "a.lora_B.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}
    save_file(odd, tmp_path / WEIGHTS_FILE)
    (tmp_path / CONFIG_FILE).write_text("{}")
    tensors, sha256 = read_tensors(tmp_path / WEIGHTS_FILE)
    assert sha256 == adapter_sha256(tmp_path)
    assert (tensors[0].norm, math.isnan(tensors[1].norm)) == (0.0, True)


def test_same_names_below_different_parents_stay_apart(tmp_path: Path) -> None:
    folder = save(tmp_path, lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True), family="gpt2")
    assert [each["kind"] for each in look(folder)["kinds"]] == ["c_attn", "attn.c_proj", "mlp.c_proj"]


def test_names_of_files_are_one_with_this_ones() -> None:
    assert (inspect.CONFIG_FILE, inspect.WEIGHTS_FILE) == (CONFIG_FILE, WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.m.q_proj.lora_A.weight", ("m.q_proj", "lora_A", False)),
        ("m.q_proj.lora_B", ("m.q_proj", "lora_B", False)),
        ("base_model.model.m.q_proj.lora_B.default.weight", ("m.q_proj", "lora_B", False)),
        ("base_model.model.m.q_proj.lora_B.bias", ("m.q_proj", "lora_B.bias", False)),
        ("base_model.model.m.q_proj.lora_magnitude_vector", ("m.q_proj", "lora_magnitude_vector", False)),
        ("base_model.model.lm_head.weight", ("lm_head", "weight", True)),
        ("base_model.vera_A", ("", "vera_A", False)),
        (
            "base_model.model.embed_tokens.token_adapter.trainable_tokens_delta",
            ("embed_tokens", "trainable_tokens_delta", False),
        ),
    ],
)
def test_what_a_name_says(name: str, expected: tuple[str, str, bool]) -> None:
    assert read_name(name) == expected


# --- every kind of adapter ---------------------------------------------------------------------------------------

TARGETS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
VARIANTS: dict[str, peft.PeftConfig] = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "loha": peft.LoHaConfig(r=2, alpha=2, **TARGETS),
    "lokr": peft.LoKrConfig(r=2, alpha=2, **TARGETS),
    "vera": peft.VeraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "ia3": peft.IA3Config(feedforward_modules=[], **TARGETS),
    "adalora": peft.AdaLoraConfig(total_step=10, **TARGETS),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_matches_its_own_configuration(name: str, tmp_path: Path) -> None:
    result = look(save(tmp_path, VARIANTS[name]))
    assert said(result) == []
    assert result["variant"] == name
    assert result["alpha"] == {"lora": 8, "dora": 8, "loha": 2, "lokr": 2, "adalora": 8}.get(name)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_that_was_never_trained(name: str, tmp_path: Path) -> None:
    (finding,) = said(look(save(tmp_path, VARIANTS[name], train=False)))
    assert finding[0] == "problem"
    assert finding[1].startswith("the adapter was never trained")


@pytest.mark.parametrize("variant", ["pissa", "olora"])
def test_first_factors_that_only_cancel_were_never_trained(variant: Any, tmp_path: Path) -> None:
    base = tiny.build_model("llama", vocabulary=VOCABULARY).requires_grad_(False)
    model, _ = build_adapter(base, LoraConfig(variant=variant, r=2), seed=0)
    model.save_pretrained(str(tmp_path))
    result = look(tmp_path)
    assert any(what.startswith("the adapter was never trained") for _, what, *_ in said(result))
    assert kind(result, "q_proj")["update_norm"]["max"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal"])
def test_start_that_is_not_zero_says_nothing_about_training(start: str, tmp_path: Path) -> None:
    folder = save(tmp_path, lora(init_lora_weights=start), train=False)
    rewrite(folder, lambda tensors: {n: t * 0 if "lora_B" in n else t for n, t in tensors.items()})
    result = look(folder)
    assert said(result) == []
    assert result["variant"] == start


def test_layers_saved_whole_and_new_tokens(tmp_path: Path) -> None:
    result = look(save(tmp_path / "head", lora(modules_to_save=["lm_head"])))
    assert said(result) == []
    assert [tensor["shape"] for tensor in result["saved_whole"]] == [[VOCABULARY, 32]]
    assert said(look(save(tmp_path / "tokens", lora(trainable_token_indices={"embed_tokens": [1, 2]})))) == []


def test_rank_pattern_is_what_a_layer_has(tmp_path: Path) -> None:
    result = look(save(tmp_path, lora(rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 6})))
    assert said(result) == []
    assert (kind(result, "v_proj")["rank"], kind(result, "v_proj")["scale"]) == ([2], [3.0])
    assert kind(result, "q_proj")["rank"] == [RANK]


# --- what is wrong with one --------------------------------------------------------------------------------------


def test_some_layers_never_trained(tmp_path: Path) -> None:
    folder = save(tmp_path)
    rewrite(
        folder,
        lambda tensors: {n: torch.zeros_like(t) if "0.self_attn.v_proj.lora_B" in n else t for n, t in tensors.items()},
    )
    ((severity, what),) = said(look(folder))
    assert (severity, what) == (
        "warning",
        "1 of 4 layers were never trained (their B is zero: model.layers.0.self_attn.v_proj)",
    )


def test_tensors_that_match_nothing(tmp_path: Path) -> None:
    folder = save(tmp_path)
    edit(folder, target_modules=["q_proj"])
    ((severity, what),) = said(look(folder))
    assert severity == "problem"
    assert what.startswith("4 of 8 tensors match nothing in adapter_config.json: ")
    assert "('v_proj' is not in target_modules)" in what
    edit(folder, target_modules=["q_proj", "v_proj"], r=8)
    assert "its rank is 4, the configuration says 8" in said(look(folder))[0][1]
    edit(folder, r=4, peft_type="IA3")
    assert "lora_A is no part of IA3" in said(look(folder))[0][1]
    edit(folder, peft_type="LORA")
    assert said(look(folder)) == []


def test_parts_that_the_configuration_does_not_announce(tmp_path: Path) -> None:
    folder = save(tmp_path / "dora", lora(use_dora=True))
    edit(folder, use_dora=False)
    assert "use_dora is not set" in said(look(folder))[0][1]
    folder = save(tmp_path / "whole", lora(modules_to_save=["norm"]))
    edit(folder, modules_to_save=None)
    assert "it is not in modules_to_save" in said(look(folder))[0][1]
    folder = save(tmp_path / "tokens", lora(trainable_token_indices={"embed_tokens": [1, 2]}))
    edit(folder, trainable_token_indices=None)
    assert "trainable_token_indices is not set" in said(look(folder))[0][1]


def test_target_without_tensors(tmp_path: Path) -> None:
    folder = save(tmp_path)
    edit(folder, target_modules=["q_proj", "v_proj", "o_proj"])
    assert said(look(folder)) == [("warning", "no tensors for 'o_proj', which adapter_config.json names as targets")]


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q|v)_proj", "(", None, 5])
def test_other_forms_of_targets(targets: object, tmp_path: Path) -> None:
    folder = save(tmp_path)
    edit(folder, target_modules=targets)
    fits = targets not in ("(", 5)
    assert (said(look(folder)) == []) == fits


def test_numbers_that_are_none(tmp_path: Path) -> None:
    folder = save(tmp_path)
    rewrite(
        folder, lambda tensors: {n: t * math.nan if "0.self_attn.q_proj.lora_A" in n else t for n, t in tensors.items()}
    )
    assert said(look(folder)) == [
        (
            "problem",
            "1 tensors hold NaN or infinity: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        )
    ]


# --- frozen or trainable: what PEFT does --------------------------------------------------------------------------


def test_why_an_adapter_is_frozen(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    folder = save(tmp_path / "adapter", vocabulary=len(tiny.build_tokenizer()))
    loading = look(folder)["loading"]
    assert "is_trainable=True" in loading["how"]

    def trainable(**options: bool) -> int:
        model = AutoModelForCausalLM.from_pretrained(base)
        loaded = PeftModel.from_pretrained(model, str(folder), **options)
        return sum(weight.numel() for weight in loaded.parameters() if weight.requires_grad)

    for inference_mode in (True, False):  # what the file says does not decide
        edit(folder, inference_mode=inference_mode)
        assert look(folder)["loading"]["inference_mode"] is inference_mode
        assert trainable() == loading["trainable_parameters"] == 0
        assert trainable(is_trainable=True) == loading["trainable_when_asked"] > 0


# --- on a base ---------------------------------------------------------------------------------------------------


def attached(folder: Path, base: Path) -> dict[str, Any]:
    result, tensors = inspect_adapter(folder)
    attach(result, tensors, str(base))
    return result


def test_adapter_on_its_base(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    folder = save(tmp_path / "adapter", lora(modules_to_save=["lm_head"]), vocabulary=len(tiny.build_tokenizer()))
    result = attached(folder, base)
    assert said(result) == []
    assert result["attached"]["unmatched"] == []
    assert result["attached"]["kinds"] == {name: {"attached": 2, "in_base": 2} for name in ("q_proj", "v_proj")}
    assert set(result["attached"]["layers"].values()) == {"Linear"}


def test_adapter_of_convolutions_on_its_base(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", "gpt2")
    config = lora(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    result = attached(save(tmp_path / "adapter", config, family="gpt2"), base)
    assert said(result) == []
    assert set(result["attached"]["layers"].values()) == {"Conv1D"}


def test_adapter_on_another_base(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", "gpt2")
    (severity, what), *rest = said(attached(save(tmp_path / "adapter"), base))
    assert (severity, rest) == ("problem", [])
    assert what.startswith(f"8 of 8 tensors match nothing in {str(base)!r}: ")
    assert "(no such layer)" in what


def test_adapter_of_another_size(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    folder = save(tmp_path / "adapter", lora(modules_to_save=["lm_head"]))  # of a smaller vocabulary

    def halve(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            n: t[:, :16] if "q_proj.lora_A" in n else t[:8] if "v_proj.lora_B" in n else t for n, t in tensors.items()
        }

    rewrite(folder, halve)
    reasons = {entry["reason"] for entry in attached(folder, base)["attached"]["unmatched"]}
    size = len(tiny.build_tokenizer())
    assert reasons == {
        "made for 16 inputs, the layer has 32",
        "made for 8 outputs, the layer has 16",
        f"the layer's is {size} x 32",
    }


def test_base_that_is_none(tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter")
    with pytest.raises(ModelError, match="no such model folder"):
        attached(folder, tmp_path / "gone")


# --- the folder around it ----------------------------------------------------------------------------------------


def write_contract(folder: Path, template: str = "{{ x }}", **changed: Any) -> None:
    import hashlib

    digest = hashlib.sha256(template.encode()).hexdigest()
    content = {
        "template": template,
        "template_sha256": digest,
        "stop_tokens": ["<|end|>"],
        "system_prompt": "Be brief.",
    }
    (folder / "prompt_contract.json").write_text(json.dumps({**content, "golden": [{}, {}], **changed}))
    (folder / "chat_template.jinja").write_text(template)


def test_contract(tmp_path: Path) -> None:
    folder = save(tmp_path)
    (finding,) = look(folder)["findings"]
    assert (finding["severity"], finding["what"]) == ("note", "the folder has no prompt_contract.json")
    write_contract(folder)
    result = look(folder)
    assert result["findings"] == []
    contract = result["contract"]
    assert (contract["stop_tokens"], contract["system_prompt"], contract["golden_prompts"]) == (
        ["<|end|>"],
        "Be brief.",
        2,
    )
    (folder / "chat_template.jinja").write_text("another")
    assert look(folder)["findings"][0]["what"] == "chat_template.jinja is not the template of the prompt contract"
    write_contract(folder, template_sha256="0" * 64)
    assert look(folder)["findings"][0]["what"] == "the contract's template does not have its own hash"
    write_contract(folder, stop_tokens=5, golden=7)
    assert look(folder)["contract"]["stop_tokens"] == []


def test_run_folder(tmp_path: Path) -> None:
    adapter = save(tmp_path / "run" / "adapter")
    sha256 = adapter_sha256(adapter)
    record = {"name": "mine", "status": "completed", "steps": 3, "adapter_sha256": sha256}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    for path in (tmp_path / "run", adapter):
        result = look(path)
        assert said(result) == []
        assert (result["run"]["name"], result["run"]["steps"]) == ("mine", 3)
    rewrite(adapter, lambda tensors: {name: tensor * 2 for name, tensor in tensors.items()})
    ((severity, what),) = said(look(tmp_path / "run"))
    assert severity == "problem"
    assert what == f"the weights are not those that the run recorded ({sha256[:12]}...)"
    copy = shutil.copytree(adapter, tmp_path / "copy")
    assert look(copy)["run"] is None


def test_folders_without_an_adapter(tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises((ModelError, RunFolderError)) as caught:
            inspect_adapter(path)
        problem = caught.value.problems[0]
        return f"{problem.what}; {problem.fix}"

    assert "no such folder" in refusal(tmp_path / "gone")
    (tmp_path / "file").write_text("")
    assert "not a folder" in refusal(tmp_path / "file")
    assert "no adapter_config.json" in refusal(tmp_path)
    assert "this is a base model" in refusal(tiny.save_base(tmp_path / "base"))
    folder = save(tmp_path / "adapter")
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    assert "as safetensors" in refusal(folder)
    (folder / WEIGHTS_FILE).write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    assert "cannot read the adapter's weights" in refusal(folder)
    (folder / CONFIG_FILE).write_text("[]")
    assert "cannot read adapter_config.json" in refusal(folder)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"status": "interrupted"}')
    assert "the run has no adapter (status: interrupted)" in refusal(tmp_path / "run")


def test_adapter_of_another_tool(tmp_path: Path) -> None:
    """Names without PEFT's prefix and ending, as the first LoRA code wrote them."""
    folder = save(tmp_path)
    rewrite(
        folder,
        lambda tensors: {n.removeprefix("base_model.model.").removesuffix(".weight"): t for n, t in tensors.items()},
    )
    result = look(folder)
    assert said(result) == []
    assert kind(result, "q_proj")["count"] == 2
