"""Runs whose base or moments lie in parts over two processes, held against one process that has everything whole."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from support import tiny
from support.command import write_config

# What a step may meet, in one run: its rows sorted by what they share, activations computed again, a matrix and tokens
# trained beside the adapter, an end before the last step.
TOGETHER = (
    "training.sampling=grouped",
    "training.gradient_checkpointing=true",
    "training.num_train_epochs=6",
    "training.early_stopping={metric: eval_loss, patience: 2, min_delta: 0.2}",
    "evaluation.strategy=steps",
    "evaluation.steps=3",
    "lora.modules_to_save=[lm_head]",
    "lora.trainable_token_indices=['<sep>', ' cat']",
)


def write_run(folder: Path, family: tiny.Family = "llama", **training: object) -> Path:
    """Write the configuration of a run on 25 rows: in the last step of an epoch one of two processes has no row."""
    base = tiny.save_base(folder / "base", family)
    rows = tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(31))
    sections: dict[str, dict[str, Any]] = {
        "data": {"validation": 6},
        "lora": {"dropout": 0.1},
        "training": {"num_train_epochs": 2, "token_budget": 64, **training},
        "evaluation": {
            "batch_size": 4,  # two batches, the second short: the processes run unequal numbers of micro-batches
            "num_samples": 3,
            "max_new_tokens": 4,
            "metrics": ["exact_match"],
        },
    }
    return write_config(folder / "config.yaml", tiny.run_config(base, rows, folder / "run", **sections))


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def check_same(one: Path, parts: Path) -> None:
    before, after = metrics(one), metrics(parts)
    assert len(before) == len(after)
    for mine, other in zip(before, after, strict=True):
        assert other == pytest.approx(mine, rel=1e-5)
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, parts))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert second[name].shape == tensor.shape
        assert second[name].dtype == tensor.dtype
        assert float((second[name] - tensor).norm() / tensor.norm()) <= 1e-4, name
    old, new = read(one / "evaluation.json"), read(parts / "evaluation.json")
    assert new["eval_loss"] == pytest.approx(old["eval_loss"], rel=1e-5)
    assert new["base"]["eval_loss"] == pytest.approx(old["base"]["eval_loss"], rel=1e-6)
    answers = [[s["adapter_output"] for s in read(run / "samples.json")["samples"]] for run in (one, parts)]
    assert answers[0] == answers[1]
