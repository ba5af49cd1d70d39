"""Tokens per second and peak memory on a GPU: loralab, a plain transformers + peft loop, TRL's SFTTrainer.

Models have real shapes and random weights, rows have realistic lengths; all see the same rows in the same order. Each
epoch of loralab is followed by one of the plain loop, and the ratio of each pair is reported; TRL's trainer, where it
is installed, runs alone at the end. The plain loop pads each batch and computes all logits, as a short script does; TRL
runs under its own defaults. Run it on an idle machine:

    python benchmarks/gpu_throughput.py --shape qwen2.5-0.5b --batch 32
    python benchmarks/gpu_throughput.py --shape llama3-8b --quantization nf4 --batch 16 [--checkpointing]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from gpu_shapes import LORA, SHAPES, build_base, build_ours, draw_rows, enable_checkpointing
from loralab.data.example import TokenizedExample
from loralab.layout.collate import StepBatch
from loralab.layout.planner import Planner
from loralab.models.determinism import resolve_determinism, restored_algorithms
from loralab.models.targets import linear_layers
from loralab.training.loss import run_micro_batches

try:
    from trl import SFTConfig, SFTTrainer
except ImportError:
    SFTTrainer = None

Epoch = Callable[[], list[float]]


def wait(device: torch.device) -> None:
    """Let the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def allocated(device: torch.device) -> int:
    """Return the bytes that tensors hold on the device."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer that both loops use."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def our_epoch(model: Any, batches: Sequence[Sequence[TokenizedExample]], planner: Planner, device: Any) -> Epoch:
    """Return an epoch of loralab's loop, laying out the steps included."""
    optimizer = adamw(model)
    number = 0

    def epoch() -> list[float]:
        nonlocal number
        losses = []
        for rows in batches:
            step: StepBatch = planner(rows)
            count = step.supervised_tokens
            result = run_micro_batches(
                model,
                step.micro_batches,
                device=device,
                backward=lambda s, n=count: (s / n).backward(),
                dropout_key=(0, number),
            )
            losses.append(float(result.total) / count)  # a run reads every loss: it must see one that diverges
            optimizer.step()
            optimizer.zero_grad()
            number += 1
        return losses

    return epoch


def plain_epoch(model: Any, batches: Sequence[Sequence[TokenizedExample]], device: Any) -> Epoch:
    """Return an epoch as a plain script runs it: padded rows, labels of -100, all logits."""
    optimizer = adamw(model)

    def epoch() -> list[float]:
        losses = []
        for rows in batches:
            ids, mask, labels = (tensor.to(device) for tensor in padded(rows))
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        return losses

    return epoch


