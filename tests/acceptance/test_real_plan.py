"""Planned against measured memory on real rows, in the shapes of GPT-2-small and Qwen2.5-0.5B.

Processes of their own, since the peak is what comes above the level after imports. Time is not asserted;
`benchmarks/planning.py` prints it, and sweeps more settings.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from support.command import start, write_config

STEPS = 6
# Share of the measured peak that a plan may be off by.
COUNTED, PROBED = 0.20, 0.10
CASES: dict[str, tuple[str, list[str]]] = {
    "gpt2": ("gpt2", []),
    "gpt2, few rows": ("gpt2", ["training.per_device_train_batch_size=2"]),
    "gpt2, large rank": ("gpt2", ["lora.r=64"]),
    "gpt2, long rows": ("gpt2", ["data.max_length=512"]),
    "gpt2 in 4 bits": ("gpt2", ["model.quantization=nf4"]),
    "qwen": ("qwen", ["training.per_device_train_batch_size=2"]),
    "qwen in 4 bits": ("qwen", ["training.per_device_train_batch_size=2", "model.quantization=nf4"]),
}


def save_shape(shape: str, data_folder: Path, folder: Path) -> Path:
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config())
    if shape == "qwen":
        sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
        further = {"vocab_size": 151_936, "num_key_value_heads": 2, "tie_word_embeddings": True}
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, **further, max_position_embeddings=4096))
    model.to(torch.bfloat16).save_pretrained(folder)
    name = "qwen2.5" if shape == "qwen" else "gpt2"
    AutoTokenizer.from_pretrained(data_folder / "tokenizers" / name).save_pretrained(folder)
    return folder


def run(folder: Path, *arguments: object) -> str:
    process = start(*arguments, folder=folder)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_peak_is_the_planned_one(
    name: str, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape, overrides = CASES[name]
    config = write_config(
        tmp_path / "run.yaml",
        {
            "model": {
                "name": str(save_shape(shape, data_folder, tmp_path / "base")),
                "precision": "bfloat16",
                "device": "cpu",
            },
            "data": {
                "train": str(data_folder / "sft/alpaca_en_demo/alpaca_en_demo.json"),
                "max_length": 256,
                "cache_dir": str(tmp_path / "cache"),
            },
            "training": {"max_steps": STEPS, "save_strategy": "no"},
            "evaluation": {"num_samples": 0},
            "output": {"dir": str(tmp_path / "run")},
        },
    )
    counted = json.loads(run(tmp_path, "plan", config, *overrides, "--no-probe", "--json"))
    probed = json.loads(run(tmp_path, "plan", config, *overrides, "--json"))
    run(tmp_path, "train", config, *overrides)
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    measured = record["memory"]["measured_bytes"]
    ratios = [plan["memory"]["predicted_bytes"] / measured for plan in (counted, probed)]
    with capsys.disabled():
        print(f"\n{name}: measured {measured >> 20} MiB, counted {ratios[0]:.3f}, probed {ratios[1]:.3f}")
    assert counted["tokens"]["laid_out"] == record["layout_tokens"]["laid_out"]
    assert abs(ratios[0] - 1) < COUNTED
    assert abs(ratios[1] - 1) < PROBED
