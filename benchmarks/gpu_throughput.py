"""Tokens per second and peak memory on a GPU: loralab, a plain transformers + peft loop, TRL's SFTTrainer.

Models have real shapes and random weights, rows have realistic lengths; all see the same rows in the same order. One
contender after the other has the device for itself: a first epoch that compiles, then timed ones. The plain loop pads
each batch and computes all logits, as a short script does. TRL runs under its own defaults (`trl`) and as fast as its
settings make it (`trl_best`: nothing recomputed, rows grouped by length, Liger's kernels where they are installed;
these change transformers' modules, so it comes last). Run it on an idle machine:

    python benchmarks/gpu_throughput.py --shape qwen2.5-0.5b --batch 32
    python benchmarks/gpu_throughput.py --shape llama3-8b --quantization nf4 --batch 16 [--checkpointing]
"""

import argparse
import gc
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from gpu_shapes import LORA, SHAPES, build_base, build_ours, draw_rows
from loralab.data.example import TokenizedExample
from loralab.layout.collate import StepBatch
from loralab.layout.planner import Planner
from loralab.models.determinism import resolve_determinism, restored_algorithms
from loralab.models.layer_stack import enable_recomputation
from loralab.models.targets import linear_layers
from loralab.training.loss import run_micro_batches

try:
    from trl import SFTConfig, SFTTrainer
except ImportError:
    SFTTrainer = None

LIGER = importlib.util.find_spec("liger_kernel") is not None
Epoch = Callable[[], list[float]]


@dataclass
class Timed:
    """What epochs of a contender gave.

    Attributes:
        rates: tokens of the rows per second, of each timed epoch.
        losses: of every step that is known.
        peak_bytes: most that tensors held.
        held_bytes: what the model holds before the first step.
        first_seconds: of building the model and the first epoch.
        facts: what else is worth saying.
    """

    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    held_bytes: int = 0
    first_seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    def shown(self) -> dict[str, Any]:
        """Return what the JSON document says."""
        return {
            "tokens_per_second": round(statistics.median(self.rates)) if self.rates else None,
            "range": [round(min(self.rates)), round(max(self.rates))] if self.rates else None,
            "peak_gib": round(self.peak_bytes / 2**30, 2),
            "held_gib": round(self.held_bytes / 2**30, 2),
            "first_seconds": round(self.first_seconds, 1),
            "loss_first": round(self.losses[0], 4) if self.losses else None,
            **self.facts,
        }


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        arguments: the command line's.
        device: where.
        rows: all rows.
        batches: rows of each step.
    """

    arguments: argparse.Namespace
    device: torch.device
    rows: list[TokenizedExample]
    batches: list[list[TokenizedExample]]

    @property
    def tokens(self) -> int:
        """Tokens of the rows of an epoch, each branch on its own."""
        planner = Planner(self.arguments.budget, layout="padded")
        return sum(planner(batch).example_tokens for batch in self.batches)

    @property
    def dtype(self) -> torch.dtype:
        """The compute type."""
        found: torch.dtype = getattr(torch, self.arguments.precision)
        return found


def wait(device: torch.device) -> None:
    """Let the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def time_epochs(case: Case, timed: Timed, epoch: Epoch) -> None:
    """Run a first epoch and the timed ones."""
    for number in range(case.arguments.repeats + 1):
        wait(case.device)
        if case.device.type == "cuda" and number == 1:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        timed.losses += epoch()
        wait(case.device)
        if number:
            timed.rates.append(case.tokens / (time.perf_counter() - started))
    timed.peak_bytes = torch.cuda.max_memory_allocated() if case.device.type == "cuda" else 0


def finish_step(optimizer: torch.optim.Optimizer) -> None:
    """Clip, update and clear gradients, as a run does."""
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer that both loops use."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)


def run_loralab(case: Case, timed: Timed) -> None:
    """Measure loralab's steps, their layout included."""
    arguments, device = case.arguments, case.device
    model = build_ours(
        arguments.shape,
        quantization=arguments.quantization,
        dtype=case.dtype,
        device=device,
        checkpointing=arguments.checkpointing,
        dropout=arguments.dropout,
    )
    if arguments.deterministic:
        timed.facts |= {name: found.value for name, found in resolve_determinism(model, device).items()}
    note_held(case, timed)
    planner, optimizer, number = Planner(arguments.budget, layout=arguments.layout), adamw(model), 0
    laid_out = sum(planner(batch).tokens for batch in case.batches)
    timed.facts |= {
        "attention": model.tree_kernel,
        "head": model.full_logits_reason or "gathered",
        "laid_out_share": round(laid_out / case.tokens, 3),
    }

    def epoch() -> list[float]:
        nonlocal number
        losses = []
        for rows in case.batches:
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
            finish_step(optimizer)
            number += 1
        return losses

    time_epochs(case, timed, epoch)