def padded(rows: Sequence[TokenizedExample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, mask and labels of a batch."""
    chains = [(np.concatenate([b.prompt_ids, b.answer_ids]), len(b.prompt_ids)) for e in rows for b in e.branches]
    length = max(len(ids) for ids, _ in chains)
    found = torch.zeros((len(chains), length), dtype=torch.long)
    mask, labels = torch.zeros_like(found), torch.full_like(found, -100)
    for row, (ids, prompt) in enumerate(chains):
        found[row, : len(ids)] = torch.from_numpy(ids)
        mask[row, : len(ids)] = 1
        labels[row, prompt : len(ids)] = found[row, prompt : len(ids)]
    return found, mask, labels


def build_plain(arguments: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> Any:
    """Return PEFT's own model on the library's own layers."""
    base = build_base(
        arguments.shape, quantization=arguments.quantization, dtype=dtype, device=device, own_layers=False
    )
    targets = sorted({name.rpartition(".")[2] for name in linear_layers(base)})
    if arguments.checkpointing:
        enable_checkpointing(base)
    conv = arguments.shape == "gpt2"
    lora = PeftLoraConfig(
        r=LORA.r,
        lora_alpha=int(LORA.alpha),
        lora_dropout=arguments.dropout,
        target_modules=targets,
        fan_in_fan_out=conv,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, lora).to(device).train()


def time_trl(model: Any, rows: Sequence[TokenizedExample], arguments: argparse.Namespace, device: torch.device) -> Any:
    """Return seconds and peak bytes of TRL's trainer on the rows, after a first pass over them."""
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    data = Dataset.from_list(
        [
            {
                "input_ids": [*map(int, b.prompt_ids), *map(int, b.answer_ids)],
                "completion_mask": [0] * len(b.prompt_ids) + [1] * len(b.answer_ids),
            }
            for e in rows
            for b in e.branches
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            use_cpu=device.type == "cpu",
            bf16=device.type == "cuda",
            per_device_train_batch_size=arguments.batch,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            dataloader_drop_last=True,
            max_length=None,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=1000,
        )
        trainer = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        wait(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        trainer.train()
        wait(device)
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        named = {name: getattr(settings, name, None) for name in ("loss_type", "activation_checkpointing", "bf16")}
        return seconds, peak, named


@dataclass
class Timed:
    """What epochs of each contender gave, by name.

    Attributes:
        rates: tokens per second of each epoch but the first.
        losses: of every step.
        peaks: bytes, without what the other contender holds.
        warm_seconds: of the first epoch.
        failed: those that ran out of memory.
    """

    rates: dict[str, list[float]]
    losses: dict[str, list[float]]
    peaks: dict[str, int]
    warm_seconds: dict[str, float]
    failed: list[str]


def time_pairs(
    epochs: Mapping[str, Epoch], *, repeats: int, tokens: int, held: Mapping[str, int], device: torch.device
) -> Timed:
    """Run an epoch of each in turn, a first one untimed."""
    names = list(epochs)
    timed = Timed({n: [] for n in names}, {n: [] for n in names}, dict.fromkeys(names, 0), {}, [])
    on_gpu = device.type == "cuda"
    for number in range(repeats + 1):
        for name in (name for name in names if name not in timed.failed):
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            wait(device)
            started = time.perf_counter()
            try:
                timed.losses[name] += epochs[name]()
            except torch.OutOfMemoryError:
                timed.failed.append(name)
                continue
            wait(device)
            seconds = time.perf_counter() - started
            if number == 0:
                timed.warm_seconds[name] = round(seconds, 2)
                continue
            timed.rates[name].append(tokens / seconds)
            if on_gpu:
                other = "plain" if name == "loralab" else "loralab"
                timed.peaks[name] = max(timed.peaks[name], torch.cuda.max_memory_allocated() - held[other])
    return timed


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one case."""
    device = torch.device(arguments.device)
    dtype = getattr(torch, arguments.precision)
    rows = draw_rows(
        arguments.rows,
        vocabulary=SHAPES[arguments.shape].vocab_size,
        prompt=arguments.prompt,
        answer=arguments.answer,
        longest=arguments.longest,
        preamble=arguments.preamble,
    )
    batches = [rows[s : s + arguments.batch] for s in range(0, len(rows) - arguments.batch + 1, arguments.batch)]
    planner = Planner(arguments.budget, layout=arguments.layout)
    tokens = sum(planner(batch).example_tokens for batch in batches)
    began, before = time.perf_counter(), allocated(device)
    ours = build_ours(
        arguments.shape,
        quantization=arguments.quantization,
        dtype=dtype,
        device=device,
        checkpointing=arguments.checkpointing,
        dropout=arguments.dropout,
    )
    choice: Any = {}
    if arguments.deterministic:
        choice = {name: found.value for name, found in resolve_determinism(ours, device).items()}
    held = {"loralab": allocated(device) - before}
    started_seconds = time.perf_counter() - began
    before = allocated(device)
    plain = build_plain(arguments, dtype, device)
    held["plain"] = allocated(device) - before
    epochs = {"loralab": our_epoch(ours, batches, planner, device), "plain": plain_epoch(plain, batches, device)}
    timed = time_pairs(epochs, repeats=arguments.repeats, tokens=tokens, held=held, device=device)
    rates, losses, failed = timed.rates, timed.losses, timed.failed
    pairs = [] if failed else [a / b for a, b in zip(rates["loralab"], rates["plain"], strict=True)]
    laid_out = sum(planner(batch).tokens for batch in batches)
    result: dict[str, Any] = {
        "tokens_per_second": {name: round(statistics.median(values)) for name, values in rates.items() if values},
        "ratio_to_plain": [round(v, 3) for v in (min(pairs), statistics.median(pairs), max(pairs))] if pairs else None,
        "out_of_memory": failed,
        "peak_gib": {name: round(peak / 2**30, 2) for name, peak in timed.peaks.items()},
        "base_gib": {name: round(size / 2**30, 2) for name, size in held.items()},
        "loss_first": [round(losses[name][0], 4) for name in epochs if losses[name]],
        "loss_difference": None if failed else max(abs(a - b) / b for a, b in zip(*losses.values(), strict=True)),
        "attention": ours.tree_kernel,
        "head": ours.full_logits_reason or "gathered",
        "steps": len(batches),
        "tokens_per_epoch": tokens,
        "laid_out_share": round(laid_out / tokens, 3),
        "padded_share": round(sum(padded(b)[0].numel() for b in batches) / tokens, 3),
        "start_seconds": round(started_seconds, 1),
        "warm_epoch_seconds": timed.warm_seconds,
        **choice,
    }
    if SFTTrainer is not None and arguments.trl:
        del ours, epochs
        if device.type == "cuda":
            torch.cuda.empty_cache()
        seconds, peak, named = time_trl(plain, rows, arguments, device)
        result["tokens_per_second"]["trl"] = round(tokens / seconds)
        result["peak_gib"]["trl"] = round(peak / 2**30, 2)
        result["trl"] = {key: str(value) for key, value in named.items()}
    return result


def main() -> None:
    """Measure one case and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=SHAPES)
    parser.add_argument("--quantization", default="none", choices=("none", "nf4"))
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layout", default="shared", choices=("shared", "packed", "padded"))
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32, help="rows of an optimizer step")
    parser.add_argument("--budget", type=int, default=16384, help="most tokens of a micro-batch of loralab's")
    parser.add_argument("--prompt", type=int, default=30)
    parser.add_argument("--answer", type=int, default=45)
    parser.add_argument("--preamble", type=int, default=35)
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--deterministic", action="store_true", help="as a run does")
    parser.add_argument("--no-trl", dest="trl", action="store_false")
    arguments = parser.parse_args()
    with restored_algorithms():
        result = measure(arguments)
    shown = {k: v for k, v in vars(arguments).items() if v != parser.get_default(k)}
    name = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "CPU"
    print(json.dumps({"case": shown, "device": name, "torch": torch.__version__, **result}))


if __name__ == "__main__":
    main()
