"""Where an adapter sits, from a setting to a saved folder: layouts, plain PEFT, bases in few bits, resumes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import loralab
from loralab.config.schema import LoraConfig
from loralab.errors import ConfigError, ModelError
from loralab.layout.planner import Planner
from loralab.models.adapters import WEIGHTS_FILE, build_adapter, load_adapter
from loralab.models.supervised import SupervisedPeftModel
from loralab.workflows.session import find_target
from support import quantized, tiny
from support.families import SPREAD
from support.fusing import unfused
from support.layouts import (
    ALWAYS_SHARE,
    largest_difference,
    loss_and_gradients,
    sharing_rows,
    transformers_loss_and_gradients,
)

ALL = 1_000_000
VOCABULARY = 97
IDS = torch.arange(3, 12)[None]
PLANNERS = {
    "padded": Planner(ALL, layout="padded"),
    "padded, one row at a time": Planner(1, layout="padded"),
    "packed, 90 tokens": Planner(90, layout="packed"),
    "shared": Planner(ALL, cost=ALWAYS_SHARE),
    "shared, 50 tokens": Planner(50, cost=ALWAYS_SHARE),
}
# Llama's head is a matrix of its own, Qwen2's and GPT-2's is the embedding.
CASES: list[tuple[tiny.Family, dict[str, Any]]] = [
    ("llama", {"modules_to_save": ["norm"]}),
    ("llama", {"modules_to_save": ["lm_head", "input_layernorm"]}),
    ("llama", {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]}),
    ("llama", {"trainable_token_indices": [5, 3]}),
    ("llama", {"layers_to_transform": [-1], "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"mlp.*": 3.0}}),
    ("qwen2", {"modules_to_save": ["lm_head", "norm"]}),
    ("qwen2", {"modules_to_save": ["embed_tokens"], "layers_to_transform": [0]}),
    ("qwen2", {"trainable_token_indices": [5, 3], "modules_to_save": ["k_proj"]}),
    ("gpt2", {"modules_to_save": ["ln_f", "wpe"]}),
    ("gpt2", {"trainable_token_indices": [3, 7], "target_modules": r".*\.1\.mlp\.c_(fc|proj)"}),
    ("gpt2", {"modules_to_save": ["attn.c_proj"], "alpha_pattern": {"c_fc": 2.0}, "layers_to_transform": [-2]}),
]
each_case = pytest.mark.parametrize(("family", "lora"), CASES, ids=[f"{family}-{lora}" for family, lora in CASES])


def draw(model: SupervisedPeftModel, *, seed: int) -> None:
    """Move every trained number: what is trained whole stays near what it was."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += torch.randn(weight.shape, generator=generator) * SPREAD


def build(base: Any, lora: dict[str, Any], *, checkpointing: bool = False) -> SupervisedPeftModel:
    if checkpointing:
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    model, _ = build_adapter(base, LoraConfig(**{"r": 4, **lora}), seed=0)
    draw(model, seed=1)
    model.tree_kernel = "per_tree"
    return model


def base_of(family: tiny.Family, dtype: torch.dtype = torch.float32) -> Any:
    base: Any = tiny.build_model(family, vocabulary=VOCABULARY)
    return without_dropout(base.to(dtype).eval().requires_grad_(False))


def without_dropout(base: Any) -> Any:
    """Switch dropout inside a base off, as loading one does."""
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return base


@each_case
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_every_layout_gives_transformers_own_loss_and_gradients(
    family: tiny.Family, lora: dict[str, Any], checkpointing: bool
) -> None:
    model = build(base_of(family), lora, checkpointing=checkpointing)
    rows = sharing_rows(0, vocabulary=VOCABULARY)
    expected, expected_gradients = transformers_loss_and_gradients(model, rows)
    assert expected_gradients.keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}
    for name, planner in PLANNERS.items():
        loss, gradients, _ = loss_and_gradients(model, planner, rows)
        assert loss == pytest.approx(expected, rel=1e-5), name
        assert largest_difference(gradients, expected_gradients) <= 1e-5, name


