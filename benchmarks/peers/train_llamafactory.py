"""LLaMA-Factory's `train`, stage sft, by its own `run_exp`, template `empty`: rows as they stand."""

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from job import CannotRunError, Job, MemoryWatch, Result, run, versions
from trainer import finish, limit_threads, record_every_trainer


def import_without_torchaudio() -> Any:
    """Return LLaMA-Factory's `run_exp`.

    It imports torchaudio for text too, whose compiled part wants the one torch that it was built for, CUDA included;
    an empty module stands in where it is not installed. Rows without sound never call it.
    """
    if importlib.util.find_spec("torchaudio") is None:
        stand_in = ModuleType("torchaudio")
        stand_in.__spec__ = ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = stand_in
    from llamafactory.train.tuner import run_exp

    return run_exp


def write_data(job: Job, folder: Path) -> None:
    """Write the rows in Alpaca form and the table of data sets."""
    rows = [{"instruction": row["prompt"], "input": "", "output": row["completion"]} for row in job.read_rows()]
    folder.mkdir()
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}), encoding="utf-8")


def build_arguments(job: Job, data: Path) -> dict[str, Any]:
    """Return what would stand in LLaMA-Factory's YAML file."""
    return {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": job.model,
        "finetuning_type": "lora",
        "lora_rank": job.r,
        "lora_alpha": job.alpha,
        "lora_dropout": 0.0,
        "lora_target": ",".join(job.targets),
        "dataset": "rows",
        "dataset_dir": str(data),
        "template": "empty",
        "cutoff_len": job.max_length,
        "overwrite_cache": True,
        "disable_shuffling": True,
        "output_dir": f"{job.work}/out",
        "per_device_train_batch_size": job.batch,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": True,
        "disable_tqdm": True,
    }


def train(job: Job) -> Result:
    """Train the job's epoch."""
    if job.quantization != "none":
        raise CannotRunError("not tried with quantized weights")
    limit_threads(job)
    recorder = record_every_trainer(job)
    with MemoryWatch() as watch:
        data = Path(job.work) / "data"
        write_data(job, data)
        import_without_torchaudio()(build_arguments(job, data))
    notes = ["bf16 true and everything else at its defaults, gradient checkpointing among them"]
    return finish(
        recorder.fields(), watch, versions=versions("llamafactory", "transformers", "peft", "trl", "torch"), notes=notes
    )


if __name__ == "__main__":
    run(train, __doc__)
