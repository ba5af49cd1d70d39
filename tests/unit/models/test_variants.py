"""Variants of adapters: how each starts, and what it is refused on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from loralab.config.lora_checks import FACTS
from loralab.config.schema import LoraConfig, ModelConfig
from loralab.errors import ConfigError, ModelError
from loralab.models.adapters import WEIGHTS_FILE, build_adapter, load_adapter
from loralab.models.factors import EXACT_WIDTH, orthogonal_factors, principal_factors
from loralab.models.first_weights import held_weight, lora_layers
from loralab.models.load import load_base_model
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.variants import VARIANTS, residual_rank
from support import quantized, tiny

VOCABULARY = 64
IDS = torch.arange(9)[None]
CPU = torch.device("cpu")
# loftq starts where quantization ended; loha and lokr have no Conv1D.
STARTING = [(variant, "llama") for variant in VARIANTS if variant != "loftq"]
STARTING += [(variant, "gpt2") for variant in VARIANTS if variant not in ("loftq", "loha", "lokr")]
INSIDE = ("pissa", "olora")


def base(family: Any = "llama") -> Any:
    return tiny.build_model(family, vocabulary=VOCABULARY).eval()


def batches() -> list[dict[str, Tensor]]:
    ids = torch.randint(0, VOCABULARY, (4, 20), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(20)[None].expand(4, -1)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}]


def build(plain: Any, *, saved: Path | None = None, **lora: Any) -> SupervisedPeftModel:
    if lora.get("variant") != "ia3":
        lora = {"r": 3} | lora
    return build_adapter(plain, LoraConfig(**lora), seed=0, batches=batches(), saved=saved)[0]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def move(model: SupervisedPeftModel) -> None:
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn(weight.shape, generator=generator)


def test_the_tables_agree() -> None:
    assert list(VARIANTS) == list(FACTS)
    assert all(variant.facts is FACTS[name] for name, variant in VARIANTS.items())


@pytest.mark.parametrize(("variant", "family"), STARTING)
def test_a_fresh_adapter_changes_nothing_and_holds_float32(variant: str, family: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        before = logits(base(family).to(dtype))
        model = build(base(family).to(dtype), variant=variant)
        after = logits(model)
        if variant in INSIDE:  # B A - B0 A0 is zero to rounding
            assert (after - before).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * before.norm()
        else:
            assert torch.equal(after, before)
        trained = {weight.dtype for weight in model.parameters() if weight.requires_grad}
        assert trained == {torch.float32}
        with model.disable_adapter():
            assert torch.equal(logits(model), before)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "loftq"])
def test_first_weights_depend_on_the_seed_alone(variant: str) -> None:
    def state(seed: int) -> dict[str, Tensor]:
        section = LoraConfig(variant=variant)  # type: ignore[arg-type]
        model, _ = build_adapter(base(), section, seed=seed, batches=batches())
        return {name: weight.clone() for name, weight in model.state_dict().items() if "base_layer" not in name}

    first = state(1)
    torch.rand(3)
    again = state(1)
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())
    drawn = variant not in (*INSIDE, "eva", "ia3")
    pairs = zip(first.values(), state(2).values(), strict=True)
    assert any(not torch.equal(weight, other) for weight, other in pairs) is drawn


@pytest.mark.parametrize(("variant", "scale"), [("lora", 8 / 4), ("rslora", 8 / 2), ("pissa", 8 / 4)])
def test_the_scale_of_the_update(variant: str, scale: float) -> None:
    model = build(base(), variant=variant, r=4, alpha=8)
    assert {layer.scaling["default"] for _, layer in lora_layers(model)} == {scale}


# --- PiSSA and OLoRA ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", INSIDE)
def test_loss_and_gradients_are_those_of_a_rewritten_base(variant: str) -> None:
    """PEFT's own form rewrites the base; ours does not, and trains the same weights by the same gradients."""
    names = ["q_proj", "down_proj"]
    own = build(base(), variant=variant, r=4, alpha=8, target_modules=names)
    config = PeftLoraConfig(r=4, lora_alpha=8, target_modules=names, init_lora_weights=variant)  # type: ignore[arg-type]
    peft = get_peft_model(base(), config)
    mine, theirs = dict(own.named_parameters()), dict(peft.named_parameters())
    trained = [name for name, weight in mine.items() if weight.requires_grad]
    assert trained == [name for name, weight in theirs.items() if weight.requires_grad]
    for model in (own, peft):
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
    for name in trained:
        assert torch.allclose(mine[name], theirs[name], atol=1e-6), name
        assert (mine[name].grad - theirs[name].grad).norm() <= 1e-4 * theirs[name].grad.norm(), name  # type: ignore[union-attr,operator]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", INSIDE)
