"""Which keys and quantizations a variant can use."""

from typing import Any, get_args

import pytest

from loralab.config.checks import check_config
from loralab.config.findings import Finding
from loralab.config.lora_checks import FACTS
from loralab.config.schema import Config, LoraConfig

# A value other than the default for every key.
CHOSEN: dict[str, Any] = {
    "r": 4,
    "alpha": 4.0,
    "loraplus_lr_ratio": 4.0,
    "eva_rho": 1.0,
    "eva_rows": 8,
    "dropout": 0.1,
    "target_modules": "attention",
    "vision": "projector",
    "layers_to_transform": [0],
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 2.0},
    "modules_to_save": ["norm"],
    "trainable_token_indices": [3],
}


def findings(lora: dict[str, Any], quantization: str | None = None) -> list[Finding]:
    variant = str(lora.get("variant", "lora"))
    held = quantization or ("nf4" if variant == "loftq" else "none")
    return check_config(
        Config.model_validate({"model": {"name": "x", "quantization": held}, "data": {"train": "x"}, "lora": lora})
    )


def test_the_table_has_every_variant_and_knows_every_key() -> None:
    assert set(FACTS) == set(get_args(LoraConfig.model_fields["variant"].annotation))
    assert CHOSEN.keys() == LoraConfig.model_fields.keys() - {"variant"}
    assert {key for facts in FACTS.values() for key in facts.keys} == CHOSEN.keys()


@pytest.mark.parametrize("key", CHOSEN)
@pytest.mark.parametrize("variant", FACTS)
def test_a_key_that_a_variant_cannot_use_is_refused(variant: str, key: str) -> None:
    found = findings({"variant": variant, key: CHOSEN[key]})
    if key in FACTS[variant].keys:
        assert found == []
        return
    (finding,) = found
    assert finding.key == f"lora.{key}"
    assert finding.what == f"{key} {CHOSEN[key]!r} with variant {variant}, which cannot use it"
    assert finding.fix.startswith("remove it, or set lora.variant: ")
    assert findings({"variant": variant}) == []


@pytest.mark.parametrize(
    ("variant", "key"),
    [
        ("lora", "loraplus_lr_ratio"),
        ("ia3", "r"),
        ("ia3", "dropout"),
        ("ia3", "layers_to_transform"),
        ("vera", "alpha"),
        ("vera", "rank_pattern"),
        ("loha", "dropout"),
        ("eva", "rank_pattern"),
        ("eva", "vision"),
        ("dora", "eva_rows"),
    ],
)
def test_keys_that_have_no_effect(variant: str, key: str) -> None:
    assert [finding.key for finding in findings({"variant": variant, key: CHOSEN[key]})] == [f"lora.{key}"]


def test_a_key_of_one_variant_names_it() -> None:
    (finding,) = findings({"loraplus_lr_ratio": 4.0})
    assert finding.fix == "remove it, or set lora.variant: lora_plus"


@pytest.mark.parametrize("quantization", ["none", "nf4", "fp4", "int8"])
@pytest.mark.parametrize("variant", FACTS)
def test_quantizations(variant: str, quantization: str) -> None:
    refused = {"loftq": ("none", "int8"), "loha": ("nf4", "fp4"), "lokr": ("nf4", "fp4")}
    found = findings({"variant": variant}, quantization)
    if quantization not in refused.get(variant, ()):
        assert found == []
        return
    (finding,) = found
    assert finding.key == "lora.variant"
    assert f"variant {variant} with quantization {quantization}: " in finding.what
    assert finding.fix.startswith("set model.quantization: ")
    for possible in finding.fix.split(",")[0].removeprefix("set model.quantization: ").split(" or "):
        assert findings({"variant": variant}, possible) == []
