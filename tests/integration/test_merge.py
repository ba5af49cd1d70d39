"""A merged model answers as the live adapter: families, quantizations, variants, trained layers, pictures, sums."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, BitsAndBytesConfig

import loralab
from loralab.config.schema import LoraConfig, ModelConfig
from loralab.models.adapters import build_adapter
from loralab.models.load import load_base_model
from loralab.models.variants import VARIANTS, residual_rank
from loralab.progress import Reporter
from loralab.workflows import merge_weights
from loralab.workflows.merge import MergeRequest, merge
from support import tiny
from support.quantized import load as load_quantized
from support.quantized import plain_twin
from support.reporters import Notes
from support.tiny_vision import save_vision_base, vqa_rows

FAMILIES: tuple[tiny.Family, ...] = ("llama", "gpt2", "qwen2")
SHARD = "60KB"
IDS = torch.arange(3, 24)[None]
# Variants that differ in training alone: what they leave is merged as "lora" is.
PLAIN_FILES = ("rslora", "lora_plus", "pissa", "olora", "eva")
Train = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots, and the collector's walk over all that tests have loaded, take more time than everything else here."""
    monkeypatch.setattr("loralab.workflows.train.build_report", lambda _: None)
    monkeypatch.setattr("loralab.workflows.merge.release_models", lambda: None)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base of each family: in several shards but for GPT-2's."""
    found = {}
    for family in FAMILIES:
        folder = tiny.save_base(tmp_path_factory.mktemp(family), family)
        if family != "gpt2":
            model = AutoModelForCausalLM.from_pretrained(folder)
            (folder / "model.safetensors").unlink()
            model.save_pretrained(folder, max_shard_size=SHARD)
        (folder / "LICENSE.txt").write_text("do as you like")
        found[family] = folder
    return found