def check_saved(model: SupervisedPeftModel, folder: Path, base: Callable[[], Any]) -> None:
    """Check that plain PEFT and our own loading give the model's logits, and that it is more than its base."""
    model.eval()
    with torch.no_grad():
        fused = model(input_ids=IDS).logits
        model.save_pretrained(folder)
        assert torch.equal(load_adapter(base(), folder)(input_ids=IDS).logits, fused)
        # PEFT's own forward rounds elsewhere; to the bit it is that of our model without the fused one.
        own = unfused(model)(input_ids=IDS).logits
        assert torch.equal(PeftModel.from_pretrained(base(), str(folder)).eval()(input_ids=IDS).logits, own)
        tolerance = 1e-5 if own.dtype == torch.float32 else 0.03
        assert (fused - own).abs().mean() < tolerance * own.std()
        plain = base()(input_ids=IDS).logits
        assert not torch.allclose(own, plain, atol=1e-2)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, plain)


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_plain_peft_gives_the_same_logits(
    family: tiny.Family, lora: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = build(base_of(family, dtype), lora)
    check_saved(model, tmp_path, lambda: base_of(family, dtype))
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS_FILE).values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize(
    ("shape", "lora"),
    [
        ("llama", {"modules_to_save": ["lm_head", "norm"], "layers_to_transform": [-1]}),
        ("qwen2, with bias", {"modules_to_save": ["embed_tokens"], "rank_pattern": {"q_proj": 2}}),
        ("gpt2", {"modules_to_save": ["ln_f"], "trainable_token_indices": [3, 5]}),
    ],
)
def test_on_a_quantized_base(tmp_path: Path, shape: str, kind: str, lora: dict[str, Any]) -> None:
    folder = quantized.save_base(tmp_path / "base", shape)

    def base() -> Any:
        return quantized.load(folder, **quantized.KINDS[kind])

    model = build(base(), lora)
    twin = build(without_dropout(quantized.plain_twin(folder, model)), lora)
    rows = sharing_rows(0, vocabulary=VOCABULARY)
    expected, expected_gradients = transformers_loss_and_gradients(twin, rows)
    for name, planner in PLANNERS.items():
        loss, gradients, _ = loss_and_gradients(model, planner, rows)
        assert loss == pytest.approx(expected, rel=1e-5), name
        assert largest_difference(gradients, expected_gradients) <= 3e-5, name  # another product, another order of sums
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        own = model(input_ids=IDS).logits
        assert torch.equal(load_adapter(base(), tmp_path / "adapter")(input_ids=IDS).logits, own)
        plain = PeftModel.from_pretrained(quantized.plain_twin(folder, base()), str(tmp_path / "adapter")).eval()
        torch.testing.assert_close(plain(input_ids=IDS).logits, own, rtol=1e-4, atol=1e-4)


def test_a_layer_of_a_quantized_base_is_not_trained_whole(tmp_path: Path) -> None:
    base = quantized.load(quantized.save_base(tmp_path, "llama"), quantization="nf4")
    with pytest.raises(ConfigError, match="layer 'down_proj' is quantized"):
        build(base, {"modules_to_save": ["down_proj"]})


# --- whole runs --------------------------------------------------------------------------------------------------

WHOLE = {"training": {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None}}


def world(folder: Path, family: tiny.Family) -> tuple[Path, Path]:
    return tiny.save_base(folder / "base", family), tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(16))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("llama", {"modules_to_save": ["norm", "lm_head"], "trainable_token_indices": ["<|end|>", " cat", 40]}),
        ("qwen2", {"modules_to_save": ["lm_head"], "layers_to_transform": [-1], "rank_pattern": {"q_proj": 2}}),
        ("gpt2", {"modules_to_save": ["ln_f"], "trainable_token_indices": [" dog"]}),
    ],
)
def test_a_killed_run_resumes_to_the_same_adapter(
    family: tiny.Family, lora: dict[str, Any], precision: str, tmp_path: Path
) -> None:
    base, rows = world(tmp_path, family)
    model, weight_decay = {"precision": precision}, {"training": {**WHOLE["training"], "weight_decay": 0.1}}
    config = tiny.run_config(base, rows, tmp_path / "whole", model=model, lora=lora, **weight_decay)
    whole = loralab.train(config)
    assert whole.record["steps"] == 8
    cut = Path(shutil.copytree(whole.path, tmp_path / "cut"))
    for step in (4, 6, 8):  # the check of the first steps had not ended
        shutil.rmtree(cut / "checkpoints" / f"checkpoint-{step}")
    shutil.rmtree(cut / "adapter")
    (cut / "run.json").write_text(json.dumps(whole.record | {"status": "running"}))
    config["output"]["dir"] = str(cut)
    resumed = loralab.train(config, resume=True)
    assert resumed.record["adapter_sha256"] == whole.record["adapter_sha256"]
    losses = [line["loss"] for line in whole.metrics if "loss" in line]
    assert [line["loss"] for line in resumed.metrics if "loss" in line] == losses
    assert losses[-1] < losses[0]
    check_run(whole, base, precision)


