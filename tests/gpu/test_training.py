"""Whole runs on an accelerator: precision, resumes to the same bits, checkpointing, little memory, the doctor."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import loralab
from gpu.world import DEVICE, ON_GPU, curve, killed_after, run_config, save_base
from loralab.doctor.steps import plan_steps, run_step
from support import tiny

EVERY_TWO: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
LOWEST = "bfloat16"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def weights(run: loralab.Run) -> torch.Tensor:
    """Return all adapter weights in one row."""
    tensors = load_file(run.adapter() / "adapter_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_a_run_trains_evaluates_and_answers(base: Path, tmp_path: Path, precision: str) -> None:
    sections: dict[str, Any] = {"model": {"precision": precision}, "training": {"num_train_epochs": 3}}
    run = loralab.train(run_config(base, tmp_path, "run", **sections))
    losses = curve(run)
    assert losses[-1] < 0.9 * losses[0]
    record, evaluation = run.record, json.loads((run.path / "evaluation.json").read_text(encoding="utf-8"))
    assert record["status"] == "completed"
    assert evaluation["eval_loss"] < evaluation["base"]["eval_loss"]
    samples = json.loads((run.path / "samples.json").read_text(encoding="utf-8"))
    assert samples["samples"]
    if ON_GPU:
        assert record["resolved"]["device"]["value"] == "cuda:0"
        assert record["resolved"]["precision"]["value"] == ("bfloat16" if precision == "auto" else "float32")
        assert record["resolved"]["deterministic"]["value"] == "on"
        assert record["peak_memory_bytes"] > 0
        assert record["hardware"]["gpu"] == torch.cuda.get_device_name(0)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("layout", ["padded", "auto"])
def test_float32_gives_the_curve_of_the_cpu(base: Path, tmp_path: Path, layout: str) -> None:
    runs = []
    for name, device in (("here", DEVICE.type), ("there", "cpu")):
        sections: dict[str, Any] = {"model": {"device": device}, "training": {"layout": layout}}
        sections["lora"] = {"dropout": 0.1}
        runs.append(loralab.train(run_config(base, tmp_path, name, **sections)))
    found, expected = runs
    assert curve(found) == pytest.approx(curve(expected), rel=1e-3)
    for which in ("base", None):
        ours, theirs = (
            json.loads((run.path / "evaluation.json").read_text(encoding="utf-8")) for run in (found, expected)
        )
        ours, theirs = (each[which] if which else each for each in (ours, theirs))
        assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-3)
        assert ours["supervised_tokens"] == theirs["supervised_tokens"]


RESUMES: dict[str, dict[str, Any]] = {
    "float32, padded": {"training": {"layout": "padded"}},
    "float32, shared": {},
    "packed": {"model": {"precision": LOWEST}, "training": {"layout": "packed"}},
    "shared, with dropout": {"model": {"precision": LOWEST}, "lora": {"dropout": 0.1}},
    "recomputed": {"model": {"precision": LOWEST}, "training": {"gradient_checkpointing": True}},
    "nf4, 8-bit": {"model": {"precision": LOWEST, "quantization": "nf4"}, "training": {"optim": "adamw_8bit"}},
    "nf4, paged 8-bit": {
        "model": {"precision": LOWEST, "quantization": "nf4"},
        "training": {"optim": "paged_adamw_8bit" if ON_GPU else "adamw_8bit"},
    },
    "int8, paged 32-bit": {
        "model": {"precision": LOWEST, "quantization": "int8"},
        "training": {"optim": "paged_adamw_32bit" if ON_GPU else "adamw_torch", "layout": "packed"},
    },
    "fused": {"training": {"optim": "adamw_torch_fused", "layout": "padded"}},
}


@pytest.mark.parametrize("name", RESUMES)
def test_a_killed_run_resumes_to_the_same_adapter(base: Path, tmp_path: Path, name: str) -> None:
    sections: dict[str, Any] = {part: dict(values) for part, values in RESUMES[name].items()}
    sections["training"] = EVERY_TWO | sections.get("training", {})
    sections["lora"] = {"r": 64} | sections.get("lora", {})  # moments of fewer than 4096 numbers stay in 32 bits
    config = run_config(base, tmp_path, "whole", **sections)
    whole = loralab.train(config)
    again = loralab.train(run_config(base, tmp_path, "again", **sections))
    assert again.record["adapter_sha256"] == whole.record["adapter_sha256"], "two equal runs differ"
    cut = killed_after(whole, 4, tmp_path / "cut")
    config["output"]["dir"] = str(cut)
    resumed = loralab.train(config, resume=True)
    assert resumed.record["adapter_sha256"] == whole.record["adapter_sha256"]
    assert curve(resumed) == curve(whole)


@pytest.mark.parametrize("precision", ["float32", LOWEST])
def test_recomputed_activations_give_the_same_curve(base: Path, tmp_path: Path, precision: str) -> None:
    runs = []
    for checkpointing in (False, True):
        sections: dict[str, Any] = {
            "model": {"precision": precision},
            "lora": {"dropout": 0.1},
            "training": {"gradient_checkpointing": checkpointing},
        }
        runs.append(loralab.train(run_config(base, tmp_path, str(checkpointing), **sections)))
    assert curve(runs[1]) == pytest.approx(curve(runs[0]), rel=1e-4 if precision == "float32" else 1e-2)
    difference = float((weights(runs[1]) - weights(runs[0])).norm() / weights(runs[0]).norm())
    assert difference < (1e-3 if precision == "float32" else 5e-2)


@pytest.mark.skipif(not ON_GPU, reason="the memory of a CPU has no such limit")
@pytest.mark.parametrize(("layout", "precision"), [("padded", "float32"), ("packed", LOWEST)])
def test_out_of_memory_lowers_the_budget_and_keeps_the_curve(tmp_path: Path, layout: str, precision: str) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "head_dim": 128}
    base = save_base(tmp_path / "base", **sizes)
    rows = [{"text": " ".join(row["output"] for row in tiny.alpaca_rows(90, seed=i))} for i in range(16)]
    sections: dict[str, Any] = {
        "model": {"precision": precision},
        "training": {
            "per_device_train_batch_size": 8,
            "token_budget": 8192,
            "layout": layout,
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
        },
    }
    runs = {}
    for name in ("free", "full"):
        config = run_config(base, tmp_path, name, **sections)
        config["data"] |= {"train": str(tiny.write_rows(tmp_path / "texts.json", rows)), "max_length": 1024}
        config["data"] |= {"validation": None, "format": "text"}
        gc.collect()
        torch.cuda.empty_cache()
        if name == "full":
            held = torch.cuda.memory_allocated()
            allowed = torch.cuda.memory_reserved() + (runs["free"].record["peak_memory_bytes"] - held) // 2
            torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
        torch.cuda.reset_peak_memory_stats()
        try:
            runs[name] = loralab.train(config)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    events = [event["what"] for event in runs["full"].record["events"]]
    assert any("out of memory at step 1: token budget lowered to" in event for event in events), events
    assert not any("out of memory" in event["what"] for event in runs["free"].record["events"])
    assert runs["full"].record["token_budget"]["value"] < 8192
    assert curve(runs["full"]) == pytest.approx(curve(runs["free"]), rel=1e-4 if precision == "float32" else 1e-2)


@pytest.mark.parametrize(
    ("kind", "device", "dtype"), list(plan_steps()), ids=lambda value: str(value).removeprefix("torch.")
)
def test_doctors_steps_pass(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    step = run_step(kind, device, dtype)
    assert step.passed, step


def test_adapter_answers_alike_on_both_devices(base: Path, tmp_path: Path) -> None:
    """What was trained there is read here: the same logits from PEFT's own classes, on either device."""
    run = loralab.train(run_config(base, tmp_path, "run"))
    ids = torch.arange(3, 40)[None]
    logits = []
    for device in (torch.device("cpu"), DEVICE):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.adapter()).to(device).eval()
        with torch.no_grad():
            logits.append(model(input_ids=ids.to(device)).logits.cpu())
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)