@pytest.fixture(scope="module")
def trained(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the Qwen2 base, with validation rows; merges read it."""
    folder = tmp_path_factory.mktemp("trained")
    patch = pytest.MonkeyPatch()
    patch.setattr("loralab.workflows.train.build_report", lambda _: None)
    rows = tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(12))
    sections = {"data": {"validation": 4}, "training": {"max_steps": 2}, "evaluation": {"split": "train"}}
    run = loralab.train(tiny.run_config(bases["qwen2"], rows, folder / "run", **sections)).path
    patch.undo()
    return run


@pytest.fixture
def train(bases: dict[str, Path], tmp_path: Path) -> Train:
    def run(family: str, name: str = "run", **sections: dict[str, Any]) -> Path:
        rows = tmp_path / "rows.json"
        if not rows.exists():
            tiny.write_rows(rows, tiny.alpaca_rows(12))
        merged: dict[str, dict[str, Any]] = {
            "data": {"validation": 4},
            "training": {"max_steps": 2},
            "evaluation": {"split": "train"},
        }
        for section, values in sections.items():
            merged[section] = merged.get(section, {}) | values
        return loralab.train(tiny.run_config(bases[family], rows, tmp_path / name, **merged)).path

    return run


def merged_of(path: Path, output: Path, **request: Any) -> dict[str, Any]:
    return merge(path, MergeRequest(output, **request), reporter=Reporter())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found.float()


def peft_logits(base: Any, run: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(base, run / "adapter"))


def assert_equal(merged: Path, expected: torch.Tensor) -> None:
    """Hold a merged folder, as plain transformers loads it, against logits."""
    found = logits(AutoModelForCausalLM.from_pretrained(merged))
    assert (found - expected).abs().max() <= 1e-4 * expected.std()


@pytest.mark.parametrize(
    ("family", "held"),
    [
        *((family, "none") for family in FAMILIES),
        ("gpt2", "nf4"),
        ("gpt2", "int8"),
        *(pytest.param(family, "nf4", marks=pytest.mark.slow) for family in ("llama", "qwen2")),
    ],
)
def test_a_merge_is_the_adapter_in_plain_transformers(
    bases: dict[str, Path], tmp_path: Path, family: str, held: str
) -> None:
    adapter, output = moved_adapter(bases[family], tmp_path, "lora", held), tmp_path / "merged"
    content = merged_of(adapter, output)
    assert content["verdict"] == "held"
    assert content["compared_on"] == "built-in texts"
    assert content["proof"]["kl_adapter_base"] > 1e-4  # the adapter does something
    assert content["proof"]["kl_trained_merged"] is None
    if held == "none":
        expected = peft_logits(AutoModelForCausalLM.from_pretrained(bases[family]), tmp_path)
    else:
        twin = plain_twin(bases[family], load_quantized(bases[family], quantization=held))
        expected = peft_logits(twin, tmp_path)
    assert_equal(output, expected)
    assert ("dequantized" in content["onto"]) == (held != "none")
    said = "the adapter does not say what it was trained on" if held == "none" else "the adapter was trained on them"
    assert content["onto_reason"].startswith(said)
    assert said in (output / "README.md").read_text()
    config = json.loads((output / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == content["dtype"] == "float32"


def test_a_merged_folder_is_whole(bases: dict[str, Path], trained: Path, tmp_path: Path) -> None:
    run, output = trained, tmp_path / "merged"
    content = merged_of(run, output)
    assert content["compared_on"] == "validation split"
    assert json.loads((output / "merge.json").read_text())["adapters"] == content["adapters"]
    own = json.loads((run / "run.json").read_text())
    assert content["adapters"][0]["sha256"] == own["adapter_sha256"]
    assert content["base"]["sha256"] == own["model"]["sha256"]
    card = (output / "README.md").read_text()
    measured = json.loads((run / "evaluation.json").read_text())
    assert content["measured"]["figures"]["loss"]["adapter"] == measured["eval_loss"]
    assert f"| `loss` | {measured['base']['eval_loss']:.4g} | {measured['eval_loss']:.4g} |" in card
    assert f"It is `{content['template']}`." in card
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(compile(program.replace("path/to/this/model", str(output)), "program", "exec"), {})
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    theirs = json.loads((bases["qwen2"] / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == theirs  # one shard for each of the base's, the same tensors in it
    assert len(content["shards"]) == len(set(theirs.values())) > 1
    assert (output / "LICENSE.txt").read_text() == "do as you like"
    adapter = run / "adapter"
    for name in ("prompt_contract.json", "generation_config.json"):
        assert json.loads((output / name).read_text()) == json.loads((adapter / name).read_text())
    assert AutoTokenizer.from_pretrained(output).chat_template == AutoTokenizer.from_pretrained(adapter).chat_template
    card = (output / "README.md").read_text()
    assert content["adapters"][0]["sha256"][:12] in card
    assert str(tmp_path) not in card
    assert str(tmp_path) not in json.dumps(content)
    assert [path.name for path in tmp_path.iterdir() if "merging" in path.name] == []
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape[1] > IDS.shape[1]


def test_a_merged_model_is_the_base_of_a_new_run(trained: Path, train: Train, tmp_path: Path) -> None:
    merged_of(trained, tmp_path / "merged")
    again = train("qwen2", "again", model={"name": str(tmp_path / "merged")})
    before, after = (json.loads((run / "evaluation.json").read_text()) for run in (trained, again))
    assert after["base"]["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-6)
    content = merged_of(again, tmp_path / "twice")
    assert content["verdict"] == "held"


@pytest.mark.parametrize(
    "variant", [pytest.param(each, marks=pytest.mark.slow) if each in PLAIN_FILES else each for each in VARIANTS]
)
def test_every_variant_merges(bases: dict[str, Path], tmp_path: Path, variant: str) -> None:
    """From an adapter folder alone, whose weights were moved from where the variant starts."""
    quantization = "nf4" if variant == "loftq" else "none"
    content = merged_of(moved_adapter(bases["llama"], tmp_path, variant, quantization), tmp_path / "merged")
    assert content["proof"]["kl_adapter_base"] > 1e-6
    assert content["way"] == "shard by shard"
    if variant != "loftq":
        base = AutoModelForCausalLM.from_pretrained(bases["llama"])
        assert_equal(tmp_path / "merged", logits(PeftModel.from_pretrained(base, tmp_path / "adapter")))


def moved_adapter(base: Path, folder: Path, variant: str, quantization: str, *, seed: int = 1, **fields: Any) -> Path:
    lora = LoraConfig(variant=variant)  # type: ignore[arg-type]
    loaded, _ = load_base_model(
        ModelConfig(name=str(base), quantization=quantization),  # type: ignore[arg-type]
        dtype=torch.float32,
        device=torch.device("cpu"),
        residual_rank=residual_rank(lora),
    )
    lora = lora.model_copy(update=fields)
    rows = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "position_ids": torch.arange(IDS.shape[1])[None]}
    model, _ = build_adapter(loaded, lora, seed=3, batches=[rows])
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(str(folder / "adapter"))
    if quantization != "none":
        facts = {"quantization": quantization, "double_quantization": True, "precision": "float32"}
        (folder / "adapter" / "adapter_facts.json").write_text(json.dumps(facts))
    return folder / "adapter"


@pytest.mark.parametrize("variant", ["vera", "ia3"])
def test_conv1d_of_a_quantized_base_merges(bases: dict[str, Path], tmp_path: Path, variant: str) -> None:
    """A quantized layer holds its weight as nn.Linear does, and the file that the merge goes into does not."""
    content = merged_of(moved_adapter(bases["gpt2"], tmp_path, variant, "nf4"), tmp_path / "merged")
    assert content["proof"]["kl_adapter_base"] > 1e-6


def test_half_precision_holds_its_own_bars(train: Train, tmp_path: Path) -> None:
    # Rows that it knows by heart: what it says is sure, and no tie in eight bits.
    rows = {"data": {"validation": None}, "training": {"max_steps": 60, "num_train_epochs": 30}}
    run = train("llama", **rows)
    for dtype in ("bfloat16", "float16"):
        output = tmp_path / dtype
        content = merged_of(run, output, dtype=dtype)
        assert content["compared_on"] == "train split, since the run held no rows out"
        assert set(content["proof"]["bars"]) == {"kl_adapter_merged", "greedy_agreement"}
        for file in output.glob("*.safetensors"):
            assert {str(value.dtype) for value in load_file(file).values()} == {f"torch.{dtype}"}


def test_numbers_of_another_type_than_in_training_are_told_apart(bases: dict[str, Path], tmp_path: Path) -> None:
    """Quantized from bfloat16 numbers in training, from float32 ones now: both are 4 bits, and not the same ones."""
    adapter = moved_adapter(bases["llama"], tmp_path, "lora", "nf4")
    facts = json.loads((adapter / "adapter_facts.json").read_text())
    (adapter / "adapter_facts.json").write_text(json.dumps(facts | {"precision": "bfloat16"}))
    told = Notes()
    content = merge(adapter, MergeRequest(tmp_path / "merged"), reporter=told)
    assert content["proof"]["kl_trained_merged"] > 1e-5 > content["proof"]["kl_adapter_merged"]
    assert content["proof"]["kl_trained_merged_reason"] == "its weights were quantized from bfloat16 numbers"
    assert "asked in float32, as the merged model is; the adapter was trained in bfloat16" in told.said
    assert "float32 (what the base's weights are stored in)" in told.said
    assert "bfloat16 (as in training)" in told.said


@pytest.mark.parametrize(("family", "saved"), [("qwen2", ("embed_tokens", "norm")), ("llama", ("lm_head", "norm"))])
def test_trained_layers_go_in(bases: dict[str, Path], tmp_path: Path, family: str, saved: tuple[str, ...]) -> None:
    adapter = moved_adapter(bases[family], tmp_path, "lora", "none", modules_to_save=saved)
    content = merged_of(adapter, tmp_path / "merged")
    assert not content["untied"]
    assert_equal(tmp_path / "merged", peft_logits(AutoModelForCausalLM.from_pretrained(bases[family]), tmp_path))


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_trained_tokens_go_in(train: Train, tmp_path: Path, family: str) -> None:
    run, output = train(family, lora={"trainable_token_indices": [3, "<|new|>"]}), tmp_path / "merged"
    assert not merged_of(run, output)["untied"]
    number = AutoTokenizer.from_pretrained(output).get_vocab()["<|new|>"]
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == number + 1
    trained = load_file(run / "adapter" / "adapter_model.safetensors")
    delta = next(value for name, value in trained.items() if "embed_tokens" in name)
    assert torch.equal(model.get_input_embeddings().weight[[3, number]], delta)


def test_an_embedding_that_peft_saved_with_the_adapter_goes_in(bases: dict[str, Path], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(bases["llama"])
    model = get_peft_model(base, PeftLoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(torch.linspace(0.5, 1.5, 32))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merged_of(tmp_path / "adapter", tmp_path / "merged")
    assert_equal(tmp_path / "merged", expected)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning")
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("qwen2", {"target_modules": ["q_proj", "lm_head"]}),
        ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}),
        ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}),
    ],
)
def test_a_head_that_comes_apart_from_its_embedding(
    bases: dict[str, Path], tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    """PEFT's own adapter on one of two layers that are one matrix."""
    base = AutoModelForCausalLM.from_pretrained(bases[family])
    model = get_peft_model(base, PeftLoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.1)
        elif "modules_to_save" in name:
            weight.data += 0.05 * torch.randn_like(weight)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    content = merged_of(tmp_path / "adapter", tmp_path / "merged")
    assert content["untied"]
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    assert content["compared_on"] == "built-in texts"
    assert_equal(tmp_path / "merged", expected)


@pytest.mark.parametrize(
    ("family", "vision"),
    [("qwen2_vl", "all"), ("llava", "none"), pytest.param("idefics3", "all", marks=pytest.mark.slow)],
)
def test_models_that_read_pictures(tmp_path: Path, family: Any, vision: str) -> None:
    rows = tiny.write_rows(tmp_path / "rows.json", vqa_rows(tmp_path, 3, questions=2))
    base = save_vision_base(tmp_path / "base", family)
    sections: dict[str, dict[str, Any]] = {
        "data": {"max_length": 256, "validation": 2},
        "training": {"max_steps": 2},
        "lora": {"vision": vision},
        "evaluation": {"split": "train"},
    }
    run = loralab.train(tiny.run_config(base, rows, tmp_path / "run", **sections)).path
    content = merged_of(run, tmp_path / "merged")
    assert content["reads_pictures"]
    assert content["way"] == "shard by shard"
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").config.model_type == family
    assert any((tmp_path / "merged" / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))


@pytest.mark.parametrize("variant", ["lora", "vera", "lokr"])
def test_several_adapters_are_summed(bases: dict[str, Path], tmp_path: Path, variant: str) -> None:
    first, second = (
        moved_adapter(bases["llama"], tmp_path / name, variant, "none", seed=seed)
        for name, seed in (("first", 1), ("second", 2))
    )
    content = merged_of(first, tmp_path / "sum", weight=0.5, others=[(second, 0.25)])
    assert [each["weight"] for each in content["adapters"]] == [0.5, 0.25]
    base, both = weights(bases["llama"]), weights(tmp_path / "sum")
    a, b = (peft_weights(bases["llama"], path) for path in (first, second))
    changed = 0
    for name, weight in base.items():
        expected = weight + 0.5 * (a[name] - weight) + 0.25 * (b[name] - weight)
        assert torch.allclose(both[name], expected, atol=1e-6)
        changed += not torch.equal(a[name], b[name])
    assert changed


def peft_weights(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    found: dict[str, torch.Tensor] = model.merge_and_unload().state_dict()
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def test_onto_the_original_says_how_far_it_is_from_what_was_trained(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = moved_adapter(bases["llama"], tmp_path, "lora", "nf4")
    facts = json.loads((adapter / "adapter_facts.json").read_text())
    (adapter / "adapter_facts.json").write_text(json.dumps(facts | {"double_quantization": False}))
    content = merged_of(adapter, tmp_path / "merged", onto="original")
    assert "original" in content["onto"]
    assert content["proof"]["kl_trained_merged"] > 1e-6 > content["proof"]["kl_adapter_merged"]
    assert_equal(tmp_path / "merged", peft_logits(AutoModelForCausalLM.from_pretrained(bases["llama"]), tmp_path))


@pytest.mark.parametrize(("family", "held"), [("llama", "nf4"), ("gpt2", "nf4"), ("gpt2", "int8")])
def test_a_base_that_is_stored_quantized(bases: dict[str, Path], tmp_path: Path, family: str, held: str) -> None:
    packed = AutoModelForCausalLM.from_pretrained(bases[family], quantization_config=packing(held), device_map="cpu")
    packed.save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(bases[family]).save_pretrained(tmp_path / "packed")
    run = moved_adapter(tmp_path / "packed", tmp_path, "lora", "none")
    content = merged_of(run, tmp_path / "merged", dtype="float32")
    assert "dequantized" in content["onto"]
    with safe_open(str(tmp_path / "merged" / "model.safetensors"), framework="pt") as tensors:
        assert not [name for name in tensors.keys() if "absmax" in name or "SCB" in name]  # noqa: SIM118
    with pytest.raises(loralab.LoralabError, match="there are no original weights"):
        merged_of(run, tmp_path / "other", onto="original")


def packing(held: str) -> Any:
    if held == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=held, bnb_4bit_use_double_quant=True)


def test_a_base_in_another_form_is_merged_as_a_whole(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = moved_adapter(bases["llama"], tmp_path, "lora", "nf4")
    monkeypatch.setattr(merge_weights.ShardWriter, "obstacle", lambda _: "its experts are fused")
    content = merged_of(run, tmp_path / "merged")
    assert (content["way"], content["way_reason"]) == ("in memory as a whole", "its experts are fused")
    assert content["verdict"] == "held"


def test_a_base_whose_tensors_have_no_prefix(tmp_path: Path) -> None:
    """As GPT-2's own are on the Hub."""
    bare = tmp_path / "bare"
    tiny.save_base(bare, "gpt2")
    tensors = load_file(bare / "model.safetensors")
    renamed = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    save_file(renamed, bare / "model.safetensors", metadata={"format": "pt"})
    run = moved_adapter(bare, tmp_path, "lora", "none")
    assert merged_of(run, tmp_path / "merged")["verdict"] == "held"
    assert set(weights(tmp_path / "merged")) == set(renamed)
