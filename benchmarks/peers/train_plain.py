"""transformers' Trainer and PEFT with a small collator: what a script of one page does."""

from collections.abc import Sequence
from typing import Any

import torch
from job import UNSUPERVISED, Job, MemoryWatch, Result, encode_row, run, versions
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from trainer import common_settings, finish, limit_threads, quantization_config, train_epoch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Return padded tensors of B rows and L tokens."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, filling: int) -> torch.Tensor:
        return torch.tensor([row[name] + [filling] * (longest - len(row[name])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", UNSUPERVISED),
        "attention_mask": torch.tensor(mask),
    }


def load_model(job: Job) -> Any:
    """Return the base model with a fresh adapter."""
    dtype = getattr(torch, job.precision)
    quantization = quantization_config(job)
    base = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, quantization_config=quantization)
    if quantization is not None:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    base.config.use_cache = False
    return get_peft_model(
        base,
        LoraConfig(r=job.r, lora_alpha=job.alpha, lora_dropout=0.0, target_modules=job.targets, task_type="CAUSAL_LM"),
    )


def train(job: Job) -> Result:
    """Train the job's epoch."""
    limit_threads(job)
    with MemoryWatch() as watch:
        tokenizer = AutoTokenizer.from_pretrained(job.model)

        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        encoded = [encode_row(row, encode, max_length=job.max_length) for row in job.read_rows()]
        trainer = Trainer(
            model=load_model(job),
            args=TrainingArguments(
                **common_settings(job), train_sampling_strategy="sequential", remove_unused_columns=False
            ),
            train_dataset=[{"input_ids": ids, "labels": labels} for ids, labels in encoded],
            data_collator=collate,
        )
        fields = train_epoch(trainer, job)
    notes = [f"weights {job.precision}, no autocast"]
    if job.quantization != "none":
        notes = ["prepare_model_for_kbit_training: what is not quantized, the head among it, is float32"]
    return finish(fields, watch, versions=versions("transformers", "peft", "torch"), notes=notes)


if __name__ == "__main__":
    run(train, __doc__)
