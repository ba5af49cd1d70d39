"""The schema: every field described, named and frozen."""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from loralab.config.load import describe_field, field_by_key, schema_keys
from loralab.config.schema import Config

MINIMAL: dict[str, Any] = {"model": {"name": "m"}, "data": {"train": "rows.json"}}


def _leaves(
    node: dict[str, Any], definitions: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in node["properties"].items():
        inner = [value, *value.get("anyOf", []), *value.get("allOf", [])]
        section = next((definitions[v["$ref"].rpartition("/")[2]] for v in inner if "$ref" in v), None)
        if section is None:
            yield f"{prefix}{name}", value
        else:
            yield from _leaves(section, definitions, f"{prefix}{name}.")


def _json_leaves() -> dict[str, dict[str, Any]]:
    schema = Config.model_json_schema()
    return dict(_leaves(schema, schema["$defs"]))


def test_schema_keys_are_the_leaves_of_the_json_schema() -> None:
    assert schema_keys() == list(_json_leaves())
    assert len(schema_keys()) > 50


@pytest.mark.parametrize("key", schema_keys())
def test_every_field_has_a_sentence(key: str) -> None:
    sentence = _json_leaves()[key]["description"]
    assert sentence[0].isupper()
    assert sentence.endswith(".")
    assert describe_field(key) == sentence


def test_every_section_is_described() -> None:
    assert all(describe_field(section) for section in Config.model_fields)
    assert all(definition["description"] for definition in Config.model_json_schema()["$defs"].values())
    assert field_by_key("training").description
    assert describe_field("training.nothing") == ""


def test_sections_are_frozen_and_closed() -> None:
    config = Config.model_validate(MINIMAL)
    with pytest.raises(ValidationError):
        config.lora.r = 9  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Config.model_validate({**MINIMAL, "lora": {"rank": 9}})


def test_chosen_compares_with_the_default() -> None:
    config = Config.model_validate({**MINIMAL, "lora": {"r": 8, "alpha": 3}})
    assert not config.lora.chosen("r")
    assert config.lora.chosen("alpha")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora.r", 0),
        ("lora.dropout", 1.0),
        ("lora.alpha", 0),
        ("training.learning_rate", 0.0),
        ("training.learning_rate", float("nan")),
        ("training.warmup_ratio", 1.0),
        ("training.max_steps", 0),
        ("training.seed", -1),
        ("data.max_length", 0),
        ("data.max_dropped_fraction", 1.1),
        ("data.num_workers", -1),
        ("data.num_workers", "all"),
        ("model.device", "gpu"),
        ("model.device", "cuda:"),
        ("model.name", ""),
        ("evaluation.batch_size", 0),
    ],
)
def test_values_outside_their_range_are_errors(key: str, value: Any) -> None:
    section, name = key.split(".")
    with pytest.raises(ValidationError):
        Config.model_validate({**MINIMAL, section: {**MINIMAL.get(section, {}), name: value}})


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda", "cuda:1"])
def test_devices(device: str) -> None:
    assert Config.model_validate({**MINIMAL, "model": {"name": "m", "device": device}}).model.device == device
