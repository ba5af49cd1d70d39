"""Base against adapter on a real model and real rows: every distance against a plain computation in float64.

What it is held against comes from transformers and PEFT alone: one row at a time, the logits of all positions.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import loralab

TOLERANCE = 1e-5
EXAMPLES = 24


def train(data_folder: Path, folder: Path) -> loralab.Run:
    """Train an adapter for some steps on instructions."""
    config = {
        "model": {"name": str(data_folder / "models/stories260k"), "precision": "float32", "device": "cpu"},
        "data": {
            "train": str(data_folder / "sft/alpaca_en_demo/alpaca_en_demo.json"),
            "validation": 60,
            "stop_tokens": ["<s>"],
            "max_length": 256,
            "cache_dir": str(folder / "cache"),
        },
        "lora": {"target_modules": "attention"},
        "training": {"max_steps": 40, "learning_rate": 1e-3, "save_strategy": "no"},
        "evaluation": {"strategy": "no", "num_samples": 0, "max_new_tokens": 32},
        "output": {"dir": str(folder / "run")},
    }
    return loralab.train(config)


def plain_logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Return the logits behind every token, in float64."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0].double()
    return found


def plain_distances(base: torch.Tensor, adapter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the distances at every position by their definitions."""
    log_p, log_q = base.log_softmax(-1), adapter.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    middle = ((p + q) / 2).log()
    return {
        "kl_base_adapter": (p * (log_p - log_q)).sum(-1),
        "kl_adapter_base": (q * (log_q - log_p)).sum(-1),
        "jensen_shannon": ((p * (log_p - middle)).sum(-1) + (q * (log_q - middle)).sum(-1)) / 2,
        "l2_logits": (base - adapter).square().sum(-1).sqrt(),
        "l2_probabilities": (p - q).square().sum(-1).sqrt(),
        "top1_agreement": (base.argmax(-1) == adapter.argmax(-1)).double(),
    }


@pytest.mark.slow
def test_distances_of_a_real_adapter(data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(data_folder, tmp_path)
    found = run.compare(max_examples=EXAMPLES)
    assert json.loads(run.folder.comparison.read_text(encoding="utf-8")) == found
    tokenizer = AutoTokenizer.from_pretrained(run.adapter())
    base = AutoModelForCausalLM.from_pretrained(data_folder / "models/stories260k", dtype=torch.float32).eval()
    pair = PeftModel.from_pretrained(base, run.adapter()).eval()
    worst: dict[str, float] = {}
    sums: dict[str, float] = {}
    tokens = 0
    for record in found["prompts"]:
        prompt = tokenizer(record["prompt"], add_special_tokens=False)["input_ids"]
        whole = tokenizer(record["prompt"] + record["reference"], add_special_tokens=False)["input_ids"]
        assert whole[: len(prompt)] == prompt
        count = record["answer"]["tokens"]
        ended = len(whole) - len(prompt) == count - 1  # the stop token is one more, and needs no position behind it
        assert ended or len(whole) - len(prompt) == count
        at = slice(len(prompt) - 1, len(prompt) - 1 + count)
        with pair.disable_adapter():
            without = plain_logits(pair, whole)[at]
        own = plain_distances(without, plain_logits(pair, whole)[at])
        tokens += count
        for name, values in own.items():
            assert len(values) == count
            sums[name] = sums.get(name, 0.0) + float(values.sum())
            scale = max(1.0, float(values[0]))  # L2 of logits is in the tens: relative there
            errors = (
                abs(record["last_prompt_token"][name] - float(values[0])) / scale,
                abs(record["answer"][name] - float(values.mean())) / scale,
            )
            worst[name] = max(worst.get(name, 0.0), *errors)
    with capsys.disabled():
        print(f"\nlargest error of {EXAMPLES} prompts, {tokens:,} tokens:", {k: f"{v:.1e}" for k, v in worst.items()})
        print(f"KL {found['totals']['kl_divergence']:.4f}, {found['probe']['reading']}")
    assert max(worst.values()) < TOLERANCE, worst
    assert found["totals"]["answer"]["count"] == tokens
    for name, total in sums.items():
        assert found["totals"]["answer"][name]["mean"] == pytest.approx(total / tokens, rel=TOLERANCE)
    assert 0.01 < found["totals"]["kl_divergence"] < 5
    assert found["totals"]["last_prompt_token"]["kl_base_adapter"]["low"] > 0


@pytest.mark.slow
def test_layout_and_batch_change_no_distance(data_folder: Path, tmp_path: Path) -> None:
    run = train(data_folder, tmp_path)
    results = [
        run.compare(max_examples=EXAMPLES, with_probe=False, overrides=[f"training.layout={layout}", *more])
        for layout, more in (
            ("shared", []),
            ("padded", ["evaluation.batch_size=1"]),
            ("packed", ["evaluation.batch_size=24"]),
        )
    ]
    for other in results[1:]:
        for one, two in zip(results[0]["prompts"], other["prompts"], strict=True):
            assert math.isclose(one["kl_divergence"], two["kl_divergence"], abs_tol=TOLERANCE)
            assert math.isclose(one["answer"]["kl_adapter_base"], two["answer"]["kl_adapter_base"], abs_tol=TOLERANCE)
