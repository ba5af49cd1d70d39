"""Families of models that read pictures: their parts, who is refused, and where adapters sit."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, LlamaConfig

from loralab.config.schema import LoraConfig
from loralab.errors import ConfigError, ModelError
from loralab.models import vision
from loralab.models.adapters import build_adapter
from loralab.models.targets import adapted_layers, linear_layers, resolve_target_modules
from loralab.models.vision import (
    auto_class,
    check_reads_pictures,
    is_projector_layer,
    is_unread_layer,
    is_vision_layer,
    load_processor,
    position_axes,
    vision_family,
    vision_modules,
)
from support import tiny
from support.tiny_vision import VISION_FAMILIES, build_vision_model, save_vision_base

# Part of the names of layers in the tower, in the projector, and of layers that nothing is read from.
PARTS = {
    "qwen2_vl": ("visual.blocks.", "visual.merger.", None),
    "qwen2_5_vl": ("visual.blocks.", "visual.merger.", None),
    "llava": ("vision_tower.", "multi_modal_projector.", "vision_tower.encoder.layers.1."),
    "idefics3": ("vision_model.", "connector.", None),
}


@pytest.fixture(scope="module")
def bases() -> dict[str, Any]:
    return {family: build_vision_model(family)[0] for family in VISION_FAMILIES}


def meant(base: Any, family: str, setting: str) -> set[str]:
    """Return the layers that `lora.vision` means, told by names alone."""
    tower, projector, unread = PARTS[family]
    found = set()
    for name in linear_layers(base):
        if unread is not None and unread in name:
            continue
        kind = "projector" if projector in name else "tower" if tower in name else "text"
        if kind == "text" or setting == "all" or (kind, setting) == ("projector", "projector"):
            found.add(name)
    return found


def chosen(base: Any, **lora: Any) -> set[str]:
    config = LoraConfig(**lora)
    return set(adapted_layers(config, base, resolve_target_modules(base, config).value))


@pytest.mark.parametrize("setting", ["none", "projector", "all"])
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_targets_of_pictures_are_what_was_asked_for(bases: dict[str, Any], family: str, setting: str) -> None:
    base = bases[family]
    assert chosen(base, vision=setting) == meant(base, family, setting)
    said = resolve_target_modules(base, LoraConfig(vision=setting)).reason
    assert said.endswith(f"(lora.vision: {setting})")


@pytest.mark.parametrize("setting", ["none", "all"])
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_names_that_stand_in_the_tower_too_mean_what_is_in_reach(
    bases: dict[str, Any], family: str, setting: str
) -> None:
    """Without pictures' layers, `q_proj` and `down_proj` are those of the language model alone."""
    base, names = bases[family], ["k_proj", "down_proj"]
    found = chosen(base, target_modules=names, vision=setting) if both(base, family) or setting == "none" else None
    wanted = {name for name in meant(base, family, setting) if name.rpartition(".")[2] in names}
    assert found in (wanted, None)
    assert len({name for name in wanted if "language_model" in name or "text_model" in name}) == 4


def both(base: Any, family: str) -> bool:
    """Return whether layers that read pictures have such a name too."""
    return any(
        name.rpartition(".")[2] in ("k_proj", "down_proj")
        for name in meant(base, family, "all")
        if PARTS[family][0] in name
    )


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_the_adapter_sits_where_it_should(family: str) -> None:
    base, _ = build_vision_model(family)
    wanted = meant(base, family, "all")
    model, _ = build_adapter(base, LoraConfig(r=2, vision="all"), seed=0)
    found = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert {name.removeprefix("base_model.model.") for name in found} == wanted