def test_what_is_saved_is_what_was_trained_to_the_bit(variant: str, family: str, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"c_attn" if family == "gpt2" else "q_proj": 5}}
    model = build(base(family), variant=variant, **patterns)
    move(model)
    model.save_pretrained(tmp_path)
    peft = PeftModel.from_pretrained(base(family), str(tmp_path))
    assert torch.equal(logits(peft), logits(model))
    assert {layer.r["default"] for _, layer in lora_layers(peft)} == {6, 10}
    assert peft.peft_config["default"].init_lora_weights is True


@pytest.mark.parametrize("variant", INSIDE)
def test_saved_weights_take_the_place_of_first_ones(variant: str, tmp_path: Path) -> None:
    model = build(base(), variant=variant)
    move(model)
    model.save_pretrained(tmp_path)
    again = build(base(), variant=variant, saved=tmp_path)
    again.load_adapter(str(tmp_path), "default", is_trainable=True)
    old, new = dict(model.named_parameters()), dict(again.named_parameters())
    assert all(torch.equal(weight, new[name]) for name, weight in old.items())
    assert torch.equal(logits(again), logits(model))
    halves = {name: buffer for name, buffer in model.named_buffers() if name.endswith("fixed")}
    assert halves
    assert all(torch.equal(buffer, dict(again.named_buffers())[name]) for name, buffer in halves.items())


def test_a_rank_above_a_layers_width_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"r 17 is more than layer 'model.layers.0.self_attn.k_proj' has components"):
        build(base(), variant="pissa", r=17)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (EXACT_WIDTH + 8, EXACT_WIDTH + 16)])
def test_principal_factors_are_the_best_of_their_rank(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(shape[0], 12, generator=generator), torch.randn(12, shape[1], generator=generator)
    matrix = left * torch.logspace(0, -2, 12) @ right + 1e-3 * torch.randn(shape, generator=generator)
    first, second = principal_factors(matrix, 4)
    assert (first.shape, second.shape) == ((4, shape[1]), (shape[0], 4))
    best = torch.linalg.svdvals(matrix)[4:].norm()
    assert (matrix - second @ first).norm() <= 1.001 * best
    assert torch.allclose(first.norm(dim=1), second.norm(dim=0), rtol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(principal_factors(matrix, 4), (first, second), strict=True))


def test_orthogonal_factors() -> None:
    matrix = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    first, second = orthogonal_factors(matrix, 12)
    assert torch.allclose(second @ first, matrix, atol=1e-5)
    assert torch.allclose(second.T @ second, torch.eye(12), atol=1e-5)
    assert torch.equal(orthogonal_factors(matrix, 3)[1], second[:, :3])


# --- LoftQ -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized.save_base(tmp_path_factory.mktemp("base"), "llama, widths 44 and 172")


def load(folder: Path, held: Any, **settings: Any) -> Any:
    return load_base_model(
        ModelConfig(name=str(folder), quantization=held), dtype=torch.float32, device=CPU, **settings
    )[0]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_loftq_starts_at_the_best_repair_of_what_quantization_changed(folder: Path, kind: str) -> None:
    section = LoraConfig(variant="loftq", r=4, alpha=6, rank_pattern={"q_proj": 7})
    original, held = load(folder, "none"), load(folder, kind, residual_rank=residual_rank(section))
    model, chosen = build_adapter(held, section, seed=0)
    for name, layer in lora_layers(model):
        rank = 7 if name.endswith("q_proj") else 4
        changed = original.get_submodule(name).weight - held_weight(layer)
        update = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        left = float((changed - update).detach().norm())
        assert layer.r["default"] == rank
        assert left == pytest.approx(float(torch.linalg.svdvals(changed)[rank:].norm()), rel=1e-3)
        assert layer.get_base_layer().residual is None  # its memory is free again
    assert chosen["first_weights"].value == "the leading part of what quantization changed, in 14 layers"


def test_loftq_needs_layers_that_were_quantized(folder: Path) -> None:
    with pytest.raises(ModelError, match="none of the adapted layers was quantized"):
        build_adapter(load(folder, "nf4"), LoraConfig(variant="loftq"), seed=0)


def test_loftq_on_weights_that_are_stored_quantized(folder: Path, tmp_path: Path) -> None:
    stored = tmp_path / "stored"
    load(folder, "nf4").save_pretrained(stored)
    with pytest.raises(ModelError, match="what quantization changed is not known") as caught:
        load(stored, "none", residual_rank=4)
    assert "model.quantization: nf4" in caught.value.problems[0].fix


# --- DoRA --------------------------------------------------------------------------------------------------------


def test_dora_is_refused_where_the_librarys_dequantization_is_wrong(tmp_path: Path) -> None:
    plain = quantized.save_base(tmp_path / "base", "llama")
    with pytest.raises(ModelError, match="weights wrongly on cpu, and PEFT's DoRA relies on that") as caught:
        build_adapter(load(plain, "nf4"), LoraConfig(variant="dora"), seed=0)
    assert "int8" in caught.value.problems[0].fix
    model, _ = build_adapter(load(plain, "int8"), LoraConfig(variant="dora"), seed=0)
    model.save_pretrained(tmp_path / "adapter")
    load_adapter(load(plain, "int8"), tmp_path / "adapter")
    with pytest.raises(ModelError, match="weights wrongly on cpu"):
        load_adapter(load(plain, "nf4"), tmp_path / "adapter")


# --- EVA ---------------------------------------------------------------------------------------------------------


def test_eva_deals_out_ranks_by_explained_variance(tmp_path: Path) -> None:
    model = build(base(), variant="eva", r=4)
    ranks = {name: layer.r["default"] for name, layer in lora_layers(model)}
    assert sum(ranks.values()) == 4 * 14
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 8
    assert {layer.scaling["default"] for _, layer in lora_layers(model)} == {16 / 4}
    for _, layer in lora_layers(model):  # directions are orthonormal
        rows = layer.lora_A["default"].weight
        assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-4)
    even = build(base(), variant="eva", r=4, eva_rho=1)
    assert {layer.r["default"] for _, layer in lora_layers(even)} == {4}
    model.save_pretrained(tmp_path)
    again, chosen = build_adapter(base(), LoraConfig(variant="eva", r=4), seed=0, saved=tmp_path)
    assert {name: layer.r["default"] for name, layer in lora_layers(again)} == ranks
    assert chosen["first_weights"].value == "from the saved adapter"


