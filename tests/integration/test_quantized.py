"""Quantized bases: evaluation never changes training, and the curve is the one of the dequantized weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import AutoTokenizer, get_linear_schedule_with_warmup

import loralab
from integration.test_plain_loop import plain_batch
from loralab.config.schema import LoraConfig
from loralab.errors import ConfigError, RunFolderError
from loralab.evaluation.perplexity import measure_loss
from loralab.layout.planner import Planner
from loralab.models.adapters import build_adapter
from loralab.models.supervised import SupervisedPeftModel
from loralab.progress import Reporter
from loralab.training.sampler import StepSampler
from support import quantized, tiny
from support.layouts import (
    ALWAYS_SHARE,
    CPU,
    Gradients,
    draw_adapter,
    largest_difference,
    loss_and_gradients,
    sharing_rows,
    transformers_loss_and_gradients,
)

ROWS, BATCH, RATE, SEED = 16, 4, 1e-2, 7
ALL = 1_000_000
PLANNERS = {
    "padded": Planner(ALL, layout="padded"),
    "padded, one row at a time": Planner(1, layout="padded"),
    "packed, 90 tokens": Planner(90, layout="packed"),
    "shared": Planner(ALL, cost=ALWAYS_SHARE),
    "shared, 50 tokens": Planner(50, cost=ALWAYS_SHARE),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {shape: quantized.save_base(folder / str(i), shape) for i, shape in enumerate(quantized.SHAPES)}


def build(base: Path, *, checkpointing: bool = False, **settings: Any) -> SupervisedPeftModel:
    loaded = quantized.load(base, **settings)
    if checkpointing:
        enable = getattr(loaded, "activation_checkpointing_enable", None) or loaded.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    model, _ = build_adapter(loaded, LoraConfig(r=4), seed=0)
    draw_adapter(model, seed=1)
    model.tree_kernel = "per_tree"
    return model


def gradients_of_a_step(model: SupervisedPeftModel) -> Gradients:
    return loss_and_gradients(model, PLANNERS["shared"], sharing_rows(0, vocabulary=97))[1]


def evaluate(model: SupervisedPeftModel) -> None:
    """Evaluate adapter and base in evaluation mode, and let the model answer."""
    rows, ids = sharing_rows(1, vocabulary=97), torch.arange(3, 11)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model.eval()
    measure_loss(
        model, rows, planner=PLANNERS["shared"], batch_size=4, device=CPU, reporter=Reporter(), label="validation"
    )
    with torch.no_grad():
        model(**inputs)
        with model.disable_adapter():
            model(**inputs)
    model.generate(**inputs, max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("kind", quantized.KINDS)
@pytest.mark.parametrize("shape", quantized.SHAPES)
def test_gradients_are_bit_equal_before_and_after_an_evaluation(bases: dict[str, Path], shape: str, kind: str) -> None:
    model = build(bases[shape], **quantized.KINDS[kind])
    before = gradients_of_a_step(model)
    evaluate(model)
    after = gradients_of_a_step(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("shape", "kind"), [("llama, widths 44 and 172", "nf4"), ("qwen2, widths 96 and 36", "int8")])
def test_every_layout_gives_the_loss_and_gradients_of_the_dequantized_weights(
    bases: dict[str, Path], shape: str, kind: str, checkpointing: bool
) -> None:
    model = build(bases[shape], checkpointing=checkpointing, **quantized.KINDS[kind])
    twin, _ = build_adapter(quantized.plain_twin(bases[shape], model), LoraConfig(r=4), seed=0)
    draw_adapter(twin, seed=1)
    rows = sharing_rows(0, vocabulary=97)
    expected, expected_gradients = transformers_loss_and_gradients(twin, rows)
    for name, planner in PLANNERS.items():
        loss, gradients, _ = loss_and_gradients(model, planner, rows)
        assert loss == pytest.approx(expected, rel=1e-5), name
        assert largest_difference(gradients, expected_gradients) <= 1e-5, name


def run_config(base: Path, folder: Path, name: str, **sections: dict[str, Any]) -> dict[str, Any]:
    """Return a run of 8 steps that evaluates after every one."""
    rows = tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(ROWS))
    validation = tiny.write_rows(folder / "validation.json", tiny.alpaca_rows(4, seed=5))
    config = tiny.run_config(base, rows, folder / name, **sections)
    config["data"]["validation"] = str(validation)
    config["training"] |= {"num_train_epochs": 2, "learning_rate": RATE, "seed": SEED}
    config["evaluation"] |= {"strategy": "steps", "steps": 1, "num_samples": 1, "max_new_tokens": 2}
    return config


def plain_curve(base: Path, twin: Any, targets: list[str], *, gpt2: bool) -> list[float]:
    """Return the losses of a plain loop over plain torch layers."""
    tokenizer, rows = AutoTokenizer.from_pretrained(base), tiny.alpaca_rows(ROWS)
    torch.manual_seed(SEED)
    model = get_peft_model(twin, PeftLoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=gpt2))
    model.eval()  # no dropout
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    sampler = StepSampler(rows=ROWS, rows_per_step=BATCH, seed=SEED)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 2 * len(sampler))
    losses = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for indices in sampler:
            ids, mask, labels = plain_batch(tokenizer, [rows[i] for i in indices])
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ("gpt2", "nf4"),
        ("gpt2, width 44", "int8"),
        ("llama, widths 44 and 172", "fp4"),
        ("llama", "nf4, single"),
        ("qwen2, with bias", "fp4, single"),
        ("qwen2, widths 96 and 36", "nf4"),
    ],
)
def test_the_curve_is_a_plain_loops_on_the_dequantized_weights(
    bases: dict[str, Path], tmp_path: Path, shape: str, kind: str
) -> None:
    base, gpt2 = bases[shape], shape.startswith("gpt2")
    targets = ["c_attn", "c_fc"] if gpt2 else ["q_proj", "down_proj"]
    settings = quantized.KINDS[kind]
    config = run_config(base, tmp_path, "run", model=settings, lora={"target_modules": targets})
    curve = [line["loss"] for line in loralab.train(config).metrics if "loss" in line]
    twin = quantized.plain_twin(base, quantized.load(base, **settings))
    assert curve == pytest.approx(plain_curve(base, twin, targets, gpt2=gpt2), rel=1e-5)
    assert len(curve) == 8


def tensors_in(state: Any) -> list[torch.Tensor]:
    """Return the tensors of nested dictionaries."""
    if isinstance(state, dict):
        return [tensor for part in state.values() for tensor in tensors_in(part)]
    return [state] if torch.is_tensor(state) else []


@pytest.mark.parametrize(("kind", "optim"), [("nf4", "adamw_torch"), ("int8", "adamw_8bit")])
def test_a_killed_run_resumes_to_the_same_adapter(
    bases: dict[str, Path], tmp_path: Path, kind: str, optim: str
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None, "optim": optim}
    # Wide enough for moments in 8 bits: those of fewer than 4096 numbers are kept in 32.
    sections: dict[str, Any] = {"model": quantized.KINDS[kind], "training": saving, "lora": {"r": 128}}
    config = run_config(bases["qwen2, with bias"], tmp_path, "whole", **sections)
    whole = loralab.train(config)
    state = torch.load(whole.path / "checkpoints" / "checkpoint-8" / "optimizer.pt", weights_only=True)["state"]
    moments = {tensor.dtype for tensor in tensors_in(state)}
    assert (torch.uint8 in moments) is (optim == "adamw_8bit")
    cut = Path(shutil.copytree(whole.path, tmp_path / "cut"))
    for step in (6, 8):
        shutil.rmtree(cut / "checkpoints" / f"checkpoint-{step}")
    shutil.rmtree(cut / "adapter")
    record = json.loads((cut / "run.json").read_text())
    (cut / "run.json").write_text(json.dumps(record | {"status": "running"}))
    config["output"]["dir"] = str(cut)
    resumed = loralab.train(config, resume=True)
    assert resumed.record["adapter_sha256"] == whole.record["adapter_sha256"]
    assert [line.get("loss") for line in resumed.metrics] == [line.get("loss") for line in whole.metrics]


def test_a_resume_under_another_quantization_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    config = run_config(bases["llama"], tmp_path, "run", model=quantized.KINDS["nf4"], training=saving)
    run = loralab.train(config)
    record = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps(record | {"status": "running"}))
    config["model"]["double_quantization"] = False
    with pytest.raises(RunFolderError, match=r"model\.quantization was 'nf4, double', now 'nf4'"):
        loralab.train(config, resume=True)


def test_a_run_records_what_quantization_did(bases: dict[str, Path], tmp_path: Path) -> None:
    config = run_config(bases["gpt2"], tmp_path, "run", model=quantized.KINDS["nf4"], training={"max_steps": 1})
    run = loralab.train(config)
    facts = run.record["model"]["quantization"]
    layers = 2 * (32 * 96 + 32 * 32 + 32 * 128 + 128 * 32)
    assert (facts["layers"], facts["weights"]) == (8, layers)
    assert (
        run.record["model"]["parameters"]
        == layers + facts["weights_not_quantized"] + (run.record["model"]["trainable_parameters"])
    )
    assert set(facts["error_by_layer"]) == {"c_attn", "c_fc", "c_proj"}
    assert 0.05 < facts["error"]["relative"] < 0.15
    assert run.record["resolved"]["quantization"]["value"] == "nf4, double"


def test_a_paged_optimizer_is_refused_on_a_cpu(bases: dict[str, Path], tmp_path: Path) -> None:
    config = run_config(bases["llama"], tmp_path, "run", training={"optim": "paged_adamw_8bit"})
    with pytest.raises(ConfigError, match="only the memory of a CUDA device is paged"):
        loralab.train(config)
