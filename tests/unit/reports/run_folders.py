"""Run folders built by hand: a whole one, and pieces of it."""

import json
from pathlib import Path
from typing import Any

import yaml

from loralab.config.schema import Config
from loralab.run import RunFolder

HOSTILE = (
    '<script>alert("x")</script> {{ 7 * 7 }} {% raise %} a|b `tick` ```\n| c | 😀 & <img src=http://evil.example/x>'
)


def config_values() -> dict[str, Any]:
    config = Config.model_validate(
        {
            "model": {"name": "owner/base-model"},
            "data": {"train": "/srv/secret/train.jsonl", "validation": 0.1},
            "lora": {"r": 16},
            "training": {"early_stopping": {"patience": 2}},
        }
    )
    return config.model_dump(mode="json")


def record() -> dict[str, Any]:
    return {
        "loralab_version": "0.1.0",
        "status": "completed",
        "name": "my-run",
        "started_at": "2025-11-20T13:02:11+00:00",
        "finished_at": "2025-11-20T13:26:40+00:00",
        "origin": {
            "model.name": "config.yaml:2",
            "lora.r": "command line",
            "lora.alpha": "default",
            "data.columns": "default",
            "training.early_stopping.patience": "config.yaml:9",
            "training.early_stopping.metric": "default",
        },
        "resolved": {"precision": {"value": "float32", "reason": "no fast bfloat16 here"}},
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
        "seeds": {"training": 42},
        "hardware": {"device": "cpu", "gpu": None, "cores": 2, "memory_bytes": 8 * 1024**3},
        "model": {
            "name": "owner/base-model",
            "revision": "abc123",
            "architecture": "LlamaForCausalLM",
            "parameters": 134_515_008,
            "trainable_parameters": 4_884_480,
            "sha256": None,
        },
        "token_budget": {"value": 1600, "reason": "rows times tokens"},
        "data_fingerprint": "d" * 64,
        "adapter_sha256": "a" * 64,
        "train_seconds": 3725.0,
        "tokens_per_second": 1873.2,
        "examples_per_second": 9.61,
        "peak_memory_bytes": 3_478_923_509,
        "steps": 300,
        "epochs": 3.0,
        "stopped_because": None,
        "events": [{"at": "2025-11-20T13:10:00+00:00", "what": "resumed"}, {"step": 7, "what": "budget halved"}],
    }


def data() -> dict[str, Any]:
    split = {
        "rows_read": 110,
        "rows_kept": 100,
        "dropped": {"empty answer": 10},
        "dropped_rows": [{"row": 17, "reason": "empty answer"}],
        "truncated": 5,
        "empty_answers": 0,
        "notes": {"truncated": 5, "answer_altered": 2},
        "noted_rows": {
            "truncated": [{"source": "t", "row": row} for row in range(1001, 1006)],
            "answer_altered": [{"source": "t", "row": 2001}, {"source": "t", "row": 2002}],
        },
        "supervised_tokens": 4000,
        "total_tokens": 8000,
        "length_percentiles": {"p0": 21, "p50": 148, "p90": 512, "p99": 988, "p100": 1024},
    }
    return {
        "format": {"value": "alpaca", "reason": "columns of /srv/secret/train.jsonl"},
        "template": {"name": "/srv/secret/chat.jinja", "text": "{{ '/keep/this/path' }}", "reason": "file"},
        "system_prompt": "You answer like <b>a sailor</b>.",
        "stop_tokens": {"ids": [2, 32007], "texts": ["</s>", "<|end|>"], "reason": "the template writes it"},
        "sources": [{"name": "/srv/secret/train.jsonl", "sha256": "e" * 64}],
        "split": {"method": "random", "seed": 42},
        "splits": {"train": split, "validation": {**split, "dropped": {}, "dropped_rows": []}},
    }


def evaluation(*, change: float = -1.3192, low: float | None = -1.3904, high: float | None = -1.2511) -> dict[str, Any]:
    def side(loss: float, perplexity: float) -> dict[str, Any]:
        return {
            "eval_loss": loss,
            "eval_loss_batch_mean": loss + 0.02,
            "perplexity": perplexity,
            "num_batches": 13,
            "num_examples": 99,
            "supervised_tokens": 8123,
            "batch_size": 8,
            "max_length": 1024,
            "split": "test",
        }

    bounds = {"eval_loss": change, "low": low, "high": high, "level": 0.95, "method": "paired bootstrap"}
    judged = "better" if (high or 0) < 0 else "worse" if (low or 0) > 0 else "no difference seen at n = 99"
    difference = bounds | {"verdict": judged, "reason": "as the interval says"}
    return {**side(1.6081, 4.9933), "base": side(2.9273, 18.6771), "difference": difference}


def figure(value: float, low: float | None, high: float | None, **more: Any) -> dict[str, Any]:
    return {"value": value, "count": 99, "low": low, "high": high, "level": 0.95, "method": "Wilson", **more}


