"""Every shipped recipe parses as it is, and trains a few steps on a tiny stand-in."""

from pathlib import Path

import pytest

import loralab
from loralab.workflows.configure import load_run_config
from loralab.workflows.recipes import list_recipes, write_recipe
from support import tiny

# The shape of stand-in that a recipe's target layers exist in.
STAND_INS: dict[str, tiny.Family] = {"gpt2-alpaca": "gpt2"}


@pytest.mark.parametrize("name", list_recipes())
def test_recipe_parses(name: str, tmp_path: Path) -> None:
    loaded = load_run_config(write_recipe(name, tmp_path / f"{name}.yaml"))
    assert loaded.config.model.name


@pytest.mark.parametrize("name", list_recipes())
def test_recipe_trains(name: str, tmp_path: Path) -> None:
    rows = tiny.write_rows(tmp_path / "rows.json", tiny.alpaca_rows(30))
    run = loralab.train(
        write_recipe(name, tmp_path / f"{name}.yaml"),
        model={"name": str(tiny.save_base(tmp_path / "base", STAND_INS[name])), "device": "cpu"},
        data={"train": str(rows), "max_length": 128},
        training={"max_steps": 3, "logging_steps": 1},
        evaluation={"max_new_tokens": 4},
        output={"dir": str(tmp_path / "run")},
    )
    assert len([line for line in run.metrics if "loss" in line]) == 3
    assert (run.adapter() / "adapter_model.safetensors").is_file()


def test_document_2_hyperparameters(tmp_path: Path) -> None:
    config = load_run_config(write_recipe("gpt2-alpaca", tmp_path / "r.yaml")).config
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (8, 16, 0.1)
    assert config.lora.target_modules == ["c_attn", "c_proj"]
    assert (config.training.num_train_epochs, config.training.per_device_train_batch_size) == (3, 4)
    assert (config.data.max_length, config.data.validation) == (512, 0.1)
    assert config.model.base_dropout == "as_configured"
