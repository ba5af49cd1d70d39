"""A run whose base is spread (`model.device_map: auto`) is the run of one device.

There are no two GPUs here: accelerate dispatches the base with all hooks, in parts that are all on the CPU.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate import dispatch_model
from torch import nn

import loralab
from loralab.models.load import load_base_model
from support import tiny

PARTS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")


@pytest.mark.filterwarnings("ignore:.*offloaded:UserWarning")
def test_a_spread_base_trains_as_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.save_base(tmp_path / "base")
    rows = tiny.write_rows(tmp_path / "rows.json", tiny.alpaca_rows(14))
    sections: dict[str, dict[str, Any]] = {
        "data": {"validation": 4},
        "lora": {"dropout": 0.1},
        "training": {"num_train_epochs": 2, "save_strategy": "epoch"},
        "evaluation": {"num_samples": 2, "max_new_tokens": 4, "metrics": ["exact_match"]},
    }
    whole = loralab.train(tiny.run_config(base, rows, tmp_path / "whole", **sections))

    def load(*args: Any, **kwargs: Any) -> Any:
        model, choices = load_base_model(*args, **kwargs)
        dispatch_model(model, dict.fromkeys(PARTS, "cpu"), force_hooks=True)
        spread.append(model)
        return model, choices

    spread: list[nn.Module] = []
    monkeypatch.setattr("loralab.workflows.run_base.load_base_model", load)
    parts = loralab.train(tiny.run_config(base, rows, tmp_path / "parts", **sections))
    assert len(spread) == 1
    assert parts.record["adapter_sha256"] == whole.record["adapter_sha256"]
    read = [[line for line in run.metrics if "eval_loss" in line] for run in (whole, parts)]
    assert [line["eval_loss"] for line in read[0]] == [line["eval_loss"] for line in read[1]]
    measured = [json.loads((run.path / "evaluation.json").read_text(encoding="utf-8")) for run in (whole, parts)]
    assert measured[0]["eval_loss"] == measured[1]["eval_loss"]
    assert measured[0]["base"]["eval_loss"] == measured[1]["base"]["eval_loss"]
