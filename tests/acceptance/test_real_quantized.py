"""What quantization costs on a real model: the loss of the base without and with it, on the same rows."""

import json
from pathlib import Path
from typing import Any

import pytest

import loralab

STEPS = 60
# Most nats per token that the base may lose; a model of 260,000 weights suffers more than a large one.
LARGEST_COST = {"nf4": 0.25, "fp4": 0.4, "int8": 0.02}


def train(data_folder: Path, folder: Path, kind: str) -> dict[str, Any]:
    """Train on instructions; return the final evaluation with what quantization did to the weights."""
    config = {
        "model": {
            "name": str(data_folder / "models/stories260k"),
            "quantization": kind,
            "precision": "float32",
            "device": "cpu",
        },
        "data": {
            "train": str(data_folder / "sft/alpaca_en_demo/alpaca_en_demo.json"),
            "validation": 60,
            "stop_tokens": ["<s>"],
            "max_length": 256,
            "cache_dir": str(folder / "cache"),
        },
        "lora": {"target_modules": "attention"},
        "training": {"max_steps": STEPS, "learning_rate": 1e-3, "save_strategy": "no"},
        "evaluation": {"strategy": "no", "num_samples": 0},
        "output": {"dir": str(folder / kind)},
    }
    run = loralab.train(config)
    return json.loads(run.folder.evaluation.read_text()) | {"held": run.record["model"].get("quantization")}


@pytest.mark.slow
def test_what_quantization_costs(data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = {kind: train(data_folder, tmp_path, kind) for kind in ("none", *LARGEST_COST)}
    base = {kind: result["base"]["eval_loss"] for kind, result in results.items()}
    with capsys.disabled():
        for kind, result in results.items():
            error = result["held"]["error"]["relative"] if result["held"] else 0.0
            print(f"\n{kind}: base {base[kind]:.4f}, adapter {result['eval_loss']:.4f}, weights changed {error:.4f}")
    for kind, largest in LARGEST_COST.items():
        assert abs(base[kind] - base["none"]) < largest, kind
        assert results[kind]["eval_loss"] < base[kind] - 0.3, kind  # the adapter learns on every base
    assert base["none"] < base["nf4"] < base["fp4"]
