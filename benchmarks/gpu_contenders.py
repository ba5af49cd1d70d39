"""The contenders of `gpu_throughput.py`, and how their epochs are timed."""

import argparse
import functools
import importlib.util
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
from transformers import PreTrainedTokenizerFast, TrainerCallback

from gpu_shapes import LORA, build_base, build_ours
from loralab.data.example import TokenizedExample
from loralab.layout.collate import StepBatch
from loralab.layout.planner import Planner
from loralab.models.determinism import resolve_determinism
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
        rates: tokens of the rows per second, of each timed epoch without its first step.
        losses: of every step that is known.
        peak_bytes: most that tensors held.
        held_bytes: what the model holds before the first step.
        other_seconds: of building the model, the first epoch and the first step of the others.
        facts: what else is worth saying.
    """

    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    held_bytes: int = 0
    other_seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)

    def shown(self) -> dict[str, Any]:
        """Return what the JSON document says."""
        return {
            "tokens_per_second": round(statistics.median(self.rates)) if self.rates else None,
            "range": [round(min(self.rates)), round(max(self.rates))] if self.rates else None,
            "peak_gib": round(self.peak_bytes / 2**30, 2),
            "held_gib": round(self.held_bytes / 2**30, 2),
            "other_seconds": round(self.other_seconds, 1),
            "loss_first": round(self.losses[0], 4) if self.losses else None,
            **self.facts,
        }


@dataclass
class Case:
    """What is measured.

    Attributes:
        arguments: the command line's.
        device: where.
        batches: rows of each step; at least two steps.
    """

    arguments: argparse.Namespace
    device: torch.device
    batches: list[list[TokenizedExample]]

    @functools.cached_property
    def tokens(self) -> int:
        """Tokens of the rows of an epoch but those of its first step, each branch on its own."""
        planner = Planner(self.arguments.budget, layout="padded")
        return sum(planner(batch).example_tokens for batch in self.batches[1:])

    @property
    def supervised(self) -> int:
        """Tokens of an epoch that carry loss."""
        return sum(example.supervised_tokens for batch in self.batches for example in batch)

    @property
    def dtype(self) -> torch.dtype:
        """The compute type."""
        found: torch.dtype = getattr(torch, self.arguments.precision)
        return found


def wait(device: torch.device) -> None:
    """Let the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Times the steps of an epoch from the end of the first one on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ends: list[float] = []

    def step(self) -> None:
        """Note the end of a step; the device may still be at work, but at the first and the last."""
        if not self.ends:
            wait(self.device)
        self.ends.append(time.perf_counter())

    def seconds(self) -> float:
        """Return the time of all steps but the first, and begin anew."""
        wait(self.device)
        found, self.ends = time.perf_counter() - self.ends[0], []
        return found


def time_epochs(case: Case, timed: Timed, clock: Clock, epoch: Epoch) -> None:
    """Run a first epoch and the timed ones."""
    for number in range(case.arguments.repeats + 1):
        if case.device.type == "cuda" and number == 1:
            torch.cuda.reset_peak_memory_stats()
        timed.losses += epoch()
        seconds = clock.seconds()
        if number:
            timed.rates.append(case.tokens / seconds)
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
    clock = Clock(device)
    steps = [planner(batch) for batch in case.batches]
    timed.facts |= {
        "attention": model.tree_kernel,
        "head": model.full_logits_reason or "gathered",
        "supervised": sum(step.supervised_tokens for step in steps),
        "laid_out_share": round(sum(s.tokens for s in steps) / sum(s.example_tokens for s in steps), 3),
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
            clock.step()
        return losses

    time_epochs(case, timed, clock, epoch)


def run_plain(case: Case, timed: Timed) -> None:
    """Measure steps as a plain script runs them: padded rows, labels of -100, all logits."""
    model = build_plain(case)
    note_held(case, timed)
    optimizer, clock = adamw(model), Clock(case.device)
    batches = [padded(batch) for batch in case.batches]
    timed.facts |= {
        "padded_share": round(sum(ids.numel() for ids, _, _ in batches) / sum(int(m.sum()) for _, m, _ in batches), 3),
        "supervised": sum(int((labels != -100).sum()) for _, _, labels in batches),
    }

    def epoch() -> list[float]:
        losses = []
        for rows in case.batches:
            ids, mask, labels = (tensor.to(case.device) for tensor in padded(rows))
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
            loss.backward()
            losses.append(loss.item())
            finish_step(optimizer)
            clock.step()
        return losses

    time_epochs(case, timed, clock, epoch)


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


class StepEnds(TrainerCallback):
    """Tells a clock of a trainer's steps."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the end of a step."""
        self.clock.step()


class CountingCollator:
    """A collator that counts labels."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate
        self.supervised = 0

    def __call__(self, rows: Sequence[Any]) -> Any:
        """Collate rows."""
        batch = self.collate(rows)
        self.supervised += int((batch["labels"] != -100).sum())
        return batch


def run_trl(case: Case, timed: Timed, *, by_length: bool = False) -> None:
    """Measure TRL's trainer, an epoch at a time."""
    model, clock = build_plain(case), Clock(case.device)
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
    if by_length:
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
            completion_only_loss=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
            **further,
        )
        trainer = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer)
        trainer.add_callback(StepEnds(clock))
        trainer.data_collator = collator = CountingCollator(trainer.data_collator)

        def epoch() -> list[float]:
            trainer.train()
            return [line["loss"] for line in trainer.state.log_history if "loss" in line]

        time_epochs(case, timed, clock, epoch)
    timed.facts["supervised"] = collator.supervised // (case.arguments.repeats + 1)
    names = ("loss_type", "gradient_checkpointing", "bf16", "use_liger_kernel", "train_sampling_strategy")
    timed.facts |= {name: str(getattr(settings, name)) for name in names}


def run_trl_by_length(case: Case, timed: Timed) -> None:
    """Measure TRL's trainer without recomputation, rows by length, with Liger's kernels."""
    run_trl(case, timed, by_length=True)


CONTENDERS: dict[str, Callable[[Case, Timed], None]] = {
    "loralab": run_loralab,
    "plain": run_plain,
    "trl": run_trl,
    "trl_by_length": run_trl_by_length,
}
