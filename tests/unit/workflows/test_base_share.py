"""What a process holds of a base whose layers several processes share."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loralab.config.schema import Config
from loralab.models.blueprint import Blueprint, describe_weights
from loralab.progress import Reporter
from loralab.training.distributed import ALONE, Processes
from loralab.workflows.base_share import held_base
from loralab.workflows.configure import load_run_config
from loralab.workflows.plan import plan
from loralab.workflows.step_layout import build_blueprint
from support import tiny
from support.command import write_config

LAYERS = 6


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A configuration on a base of six layers, whose numbers nobody reads."""
    folder = tmp_path_factory.mktemp("share")
    base = tiny.save_base(folder / "base")
    shape = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": LAYERS}), encoding="utf-8")
    rows = tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(12))
    return tiny.run_config(base, rows, folder / "run", model={"precision": "bfloat16"})


def config_of(values: dict[str, Any], distributed: str) -> Config:
    config = Config.model_validate(values)
    return config.model_copy(update={"training": config.training.model_copy(update={"distributed": distributed})})


@pytest.fixture(scope="module")
def blueprint(values: dict[str, Any]) -> Blueprint:
    config = config_of(values, "ddp")
    return build_blueprint(config, config.lora, dtype=torch.bfloat16, device=torch.device("cuda", 0))


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("way", ["fsdp2", "zero3"])
def test_a_process_holds_its_part_and_two_layers(
    way: str, count: int, values: dict[str, Any], blueprint: Blueprint
) -> None:
    layers: Any = blueprint.model.language_model.model.layers
    layer = sum(weight.numel() * 2 for weight in layers[0].parameters() if not weight.requires_grad)
    whole = int(describe_weights(blueprint.model)["frozen_bytes"])
    outside = whole - LAYERS * layer
    config = config_of(values, way)
    held = held_base(config, blueprint, Processes(count=count, local_count=count))
    assert held.own == pytest.approx(outside + 2 * layer + (LAYERS - 2) * layer / count, abs=1)
    assert held.mapped == 0
    assert held_base(config, blueprint, ALONE).own == whole


@pytest.mark.parametrize("way", ["ddp", "zero2"])
def test_a_base_that_is_not_cut_is_whole_in_every_process(
    way: str, values: dict[str, Any], blueprint: Blueprint
) -> None:
    held = held_base(config_of(values, way), blueprint, Processes(count=4, local_count=4))
    assert held.own == int(describe_weights(blueprint.model)["frozen_bytes"])


def test_a_plan_counts_processes(values: dict[str, Any], tmp_path: Path) -> None:
    values = values | {"training": values["training"] | {"num_train_epochs": 2}}
    loaded = load_run_config(write_config(tmp_path / "config.yaml", values))
    alone = plan(loaded, probe=False, reporter=Reporter())
    parts = load_run_config(tmp_path / "config.yaml", ["training.distributed=fsdp2"])
    four = plan(parts, probe=True, reporter=Reporter(), processes=4)
    assert (alone["schedule"]["rows_per_step"], four["schedule"]["rows_per_step"]) == (4, 16)
    assert (alone["schedule"]["total_steps"], four["schedule"]["total_steps"]) == (6, 2)
    assert four["schedule"]["processes"] == 4
    assert four["memory"]["free_bytes"] < alone["memory"]["free_bytes"] / 2  # they share the machine's
    assert four["memory"]["parts"]["gradients"] == 2 * alone["memory"]["parts"]["gradients"]
    assert four["time"]["why"] == "not measured: the probe is one process"
    whole = alone["memory"]["parts"]["weights"] + alone["memory"]["mapped_bytes"]
    assert four["memory"]["parts"]["weights"] < 0.8 * whole
