"""The gradients of a LoRA adapter on an NF4 base, each way of computing them against one reference.

The reference is a plain model in float32 whose weights are the dequantized ones. The same adapter weights and the
same row go through: that model in bfloat16 (what rounding alone does), PEFT on bitsandbytes' layers, TRL's trainer,
and loralab; the last three also after an evaluation of the row. It prints the relative difference of all gradients
together, of the worst tensor, and how many tensors had none:

    python benchmarks/qlora_gradients.py --model FOLDER --rows FILE.jsonl [--threads N]

FILE holds prompt and completion, the completion with its end token.
"""

import argparse
import gc
import json
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes import functional as bnb_functional
from bitsandbytes.nn.modules import Linear4bit
from datasets import Dataset
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from loralab.config.schema import LoraConfig, ModelConfig
from loralab.data.example import Branch, TokenizedExample
from loralab.layout.planner import Planner
from loralab.models.adapters import build_adapter
from loralab.models.load import load_base_model
from loralab.models.self_check import resolve_tree_kernel
from loralab.training.loss import run_micro_batches

Gradients = dict[str, torch.Tensor | None]
Found = dict[str, tuple[Gradients, str | None]]
CPU = torch.device("cpu")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 8, 16


def quantization() -> BitsAndBytesConfig:
    """Return the settings of NF4 with quantized scales, computing in bfloat16."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def adapter_config() -> PeftLoraConfig:
    """Return the adapter that every way has."""
    return PeftLoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")


def set_adapter(model: Any) -> None:
    """Give every LoRA tensor weights that depend on its name alone, representable in bfloat16."""
    for name, parameter in lora_tensors(model).items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        drawn = (torch.randn(parameter.shape, generator=generator) * 0.02).to(torch.bfloat16)
        parameter.data = drawn.to(parameter.dtype)


def lora_tensors(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the LoRA tensors of a model, by the part of their names that all ways share."""
    return {name.partition("layers.")[2]: p for name, p in model.named_parameters() if "lora_" in name}


def take_gradients(model: Any) -> Gradients:
    """Return the gradients of every LoRA tensor in float32, and clear them."""
    found = {n: None if p.grad is None else p.grad.detach().float() for n, p in lora_tensors(model).items()}
    model.zero_grad(set_to_none=True)
    return found


def dequantized_weights(model: Path) -> dict[str, torch.Tensor]:
    """Return what the quantized weights stand for, by name."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, quantization_config=quantization())
    return {
        f"{name}.weight": bnb_functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).clone()
        for name, layer in base.named_modules()
        if isinstance(layer, Linear4bit)
    }


class Row:
    """One row as the ways want it.

    Args:
        model: folder with the tokenizer.
        rows: file whose first row is taken.
    """

    def __init__(self, model: Path, rows: Path) -> None:
        self.text = json.loads(rows.read_text(encoding="utf-8").splitlines()[0])
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.prompt = self.tokenizer(self.text["prompt"], add_special_tokens=False)["input_ids"]
        self.answer = self.tokenizer(self.text["completion"], add_special_tokens=False)["input_ids"]
        self.ids = torch.tensor([[*self.prompt, *self.answer]])
        self.labels = torch.tensor([[*[-100] * len(self.prompt), *self.answer]])


def plain_way(model: Any, row: Row) -> None:
    """Backpropagate the row's loss as transformers computes it."""
    model(input_ids=row.ids, labels=row.labels, use_cache=False).loss.backward()


def our_way(model: Any, row: Row) -> None:
    """Backpropagate the row's loss as loralab computes it."""
    branch = Branch(np.array(row.prompt, np.int32), np.array(row.answer, np.int32))
    step = Planner(1 << 30, layout="shared")([TokenizedExample(1, 0, (branch,))])
    run_micro_batches(
        model, step.micro_batches, device=CPU, backward=lambda total: (total / len(row.answer)).backward()
    )