def run_plain(case: Case, timed: Timed) -> None:
    """Measure steps as a plain script runs them: padded rows, labels of -100, all logits."""
    model = build_plain(case)
    note_held(case, timed)
    optimizer = adamw(model)
    padded_tokens = sum(padded(batch)[0].numel() for batch in case.batches)
    timed.facts["padded_share"] = round(padded_tokens / case.tokens, 3)

    def epoch() -> list[float]:
        losses = []
        for rows in case.batches:
            ids, mask, labels = (tensor.to(case.device) for tensor in padded(rows))
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
            loss.backward()
            losses.append(loss.item())
            finish_step(optimizer)
        return losses

    time_epochs(case, timed, epoch)


def note_held(case: Case, timed: Timed) -> None:
    """Note what the model holds before its first step."""
    timed.held_bytes = torch.cuda.memory_allocated() if case.device.type == "cuda" else 0


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


def build_plain(case: Case) -> Any:
    """Return PEFT's own model on the library's own layers."""
    arguments = case.arguments
    base = build_base(
        arguments.shape, quantization=arguments.quantization, dtype=case.dtype, device=case.device, own_layers=False
    )
    if arguments.checkpointing:
        enable_recomputation(base)
    lora = PeftLoraConfig(
        r=LORA.r,
        lora_alpha=int(LORA.alpha),
        lora_dropout=arguments.dropout,
        target_modules=sorted({name.rpartition(".")[2] for name in linear_layers(base)}),
        fan_in_fan_out=arguments.shape == "gpt2",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, lora).to(case.device).train()


def run_trl(case: Case, timed: Timed, *, best: bool = False) -> None:
    """Measure TRL's trainer, an epoch at a time."""
    model = build_plain(case)
    note_held(case, timed)
    data = Dataset.from_list(
        [
            {
                "input_ids": [*map(int, b.prompt_ids), *map(int, b.answer_ids)],
                "completion_mask": [0] * len(b.prompt_ids) + [1] * len(b.answer_ids),
            }
            for batch in case.batches
            for e in batch
            for b in e.branches
        ]
    )
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    further: dict[str, Any] = {"train_sampling_strategy": "sequential"}
    if best:
        further = {"train_sampling_strategy": "group_by_length", "gradient_checkpointing": case.arguments.checkpointing}
        further["use_liger_kernel"] = LIGER and case.device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            use_cpu=case.device.type == "cpu",
            bf16=case.device.type == "cuda",
            per_device_train_batch_size=case.arguments.batch,
            num_train_epochs=1,
            dataloader_drop_last=True,
            max_length=None,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
            **further,
        )
        trainer = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)

        def epoch() -> list[float]:
            trainer.train()
            return [line["loss"] for line in trainer.state.log_history if "loss" in line]

        time_epochs(case, timed, epoch)
    names = ("loss_type", "gradient_checkpointing", "bf16", "use_liger_kernel", "train_sampling_strategy")
    timed.facts |= {name: str(getattr(settings, name)) for name in names}


def run_trl_best(case: Case, timed: Timed) -> None:
    """Measure TRL's trainer under its fastest settings."""
    run_trl(case, timed, best=True)


CONTENDERS: dict[str, Callable[[Case, Timed], None]] = {
    "loralab": run_loralab,
    "plain": run_plain,
    "trl": run_trl,
    "trl_best": run_trl_best,
}


def measure(case: Case, name: str) -> Timed:
    """Measure one contender; of one that runs out of memory nothing is known but that."""
    timed = Timed()
    started = time.perf_counter()
    try:
        CONTENDERS[name](case, timed)
    except torch.OutOfMemoryError:
        timed.facts["out_of_memory"] = True
    whole = time.perf_counter() - started
    timed.first_seconds = whole - sum(case.tokens / rate for rate in timed.rates)
    return timed


def main() -> None:
    """Measure one case and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=SHAPES)
    parser.add_argument("--quantization", default="none", choices=("none", "nf4"))
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS))
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
    arguments = parser.parse_args()
    rows = draw_rows(
        arguments.rows,
        vocabulary=SHAPES[arguments.shape].vocab_size,
        prompt=arguments.prompt,
        answer=arguments.answer,
        longest=arguments.longest,
        preamble=arguments.preamble,
    )
    batches = [rows[s : s + arguments.batch] for s in range(0, len(rows) - arguments.batch + 1, arguments.batch)]
    case = Case(arguments, torch.device(arguments.device), rows, batches)
    names = arguments.contenders or [name for name in CONTENDERS if SFTTrainer or "trl" not in name]
    found: dict[str, Timed] = {}
    for name in names:
        with restored_algorithms():
            found[name] = measure(case, name)
        gc.collect()
        if case.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name}: {json.dumps(found[name].shown())}", flush=True)
    ours = found.get("loralab")
    ratios = {}
    if ours and ours.rates:
        mine = statistics.median(ours.rates)
        ratios = {
            name: round(mine / statistics.median(timed.rates), 2)
            for name, timed in found.items()
            if name != "loralab" and timed.rates
        }
    shown = {k: v for k, v in vars(arguments).items() if v != parser.get_default(k)}
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "CPU"
    document = {"case": shown, "device": device, "torch": torch.__version__, "ratios": ratios}
    document |= {"steps": len(batches), "tokens_per_epoch": case.tokens}
    print(json.dumps(document | {"contenders": {name: timed.shown() for name, timed in found.items()}}))


if __name__ == "__main__":
    main()
