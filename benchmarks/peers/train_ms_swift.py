"""ms-swift's `sft` by its own `sft_main`, without a chat template: rows as they stand."""

import json
from pathlib import Path

from job import CannotRunError, Job, MemoryWatch, Result, run, versions
from swift.pipelines import sft_main
from trainer import finish, limit_threads, record_every_trainer


def write_data(job: Job, path: Path) -> None:
    """Write the rows as messages, without the end token, which the template appends."""
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": row["prompt"]},
                    {"role": "assistant", "content": row["completion"].removesuffix(job.end)},
                ]
            }
        )
        for row in job.read_rows()
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def build_arguments(job: Job, data: Path) -> list[str]:
    """Return the words of the command line behind `swift sft`.

    Raises:
        CannotRunError: another architecture than Qwen2.5's.
    """
    model_type = json.loads((Path(job.model) / "config.json").read_text(encoding="utf-8"))["model_type"]
    if model_type != "qwen2":
        raise CannotRunError(
            f"ms-swift 4.6.0 does not load this {model_type}: under the types polylm (the one with GPT2LMHeadModel) "
            "and qwen2, its loader leaves the width of the embedding None"
        )
    settings = {
        "model": job.model,
        "model_type": "qwen2",
        "template": "qwen",
        "use_chat_template": "false",
        "dataset": str(data),
        "split_dataset_ratio": 0,
        "dataset_shuffle": "false",
        "train_dataloader_shuffle": "false",
        "load_from_cache_file": "false",
        "max_length": job.max_length,
        "tuner_type": "lora",
        "lora_rank": job.r,
        "lora_alpha": job.alpha,
        "lora_dropout": 0.0,
        "torch_dtype": "bfloat16",
        "use_cpu": "true",
        "output_dir": f"{job.work}/out",
        "add_version": "false",
        "per_device_train_batch_size": job.batch,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "dataloader_num_workers": 0,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [*words, "--target_modules", *job.targets]


def train(job: Job) -> Result:
    """Train the job's epoch."""
    if job.quantization != "none":
        raise CannotRunError("not tried with quantized weights")
    limit_threads(job)
    recorder = record_every_trainer(job)
    with MemoryWatch() as watch:
        data = Path(job.work) / "rows.jsonl"
        write_data(job, data)
        sft_main(build_arguments(job, data))
    notes = ["bfloat16 weights, everything else at its defaults, gradient checkpointing among them"]
    return finish(
        recorder.fields(), watch, versions=versions("ms_swift", "transformers", "peft", "trl", "torch"), notes=notes
    )


if __name__ == "__main__":
    run(train, __doc__)