def measure_way(model: Any, row: Row, *, way: Callable[[Any, Row], None]) -> Found:
    """Return gradients, and the error if there was one, of a fresh model and of one that has evaluated the row."""
    set_adapter(model)
    model.train()
    way(model, row)
    found: Found = {"fresh": (take_gradients(model), None)}
    model.eval()
    with torch.no_grad():
        model(input_ids=row.ids, use_cache=False)
    model.train()
    failure = None
    try:
        way(model, row)
    except RuntimeError as error:
        failure = str(error).splitlines()[0][:200]
    found["after evaluation"] = take_gradients(model), failure
    return found


def build_dequantized(model: Path, weights: dict[str, torch.Tensor], *, dtype: torch.dtype) -> Any:
    """Return a plain model that holds the dequantized weights, with an adapter."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    missing = base.load_state_dict(weights, strict=False).unexpected_keys
    if missing:
        raise SystemExit(f"no such weights: {missing[:3]}")
    return get_peft_model(base, adapter_config())


def build_ours(model: Path) -> Any:
    """Return loralab's model on its own NF4 base."""
    settings = ModelConfig(name=str(model), precision="bfloat16", quantization="nf4", device="cpu")
    base, _ = load_base_model(settings, dtype=torch.bfloat16, device=CPU)
    ours, _ = build_adapter(base, LoraConfig(r=RANK, alpha=ALPHA, target_modules=TARGETS), seed=0)
    ours.tree_kernel = resolve_tree_kernel(ours).value
    return ours


def trl_gradients(model: Path, row: Row) -> Found:
    """Return the gradients that TRL's trainer computes."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=str(model),
            args=SFTConfig(output_dir=folder, use_cpu=True, report_to="none", max_length=None, disable_tqdm=True),
            train_dataset=Dataset.from_list([row.text]),
            processing_class=row.tokenizer,
            quantization_config=quantization(),
            peft_config=adapter_config(),
        )
        batch = next(iter(trainer.get_train_dataloader()))

        def way(network: Any, _: Row) -> None:
            with trainer.compute_loss_context_manager():
                trainer.compute_loss(network, dict(batch), num_items_in_batch=len(row.answer)).backward()

        return measure_way(trainer.model, row, way=way)


def compare(found: Gradients, reference: Gradients) -> dict[str, Any]:
    """Return how far gradients are from the reference."""
    missing = sum(gradient is None for gradient in found.values())
    differences, squared, norm = [], 0.0, 0.0
    for name, right in reference.items():
        gradient = found.get(name)
        given = torch.zeros_like(right) if gradient is None else gradient
        squared += float((given - right).square().sum())
        norm += float(right.square().sum())
        differences.append((float((given - right).norm() / right.norm()), name))
    worst, name = max(differences)
    return {
        "relative_difference": round((squared / norm) ** 0.5, 5),
        "worst_tensor": [name, round(worst, 5)],
        "tensors": len(reference),
        "without_gradient": missing,
    }


def main() -> None:
    """Measure and print one JSON line per way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, row = arguments.model, Row(arguments.model, arguments.rows)
    weights = dequantized_weights(model)
    exact = measure_way(build_dequantized(model, weights, dtype=torch.float32), row, way=plain_way)["fresh"][0]

    def build_peft() -> Any:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, quantization_config=quantization())
        return get_peft_model(base, adapter_config())

    ways: dict[str, Callable[[], Found]] = {
        "dequantized, bfloat16": lambda: measure_way(
            build_dequantized(model, weights, dtype=torch.bfloat16), row, way=plain_way
        ),
        "peft on bitsandbytes": lambda: measure_way(build_peft(), row, way=plain_way),
        "trl": lambda: trl_gradients(model, row),
        "loralab": lambda: measure_way(build_ours(model), row, way=our_way),
    }
    for name, gradients_of in ways.items():
        for when, (gradients, error) in gradients_of().items():
            print(json.dumps({"way": name, "when": when, **compare(gradients, exact), "error": error}), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