def check_run(run: loralab.Run, base: Path, precision: str) -> None:
    """Check that a finished run's adapter is read by plain PEFT as by us, and that all of it was trained."""

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, precision)).eval()

    folder = find_target(run.path).adapter
    plain, own = PeftModel.from_pretrained(load(), str(folder)).eval(), load_adapter(load(), folder)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=IDS).logits, unfused(own)(input_ids=IDS).logits)
    originals = dict(load().named_parameters(remove_duplicate=False))
    for name, tensor in load_file(folder / WEIGHTS_FILE).items():
        original = originals.get(name.removeprefix("base_model.model."))
        if original is not None:
            assert not torch.equal(tensor, original.float()), name


def test_a_run_says_where_its_adapter_sits(tmp_path: Path) -> None:
    base, rows = world(tmp_path, "qwen2")
    lora = {"layers_to_transform": [-1], "modules_to_save": ["lm_head"]}
    run = loralab.train(
        tiny.run_config(
            base, rows, tmp_path / "run", model={"precision": "bfloat16"}, lora=lora, training={"max_steps": 1}
        )
    )
    resolved = run.record["resolved"]
    assert resolved["layers_to_transform"]["value"] == "1"
    assert "of 2 layers: 7 linear layers get an adapter" in resolved["layers_to_transform"]["reason"]
    assert resolved["modules_to_save"]["value"] == "model.embed_tokens"
    assert resolved["modules_to_save"]["reason"] == (
        "trained whole in float32, rounded to bfloat16 for products; embedding and head are one matrix and stay one"
    )


# --- from another adapter ----------------------------------------------------------------------------------------

PLACED: dict[str, Any] = {
    "layers_to_transform": [-1],
    "target_modules": ["q_proj", "up_proj"],
    "rank_pattern": {"q_proj": 2},
    "modules_to_save": ["norm"],
    "trainable_token_indices": [5, 7],
}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, loralab.Run]:
    """A base, its rows and a run with every setting; read only."""
    folder = tmp_path_factory.mktemp("first")
    base, rows = world(folder, "llama")
    return base, rows, loralab.train(tiny.run_config(base, rows, folder / "run", lora=PLACED))


def test_a_warm_start_brings_all_of_it(first: tuple[Path, Path, loralab.Run], tmp_path: Path) -> None:
    base, rows, source = first
    # So small a rate that nothing moves: what is saved is what came over.
    # One place may be named in several ways.
    lora = {**PLACED, "target_modules": r".*(q|up)_proj"}
    config = tiny.run_config(base, rows, tmp_path / "run", lora=lora, training={"learning_rate": 1e-30, "max_steps": 1})
    run = loralab.train(config, warm_start=source.path)
    assert run.record["adapter_sha256"] == source.record["adapter_sha256"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers_to_transform": [0]}, ["lora.layers_to_transform is [1] there, [0] here"]),
        ({"target_modules": ["q_proj"]}, ["lora.target_modules is ['q_proj', 'up_proj'] there, ['q_proj'] here"]),
        ({"rank_pattern": {"q_proj": 3}}, ["lora.rank_pattern is {'q_proj': 2} there, {'q_proj': 3} here"]),
        ({"modules_to_save": None}, ["lora.modules_to_save is ['model.norm'] there, None here"]),
        ({"trainable_token_indices": [7, 5]}, ["lora.trainable_token_indices is [5, 7] there, [7, 5] here"]),
        (
            {"trainable_token_indices": None, "modules_to_save": ["lm_head"], "target_modules": ["k_proj"]},
            [
                "lora.target_modules is ['q_proj', 'up_proj'] there, ['k_proj'] here",
                "lora.modules_to_save is ['model.norm'] there, ['lm_head'] here",
                "lora.trainable_token_indices is [5, 7] there, None here",
            ],
        ),
    ],
)
def test_a_warm_start_from_another_placement_names_all_differences(
    first: tuple[Path, Path, loralab.Run], tmp_path: Path, change: dict[str, Any], said: list[str]
) -> None:
    base, rows, source = first
    if "target_modules" in change and change["target_modules"] == ["k_proj"]:
        change = {**change, "rank_pattern": None}
    config = tiny.run_config(base, rows, tmp_path / "run", lora={**PLACED, **change})
    with pytest.raises(ModelError) as caught:
        loralab.train(config, warm_start=source.path)
    for words in said:
        assert words in caught.value.problems[0].what