def task_evaluation() -> dict[str, Any]:
    """Return an evaluation with task metrics of both sides: better by one figure, no difference by another."""
    content = evaluation()
    base: dict[str, Any] = content["base"]
    better = {"better": "higher"}
    content["metrics"] = {
        "yes_no_accuracy": figure(0.8182, 0.7310, 0.8822, **better),
        "yes_no_macro_f1": figure(0.7712, 0.6801, 0.8533, **better, method="percentile bootstrap over 99 rows"),
        "number_mae": figure(42.31, 37.25, 48.75, better="lower", method="percentile bootstrap over 99 rows"),
    }
    base["metrics"] = {
        "yes_no_accuracy": figure(0.5454, 0.4476, 0.6401, **better),
        "yes_no_macro_f1": figure(0.7501, 0.6622, 0.8411, **better),
        "number_mae": figure(1312.5, 1100.0, 1599.0, better="lower"),
    }
    for side in (content, base):
        side |= {name: each["value"] for name, each in side["metrics"].items()}
        side |= {"answered_by": "score", "answered_rows": 99}
    content["differences"] = {
        "yes_no_accuracy": figure(0.2727, 0.1717, 0.3737, verdict="better", reason="the interval leaves out 0")
        | {"mcnemar": {"only_adapter": 31, "only_base": 4, "p": 3.4e-6}},
        "yes_no_macro_f1": figure(0.0211, -0.0301, 0.0712, verdict="no difference seen at n = 99"),
        "number_mae": figure(-1270.2, -1555.0, -1060.0, verdict="better"),
    }
    classes = {"classes": ["yes", "no"], "columns": ["yes", "no", "unparsable"]}
    content["details"] = {
        "yes_no": classes | {"confusion_matrix": [[51, 3, 0], [14, 30, 1]]},
        "calibration": {"bins": [{"above": 0.9, "up_to": 1.0, "answers": 99, "confidence": 0.96, "accuracy": 0.8182}]},
    }
    base["details"] = {"yes_no": classes | {"confusion_matrix": [[30, 20, 4], [20, 24, 1]]}}
    return content


def prediction(row: int, *, base: float, adapter: float, prompt: str = "Is it?", text: str = "yes") -> dict[str, Any]:
    return {
        "row": row,
        "source": 0,
        "prompt": f"{prompt} {row}",
        "reference": "yes",
        "answered_by": "generate",
        "adapter": {"answer": f"adapter says {text}", "stopped": True, "tokens": 1, "scores": {"yes_no": adapter}},
        "base": {"answer": f"base says {text}", "stopped": False, "tokens": 9, "scores": {"yes_no": base}},
    }


def comparison() -> dict[str, Any]:
    mean = {"mean": 0.4321, "low": 0.4101, "high": 0.4567}
    distances = dict.fromkeys(("kl_base_adapter", "kl_adapter_base", "jensen_shannon", "top1_agreement"), mean)
    return {
        "split": "test",
        "examples": 30,
        "totals": {
            "last_prompt_token": {"count": 30, **distances},
            "answer": {"count": 90, **distances, "kl_base_adapter": {"mean": None, "low": None, "high": None}},
            "method": "percentile bootstrap over rows, 2000 resamples",
        },
        "generation": {"prompts": 30, "same_answer": 0.2, "base_stopped": 0.5, "adapter_stopped": 1.0},
        "probe": {
            "name": "built-in texts",
            "rows": 30,
            "tokens": 3069,
            "base_perplexity": 42.6,
            "adapter_perplexity": 55.1,
            "difference": {"eval_loss": 0.257, "low": 0.2, "high": 0.3, "verdict": "worse"},
            "top1_agreement": mean,
            "reading": "perplexity on unrelated text rose by 29 % (n = 30)",
        },
        "prompts": [],
    }


def samples(text: str = "Paris.") -> dict[str, Any]:
    row = {
        "prompt": f"Prompt {text}",
        "reference": f"Reference {text}",
        "base_output": f"Base {text}",
        "adapter_output": f"Adapter {text}",
        "base_stopped": False,
        "adapter_stopped": True,
    }
    return {"split": "test", "max_new_tokens": 128, "samples": [row]}


def metrics(count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        loss = 1.6 + 1.2 / step
        rows.append({"step": step, "epoch": step / 100, "loss": loss, "learning_rate": 2e-4, "grad_norm": 0.5 + loss})
        if step % max(1, count // 4) == 0:
            rows.append({"step": step, "epoch": step / 100, "eval_loss": loss + 0.1, "eval_perplexity": 5.0})
    return rows


def build_run(path: Path, *, adapter: bool = True, **parts: Any) -> RunFolder:
    """Write a run folder of the parts given: record, config, data, evaluation, samples, metrics."""
    folder = RunFolder(path / "my-run")
    folder.path.mkdir()
    for name in ("record", "data", "evaluation", "samples", "comparison"):
        if name in parts:
            getattr(folder, name).write_text(json.dumps(parts[name]))
    if "config" in parts:
        folder.config.write_text(yaml.safe_dump(parts["config"]))
    if "metrics" in parts:
        folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in parts["metrics"]))
    if "predictions" in parts:
        folder.predictions.write_text("".join(json.dumps(row) + "\n" for row in parts["predictions"]))
    if adapter:
        folder.adapter.mkdir()
    return folder


def build_whole_run(path: Path, **changes: Any) -> RunFolder:
    """Write a run folder that has everything, with some parts changed."""
    parts = {
        "record": record(),
        "config": config_values(),
        "data": data(),
        "evaluation": evaluation(),
        "samples": samples(),
        "metrics": metrics(300),
    }
    return build_run(path, **(parts | changes))
