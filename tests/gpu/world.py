"""What the GPU tests share: the device, tiny bases whose heads are wide enough for its kernels, short runs.

The tests are skipped without a CUDA device. `DEVICE` is the CPU then, so that all but the kernels can
be rehearsed there by taking the skips away.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import loralab
from loralab.config.schema import LoraConfig
from loralab.data.example import Branch, TokenizedExample
from loralab.models.adapters import build_adapter
from loralab.models.supervised import SupervisedPeftModel
from loralab.training.checkpoint import list_checkpoints
from support import tiny
from support.tiny import Family

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if ON_GPU else "cpu")
VOCABULARY = 128
# Heads of 16 numbers: FlexAttention takes no smaller ones, flash attention only multiples of 8.
_SIZES: dict[Family, dict[str, float]] = {
    # Without its own dropout, as the product loads it: with it, no kernel but the dense one takes trees.
    "gpt2": {"n_embd": 64, "n_positions": 2048, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "max_position_embeddings": 2048},
    "qwen2": {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 2048},
}


def build_base(family: Family, *, vocabulary: int = VOCABULARY, **sizes: float) -> Any:
    """Return a random base in float32 on the CPU, biases drawn too."""
    config = tiny.build_model(family, vocabulary=vocabulary).config
    config.update(_SIZES[family] | sizes)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.data = 0.1 * torch.randn_like(weight)
    return model


def save_base(folder: Path, family: Family = "llama", **sizes: float) -> Path:
    """Write such a base with its tokenizer."""
    tokenizer = tiny.build_tokenizer()
    build_base(family, vocabulary=len(tokenizer), **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def draw_adapter(model: SupervisedPeftModel) -> None:
    """Give every lora_B a random value: at zero, half of all gradients are zero."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = (torch.randn(weight.shape, generator=generator) * 0.1).to(weight)


def adapted(base: Any, *, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> SupervisedPeftModel:
    """Return a base on the device with a drawn adapter of float32 weights, in evaluation mode."""
    base = base.to(device=DEVICE, dtype=dtype).requires_grad_(False)
    model, _ = build_adapter(base, LoraConfig(r=4, dropout=dropout), seed=0)
    model.to(DEVICE)
    draw_adapter(model)
    return model.eval()  # without the base's dropout


def examples(count: int, *, length: int, seed: int = 0) -> list[TokenizedExample]:
    """Return rows that begin alike and differ in length."""
    draw = np.random.default_rng(seed)
    document = draw.integers(1, VOCABULARY, length)
    found = []
    for index in range(count):
        prompt = np.concatenate([document[: length - index % 3], draw.integers(1, VOCABULARY, 6)]).astype(np.int32)
        answer = draw.integers(1, VOCABULARY, 4 + index).astype(np.int32)
        found.append(TokenizedExample(index + 1, 0, (Branch(prompt, answer),)))
    return found


def run_config(base: Path, folder: Path, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """Return a run of 8 steps in float32 on the device; `sections` override field by field."""
    rows = tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(32))
    validation = tiny.write_rows(folder / "validation.json", tiny.alpaca_rows(6, seed=5))
    config = tiny.run_config(base, rows, folder / name, **sections)
    config["model"] = {"name": str(base), "precision": "float32", "device": DEVICE.type} | sections.get("model", {})
    config["data"] |= {"validation": str(validation)}
    config["evaluation"] = {"num_samples": 1, "max_new_tokens": 8, "bootstrap_samples": 200} | sections.get(
        "evaluation", {}
    )
    return config


def curve(run: loralab.Run) -> list[float]:
    """Return the logged training losses."""
    return [line["loss"] for line in run.metrics if "loss" in line]


def killed_after(run: loralab.Run, step: int, folder: Path) -> Path:
    """Return a copy of a run as a kill soon after `step` leaves it."""
    cut = Path(shutil.copytree(run.path, folder))
    for path in list_checkpoints(cut / "checkpoints"):
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)
    shutil.rmtree(cut / "adapter")
    record = json.loads((cut / "run.json").read_text(encoding="utf-8"))
    (cut / "run.json").write_text(json.dumps(record | {"status": "running"}), encoding="utf-8")
    return cut


def losses(run: Path) -> list[float]:
    """Return the logged training losses of a run folder."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def check_same(one: Path, other: Path, *, rel: float) -> None:
    """Check that two runs have one curve and one adapter, whose tensors may differ a hundred times as much."""
    assert losses(one)
    assert losses(other) == pytest.approx(losses(one), rel=rel)
    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert float((second[name] - tensor).norm() / tensor.norm()) <= 100 * rel, name
