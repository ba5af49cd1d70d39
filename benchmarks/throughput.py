"""Tokens per second of loralab and of plain transformers + peft on the same rows, side by side.

Both train the same adapter on the same model, batches and order; each epoch of one is followed
by an epoch of the other, and the ratio of each pair is reported. Without arguments it takes the
demo's embedded model and rows. Run it on an idle machine:

    python benchmarks/throughput.py [--model FOLDER --data FILE.json] [--rows 200] [--repeats 5]
        [--layout shared|packed|padded] [--batch 4] [--precision float32|bfloat16] [--device cpu|cuda]
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from loralab.config.schema import DataConfig, LoraConfig, ModelConfig
from loralab.data.dataset import PreparedData, prepare_data
from loralab.layout.collate import StepBatch
from loralab.layout.planner import Planner
from loralab.models.adapters import build_adapter
from loralab.models.load import load_base_model, load_tokenizer
from loralab.models.self_check import resolve_tree_kernel
from loralab.models.targets import resolve_target_modules
from loralab.progress import Reporter
from loralab.training.loss import run_micro_batches
from loralab.workflows.demo import demo_files

LENGTH = 512


def steps_of(data: PreparedData, planner: Planner, *, batch: int, rows: int) -> list[StepBatch]:
    """Return the steps of the first rows, in their order."""
    split = data.splits["train"]
    return [planner([split[i] for i in range(s, s + batch)]) for s in range(0, rows - batch + 1, batch)]


def device_of(model: torch.nn.Module) -> torch.device:
    """Return where a model is."""
    return next(model.parameters()).device


def plain_epoch(model: torch.nn.Module, steps: list[StepBatch], optimizer: torch.optim.Optimizer) -> list[float]:
    """Train one epoch as a plain script does: full logits, labels of -100; return the losses."""
    losses = []
    for step in steps:
        batch = step.micro_batches[0].to(device_of(model))
        labels = torch.full_like(batch.input_ids, -100)
        shifted = torch.full_like(batch.input_ids, -100).flatten()
        shifted[batch.label_positions] = batch.labels
        labels[:, 1:] = shifted.view_as(labels)[:, :-1]
        # The last answer token is a label only; the plain form reads it too.
        tail = shifted.view_as(labels)[:, -1:]
        ids = torch.cat([batch.input_ids, tail.clamp_min(0)], dim=1)
        mask = torch.cat([batch.attention_mask, (tail >= 0).long()], dim=1)
        labels = torch.cat([labels, tail], dim=1)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def our_epoch(model: torch.nn.Module, steps: list[StepBatch], optimizer: torch.optim.Optimizer) -> list[float]:
    """Train one epoch with loralab's loop; return the losses."""
    losses = []
    for step in steps:
        count = step.supervised_tokens
        result = run_micro_batches(
            model, step.micro_batches, device=device_of(model), backward=lambda s, n=count: (s / n).backward()
        )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(result.total) / count)
    return losses


def main() -> None:
    """Measure and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(demo_files() / "base"))
    parser.add_argument("--data", type=Path, default=demo_files() / "instructions.jsonl")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stop-token", action="append")
    parser.add_argument("--layout", default="shared", choices=("shared", "packed", "padded"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    model = ModelConfig(name=arguments.model, precision=arguments.precision, device=arguments.device)
    section = DataConfig(train=str(arguments.data), max_length=LENGTH, stop_tokens=arguments.stop_token)
    data = prepare_data(section, load_tokenizer(model), reporter=Reporter())
    dtype = getattr(torch, arguments.precision)
    lora = LoraConfig(target_modules="attention")
    base, _ = load_base_model(model, dtype=dtype, device=device)
    targets = resolve_target_modules(base, lora).value
    ours, _ = build_adapter(base, lora, seed=0)
    ours.to(device)
    ours.tree_kernel = resolve_tree_kernel(ours).value
    rows = min(arguments.rows, len(data.splits["train"]))
    planner = Planner(4096, layout=arguments.layout)
    steps = steps_of(data, planner, batch=arguments.batch, rows=rows)
    padded = steps_of(data, Planner(1 << 30, layout="padded"), batch=arguments.batch, rows=rows)
    torch.manual_seed(0)
    plain_base = AutoModelForCausalLM.from_pretrained(
        arguments.model,
        dtype=dtype,
        config=copy.deepcopy(base.config),  # without the base's dropout, as ours
    )
    plain = get_peft_model(
        plain_base.to(device), PeftLoraConfig(r=lora.r, lora_alpha=int(lora.alpha), target_modules=targets)
    )
    contenders = {"loralab": (ours, our_epoch, steps), "plain": (plain, plain_epoch, padded)}
    optimizers = {
        n: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3)
        for n, (m, _, _) in contenders.items()
    }
    tokens = sum(step.example_tokens for step in steps)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    losses: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.repeats):
        for name, (network, epoch, batches) in contenders.items():
            network.train()
            started = time.perf_counter()
            losses[name] += epoch(network, batches, optimizers[name])
            rates[name].append(tokens / (time.perf_counter() - started))
    pairs = [a / b for a, b in zip(rates["loralab"], rates["plain"], strict=True)]
    worst = max(abs(a - b) / b for a, b in zip(losses["loralab"], losses["plain"], strict=True))
    print(
        json.dumps(
            {
                "tokens_per_second": {name: round(statistics.median(values)) for name, values in rates.items()},
                "ratio_median": round(statistics.median(pairs), 3),
                "ratio_range": [round(min(pairs), 3), round(max(pairs), 3)],
                "largest_relative_loss_difference": worst,
                "steps": len(steps),
                "tokens_per_epoch": tokens,
                "laid_out_share": round(sum(step.tokens for step in steps) / tokens, 3),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