def test_eva_needs_more_tokens_than_directions() -> None:
    with pytest.raises(ConfigError, match="r 50 times eva_rho 2 is 100 directions, from rows of 80 tokens in all"):
        build(base(), variant="eva", r=50)


# --- VeRA, LoHa, LoKr, IA3 ---------------------------------------------------------------------------------------


def test_veras_projections_are_saved(tmp_path: Path) -> None:
    model = build(base(), variant="vera")
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / WEIGHTS_FILE))
    assert {"base_model.vera_A", "base_model.vera_B"} <= names


@pytest.mark.parametrize("variant", ["loha", "lokr"])
def test_conv1d_is_refused_where_peft_has_none(variant: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="GPT2LMHeadModel, whose layers are Conv1D") as caught:
        build(base("gpt2"), variant=variant)
    assert "lora, rslora, dora" in caught.value.problems[0].fix
    held = load(quantized.save_base(tmp_path, "gpt2"), "int8")  # its layers are nn.Linear, the original's are not
    with pytest.raises(ConfigError, match="whose layers are Conv1D"):
        build(held, variant=variant)


@pytest.mark.parametrize("variant", ["loha", "lokr"])
def test_weights_that_are_stored_in_4_bits_are_refused(folder: Path, variant: str) -> None:
    with pytest.raises(ConfigError, match=f"variant {variant} on weights in nf4: PEFT shapes the update"):
        build(load(folder, "nf4"), variant=variant)


@pytest.mark.parametrize(("family", "inputs"), [("llama", 2), ("gpt2", 2)])
def test_ia3_scales_inputs_of_feed_forward_outputs(family: str, inputs: int) -> None:
    _, chosen = build_adapter(base(family), LoraConfig(variant="ia3"), seed=0)
    layers = {"llama": 14, "gpt2": 8}[family]
    assert chosen["first_weights"].reason.endswith(f"({inputs} and {layers - inputs} layers)")


@pytest.mark.parametrize("kind", ["fp4", "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_quantizations(folder: Path, variant: str, kind: str, tmp_path: Path) -> None:
    """Those that the integration matrix leaves out: trained, saved, and loaded in plain PEFT."""
    if kind not in FACTS[variant].quantizations or (variant, kind) == ("dora", "fp4"):
        return  # refused by the configuration; dora by the width of this base
    section = LoraConfig(variant=variant)  # type: ignore[arg-type]
    held = load(folder, kind, residual_rank=residual_rank(section))
    model, _ = build_adapter(held, section, seed=0, batches=batches())
    move(model)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(bool(weight.grad.any()) for weight in model.parameters() if weight.requires_grad)  # type: ignore[union-attr]
    model.save_pretrained(tmp_path)
    peft = PeftModel.from_pretrained(load(folder, kind), str(tmp_path))
    assert (logits(peft) - logits(model)).norm() <= 1e-5 * logits(model).norm()
