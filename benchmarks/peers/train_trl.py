"""TRL's SFTTrainer: at its defaults, or with the switches that were fastest on a CPU (`options.best`).

With `options.unpacked` these leave rows as they are, as its defaults do.
"""

from typing import Any

from datasets import Dataset
from job import Job, MemoryWatch, Result, run, versions
from peft import LoraConfig
from trainer import common_settings, finish, limit_threads, quantization_config, train_epoch
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer


def best_settings(job: Job, tokenizer: Any) -> dict[str, Any]:
    """Return what was fastest of TRL's switches on a CPU.

    16 Alpaca rows, GPT-2-small's shape, B 4, one thread, tokens/s: its defaults 107; bfloat16 weights without
    gradient checkpointing 114; by length as well 116, without autocast 97; packed, 4 packs a step 141 to 168, 2 packs
    a step 194, with gradient checkpointing 160. `loss_type="chunked_nll"` is an old name of the default in 1.16;
    `padding_free` alone refuses a `max_length`, and comes with packing.

    Packs are taken where two rows fit into one, as many a step as have a step's tokens; else, and where
    `options.unpacked` says so, rows by length.
    """
    lengths = [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) for row in job.read_rows()]
    mean = sum(lengths) / len(lengths)
    chosen: dict[str, Any] = {"gradient_checkpointing": False, "model_init_kwargs": {"dtype": job.precision}}
    if job.options.get("unpacked") or 2 * mean > job.max_length:
        return chosen | {"train_sampling_strategy": "group_by_length"}
    packs = max(1, round(job.batch * mean / job.max_length))
    return chosen | {"packing": True, "per_device_train_batch_size": packs}


def train(job: Job) -> Result:
    """Train the job's epoch."""
    limit_threads(job)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    quantization = quantization_config(job)
    # In the order given, so that every step has the rows of the others; no other default is touched.
    settings: dict[str, Any] = {"train_sampling_strategy": "sequential"}
    if job.options.get("best"):
        settings |= best_settings(job, tokenizer)
    settings |= job.options.get("settings", {})
    with MemoryWatch() as watch:
        trainer = SFTTrainer(
            model=job.model,
            args=SFTConfig(**(common_settings(job) | settings), max_length=job.max_length),
            train_dataset=Dataset.from_list(job.read_rows()),
            processing_class=tokenizer,
            quantization_config=quantization,
            peft_config=LoraConfig(
                r=job.r, lora_alpha=job.alpha, lora_dropout=0.0, target_modules=job.targets, task_type="CAUSAL_LM"
            ),
        )
        fields = train_epoch(trainer, job)
    weights = {str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters()}
    notes = [
        f"weights {', '.join(sorted(weights))}; bf16 autocast {trainer.args.bf16}; "
        f"gradient checkpointing {trainer.args.gradient_checkpointing}; order "
        f"{'of packs' if trainer.args.packing else trainer.args.train_sampling_strategy}; "
        f"{trainer.state.global_step} steps"
    ]
    return finish(fields, watch, versions=versions("trl", "transformers", "peft", "torch"), notes=notes)


if __name__ == "__main__":
    run(train, __doc__)