def test_layers_of_pictures_that_are_not_asked_for_are_no_targets(bases: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no linear layer is named 'qkv'"):
        chosen(bases["qwen2_vl"], target_modules=["qkv"])
    assert all("visual" in name for name in chosen(bases["qwen2_vl"], target_modules=["qkv"], vision="all"))
    with pytest.raises(ConfigError, match="no linear layer's whole name matches"):
        chosen(bases["qwen2_vl"], target_modules=r"model\.visual\..*")


@pytest.mark.parametrize(
    ("lora", "cause"),
    [
        ({"vision": "all", "layers_to_transform": [0]}, "lora.layers_to_transform"),
        ({"vision": "all", "target_modules": ["o_proj"]}, "lora.target_modules"),
        ({"vision": "projector", "target_modules": "attention"}, "lora.target_modules"),
    ],
)
def test_vision_that_nothing_is_left_of_is_refused(bases: dict[str, Any], lora: dict[str, Any], cause: str) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen(bases["qwen2_vl"], **lora)
    (problem,) = caught.value.problems
    assert problem.what.startswith(f"lora.vision is {lora['vision']!r}, but {cause} leaves no layer")


def test_vision_of_a_model_without_is_refused() -> None:
    base = tiny.build_model("llama", vocabulary=64)
    with pytest.raises(ConfigError, match="'llama' has no layers for pictures"):
        chosen(base, vision="projector")
    assert "read pictures" not in resolve_target_modules(base, LoraConfig()).reason


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_parts_of_a_model(bases: dict[str, Any], family: str) -> None:
    base = bases[family]
    known = vision_family(base.config)
    assert known is not None
    assert check_reads_pictures(base.config) is known
    assert auto_class(base.config) is AutoModelForImageTextToText
    assert position_axes(base.config) == (3 if "qwen" in family else 1)
    tower, projector, _ = PARTS[family]
    for name in linear_layers(base):
        assert is_vision_layer(name, known) is (tower in name or projector in name)
        assert is_projector_layer(name, known) is (projector in name)
    held = {id(p) for part in vision_modules(base, known) for p in part.parameters()}
    named = {id(p) for name, p in base.named_parameters() if tower.split(".")[0] in name or projector in name}
    assert held == named
    assert held < {id(p) for p in base.parameters()}


@pytest.mark.parametrize(
    ("taken", "unread"),
    [(-1, []), (-2, [3]), (-3, [2, 3]), (2, [2, 3]), (0, [0, 1, 2, 3]), (4, []), ([-3, -2], [3]), (None, [])],
)
def test_layers_behind_the_one_that_is_read(taken: Any, unread: list[int]) -> None:
    config: Any = SimpleNamespace(vision_feature_layer=taken, vision_config=SimpleNamespace(num_hidden_layers=4))
    family = vision.VISION_FAMILIES["llava"]
    names = [f"model.vision_tower.encoder.layers.{n}.mlp.fc1" for n in range(4)]
    assert [n for n, name in enumerate(names) if is_unread_layer(name, config, family)] == unread
    assert not is_unread_layer("model.language_model.layers.3.mlp.up_proj", config, family)
    assert not is_unread_layer("model.multi_modal_projector.linear_1", config, family)


@pytest.mark.parametrize("kind", sorted(vision._OTHERS))
def test_a_model_that_reads_pictures_in_another_way_is_refused_with_the_reason(kind: str) -> None:
    config: Any = SimpleNamespace(model_type=kind)
    with pytest.raises(ModelError) as caught:
        check_reads_pictures(config)
    assert vision._OTHERS[kind] in caught.value.problems[0].what
    assert "qwen2_vl" in caught.value.problems[0].fix


def test_a_model_of_text_is_refused_rows_with_pictures() -> None:
    config = LlamaConfig()
    assert vision_family(config) is None
    assert auto_class(config) is AutoModelForCausalLM
    assert position_axes(config) == 1
    with pytest.raises(ModelError, match="type 'llama': it reads text alone"):
        check_reads_pictures(config)


def load(folder: Path) -> Any:
    return load_processor(str(folder), revision=None, trust_remote_code=False)


def test_a_processor_is_loaded_or_the_reason_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_vision_base(tmp_path / "base")
    assert type(load(folder)).__name__ == "Qwen2VLProcessor"
    shutil.copytree(folder, tmp_path / "without")
    for name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        (tmp_path / "without" / name).unlink(missing_ok=True)
    with pytest.raises(ModelError) as caught:
        load(tmp_path / "without")
    assert "preprocessor_config.json" in caught.value.problems[0].fix
    with pytest.raises(ModelError):
        load(tiny.save_base(tmp_path / "text"))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": 5}))
    with pytest.raises(ModelError, match="cannot load the processor"):
        load(folder)
    monkeypatch.setattr(vision.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs torchvision") as caught:
        load(folder)
    assert caught.value.problems[0].fix == 'pip install "loralab[vision]"'
