"""Quantized bases on an accelerator: the products of dequantized weights, unchanged by an evaluation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch.nn import functional
from transformers import AutoTokenizer, get_linear_schedule_with_warmup

import loralab
from gpu.world import DEVICE, ON_GPU, VOCABULARY, adapted, curve, draw_adapter, examples, run_config, save_base
from integration.test_plain_loop import plain_batch
from loralab.config.schema import LoraConfig, ModelConfig
from loralab.evaluation.perplexity import measure_loss
from loralab.layout.planner import Planner
from loralab.models.adapters import build_adapter
from loralab.models.determinism import resolve_determinism, restored_algorithms
from loralab.models.load import load_base_model
from loralab.models.quantized import quantized_layers
from loralab.models.self_check import resolve_tree_kernel
from loralab.models.supervised import SupervisedPeftModel
from loralab.progress import Reporter
from loralab.training.loss import run_micro_batches
from loralab.training.sampler import StepSampler
from support import quantized, tiny
from support.quantized import KINDS
from support.tiny import Family

BASES: dict[str, tuple[Family, dict[str, int]]] = {
    "gpt2": ("gpt2", {}),
    "llama": ("llama", {}),
    "qwen2, with bias": ("qwen2", {}),
    "llama, width 172": ("llama", {"intermediate_size": 172}),
}
HALF = torch.bfloat16


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: save_base(folder / name, family, **sizes) for name, (family, sizes) in BASES.items()}


def load(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    section = ModelConfig(name=str(folder), device=DEVICE.type, **KINDS[kind])
    base, _ = load_base_model(section, dtype=dtype, device=DEVICE)
    return base


def build(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> SupervisedPeftModel:
    model, _ = build_adapter(load(folder, kind, dtype), LoraConfig(r=4), seed=0)
    model.to(DEVICE)
    draw_adapter(model)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", BASES)
def test_products_are_those_of_the_dequantized_weights(bases: dict[str, Path], shape: str, kind: str) -> None:
    for name, layer in quantized_layers(load(bases[shape], kind)):
        assert layer.weight.device == DEVICE
        inputs = torch.randn(5, layer.in_features, device=DEVICE).requires_grad_()
        weight = quantized.expected_weights(layer).to(DEVICE)
        found, expected = layer(inputs), functional.linear(inputs, weight, layer.bias)
        (gradient,) = torch.autograd.grad(found.square().sum(), inputs)
        (wanted,) = torch.autograd.grad(expected.square().sum(), inputs)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=name)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_quantized_weights_are_those_of_the_cpu(bases: dict[str, Path], kind: str) -> None:
    """The same file under the same setting is the same base, wherever it is loaded."""
    here = dict(quantized_layers(load(bases["llama"], kind)))
    there = dict(quantized_layers(quantized.load(bases["llama"], **KINDS[kind])))
    assert here.keys() == there.keys()
    different, count = 0, 0
    for name, layer in here.items():
        mine, other = (each.dequantized(torch.float32).cpu() for each in (layer, there[name]))
        different += int((~torch.isclose(mine, other, rtol=1e-2, atol=1e-6)).sum())
        count += mine.numel()
    assert different / count < 0.02  # a scale on the border of two values may go either way, with its 64 weights


def gradients_of_a_step(model: SupervisedPeftModel) -> list[torch.Tensor]:
    model.zero_grad()
    model.train()
    step = Planner(4096)(examples(6, length=60))
    run_micro_batches(model, step.micro_batches, device=DEVICE, backward=torch.Tensor.backward)
    return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["nf4", "fp4, single", "int8"])
def test_gradients_are_bit_equal_before_and_after_an_evaluation(
    bases: dict[str, Path], kind: str, dtype: torch.dtype
) -> None:
    model = build(bases["llama, width 172"], kind, dtype)
    with restored_algorithms():
        resolve_determinism(model, DEVICE)
        model.tree_kernel = resolve_tree_kernel(model).value if dtype == HALF else "per_tree"
        before = gradients_of_a_step(model)
        model.eval()
        rows, planner = examples(5, length=40, seed=1), Planner(4096)
        measure_loss(model, rows, planner=planner, batch_size=4, device=DEVICE, reporter=Reporter(), label="validation")
        inputs = {"input_ids": torch.arange(3, 11, device=DEVICE)[None]}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            model(**inputs)
            with model.disable_adapter():
                model(**inputs)
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        after = gradients_of_a_step(model)
    assert before
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_loss_and_gradients_are_those_of_the_dequantized_weights(bases: dict[str, Path], kind: str) -> None:
    model = build(bases["qwen2, with bias"], kind)
    twin = adapted(quantized.plain_twin(bases["qwen2, with bias"], model).to(DEVICE))
    planner, rows = Planner(4096, layout="padded"), examples(6, length=60)
    found = []
    for each in (model, twin):
        each.eval()
        step = planner(rows)
        result = run_micro_batches(each, step.micro_batches, device=DEVICE, backward=torch.Tensor.backward)
        grads = torch.cat([w.grad.flatten() for w in each.parameters() if w.grad is not None])
        found.append((float(result.total), grads))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert float((found[0][1] - found[1][1]).norm() / found[1][1].norm()) < 1e-4
    assert max(int(b.labels.max()) for b in step.micro_batches) < VOCABULARY


def plain_curve(base: Path, twin: Any) -> list[float]:
    """Return the losses of a plain loop over plain torch layers on the device."""
    tokenizer, rows = AutoTokenizer.from_pretrained(base), tiny.alpaca_rows(32)
    torch.manual_seed(7)
    model = get_peft_model(twin, PeftLoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])).eval()
    model.to(DEVICE)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    sampler = StepSampler(rows=32, rows_per_step=4, seed=7)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, len(sampler))
    losses = []
    for indices in sampler:
        ids, mask, labels = (t.to(DEVICE) for t in plain_batch(tokenizer, [rows[i] for i in indices]))
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_the_curve_is_a_plain_loops_on_the_dequantized_weights(
    bases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    base = bases["llama"]
    sections: dict[str, Any] = {
        "model": KINDS[kind],
        "lora": {"target_modules": ["q_proj", "down_proj"]},
        "training": {"seed": 7, "layout": "auto" if kind == "nf4" else "padded"},
        "evaluation": {"strategy": "steps", "steps": 2, "num_samples": 1, "max_new_tokens": 2},
    }
    run = loralab.train(run_config(base, tmp_path, "run", **sections))
    twin = quantized.plain_twin(base, load(base, kind)).to(DEVICE)
    assert curve(run) == pytest.approx(plain_curve(base, twin), rel=1e-3 if ON_GPU else 1e-5)
    assert len(curve(run)) == 8
    assert run.record["model"]["quantization"]["layers"] == 14
