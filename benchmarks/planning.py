"""Planned against measured: memory and time of `plan`, without and with the probe, and of the run itself.

Random weights in the shapes of GPT-2-small and Qwen2.5-0.5B, real rows, and sweeps of batch size, rank and
length. Each plan and each run is a process of its own. Run it on an idle machine:

    python benchmarks/planning.py --data FOLDER [--cases NAME ...] [--steps 6] [--work FOLDER]

FOLDER holds `sft/alpaca_en_demo/alpaca_en_demo.json` and `tokenizers/gpt2`, `tokenizers/qwen2.5`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

QWEN: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
TRAINING = "training.per_device_train_batch_size"
# Name: shape and what differs from B 8, r 8, max_length 256, no quantization.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2 B 2": ("gpt2", {TRAINING: 2}),
    "gpt2 B 4": ("gpt2", {TRAINING: 4}),
    "gpt2 B 16": ("gpt2", {TRAINING: 16}),
    "gpt2 r 64": ("gpt2", {"lora.r": 64}),
    "gpt2 length 512": ("gpt2", {"data.max_length": 512}),
    "gpt2 length 128": ("gpt2", {"data.max_length": 128}),
    "gpt2 nf4": ("gpt2", {"model.quantization": "nf4"}),
    "gpt2 nf4 B 2": ("gpt2", {"model.quantization": "nf4", TRAINING: 2}),
    "gpt2 recomputed": ("gpt2", {"training.gradient_checkpointing": True}),
    "gpt2 recomputed B 2": ("gpt2", {"training.gradient_checkpointing": True, TRAINING: 2}),
    "qwen recomputed B 2": ("qwen", {"training.gradient_checkpointing": True, TRAINING: 2}),
    "gpt2 padded": ("gpt2", {"training.layout": "padded"}),
    "gpt2 budget 512": ("gpt2", {"training.token_budget": 512}),
    "qwen B 4": ("qwen", {TRAINING: 4}),
    "qwen B 2": ("qwen", {TRAINING: 2}),
    "qwen r 64 B 2": ("qwen", {TRAINING: 2, "lora.r": 64}),
    "qwen length 512 B 2": ("qwen", {TRAINING: 2, "data.max_length": 512}),
    "qwen nf4 B 2": ("qwen", {TRAINING: 2, "model.quantization": "nf4"}),
    "qwen nf4 B 4": ("qwen", {TRAINING: 4, "model.quantization": "nf4"}),
}


def save_shape(name: str, data: Path, folder: Path) -> None:
    """Write a random model of a shape with its tokenizer, in bfloat16."""
    if (folder / "config.json").is_file():
        return
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**QWEN)) if name == "qwen" else GPT2LMHeadModel(GPT2Config())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(data / "tokenizers" / {"gpt2": "gpt2", "qwen": "qwen2.5"}[name]).save_pretrained(
        folder
    )


def run(*arguments: str) -> str:
    """Run `loralab` and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "loralab.cli", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"loralab {' '.join(arguments)}:\n{done.stderr}")
    return done.stdout


def measure(name: str, *, data: Path, work: Path, steps: int) -> dict[str, Any]:
    """Plan one case twice and run it."""
    shape, changed = CASES[name]
    save_shape(shape, data, work / shape)
    config = {
        "model": {"name": str(work / shape), "precision": "bfloat16", "device": "cpu"},
        "data": {
            "train": str(data / "sft/alpaca_en_demo/alpaca_en_demo.json"),
            "max_length": 256,
            "cache_dir": str(work / "cache"),
        },
        "training": {"max_steps": steps, "save_strategy": "no", "logging_steps": 1},
        "evaluation": {"num_samples": 0},
        "output": {"dir": str(work / "run")},
    }
    path = work / "case.yaml"
    path.write_text(yaml.safe_dump(config))
    overrides = [f"{key}={value}" for key, value in changed.items()]
    started = time.perf_counter()
    counted = json.loads(run("plan", str(path), *overrides, "--no-probe", "--json"))
    seconds = time.perf_counter() - started
    probed = json.loads(run("plan", str(path), *overrides, "--json"))
    run("train", str(path), *overrides, "--overwrite")
    record = json.loads((work / "run/run.json").read_text())
    measured = record["memory"]["measured_bytes"]
    return {
        "case": name,
        "measured_mib": round(measured / 2**20),
        "no_probe": round(counted["memory"]["predicted_bytes"] / measured, 3),
        "probe": round(probed["memory"]["predicted_bytes"] / measured, 3),
        "train_seconds": record["train_seconds"],
        "time": round(probed["time"]["seconds"] / record["train_seconds"], 3),
        "tokens_equal": counted["tokens"]["laid_out"] == record["layout_tokens"]["laid_out"],
        "plan_seconds": round(seconds, 1),
    }


def main() -> None:
    """Measure and print one JSON line per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        for name in arguments.cases:
            print(json.dumps(measure(name, data=arguments.data, work=work, steps=arguments.steps)), flush=True)


if __name__ == "__main__":
    main()
