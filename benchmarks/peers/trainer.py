"""The parts that every contender on transformers' `Trainer` shares: clock, counts and result."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers.trainer
from job import Job, MemoryWatch, Result, count_supervised, seconds_since_launch
from transformers import BitsAndBytesConfig, Trainer, TrainerCallback


class StepClock(TrainerCallback):
    """Notes when the first step is done."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.start_seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the time of the first step's end."""
        self.start_seconds = self.start_seconds or seconds_since_launch(self.job)


class Recorder(TrainerCallback):
    """Notes what an epoch gave, of a `Trainer` that somebody else builds; see `record_every_trainer`."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.first: list[float] = []
        self.began = self.ended = 0.0
        self.losses: list[float] = []
        self.rows: Any = ()

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Note when training begins, and its rows."""
        self.began, self.rows = time.perf_counter(), given["train_dataloader"].dataset

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note when a step ends."""
        self.first.append(seconds_since_launch(self.job))
        self.ended = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note the losses."""
        self.losses = [line["loss"] for line in state.log_history if "loss" in line]

    def fields(self) -> dict[str, Any]:
        """Return the fields of `Result` but memory, versions and notes."""
        rows = [self.rows[number] for number in range(len(self.rows))]
        steps = [rows[start : start + self.job.batch] for start in range(0, len(rows), self.job.batch)]
        counts = [count_supervised([list(row["labels"]) for row in step]) for step in steps]
        return {
            "train_seconds": self.ended - self.began,
            "start_seconds": self.first[0],
            "losses": self.losses,
            "supervised_tokens": sum(counts),
            "step_tokens": counts,
            "layout_tokens": None,
        }


def record_every_trainer(job: Job) -> Recorder:
    """Return a recorder that every `Trainer` built from here on calls."""
    recorder = Recorder(job)
    transformers.trainer.DEFAULT_CALLBACKS.append(recorder)
    return recorder


class CountingCollator:
    """A collator that counts what goes through it."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate
        self.step_tokens: list[int] = []
        self.layout_tokens = 0

    def __call__(self, rows: Sequence[Any]) -> Any:
        """Collate rows."""
        batch = self.collate(rows)
        self.step_tokens.append(count_supervised(batch["labels"].tolist()))
        self.layout_tokens += batch["input_ids"].numel()
        return batch


def common_settings(job: Job) -> dict[str, Any]:
    """Return the training arguments that are the job's own."""
    return {
        "output_dir": job.work,
        "per_device_train_batch_size": job.batch,
        "num_train_epochs": 1,
        "learning_rate": job.learning_rate,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
    }


def train_epoch(trainer: Trainer, job: Job) -> dict[str, Any]:
    """Train an epoch; return the fields of `Result` but memory, versions and notes."""
    clock, counting = StepClock(job), CountingCollator(trainer.data_collator)
    trainer.add_callback(clock)
    trainer.data_collator = counting
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    return {
        "train_seconds": seconds,
        "start_seconds": clock.start_seconds,
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "supervised_tokens": sum(counting.step_tokens),
        "step_tokens": counting.step_tokens,
        "layout_tokens": counting.layout_tokens,
    }


def limit_threads(job: Job) -> None:
    """Compute with the job's number of threads."""
    torch.set_num_threads(job.threads)


def finish(fields: dict[str, Any], watch: MemoryWatch, *, versions: dict[str, str], notes: list[str]) -> Result:
    """Return the result, memory included; the watch must have been left."""
    return Result(
        **fields,
        peak_rss_bytes=watch.peak_rss_bytes,
        peak_anonymous_bytes=watch.peak_anonymous_bytes,
        versions=versions,
        notes=notes,
    )


def quantization_config(job: Job) -> BitsAndBytesConfig | None:
    """Return QLoRA's own settings where the base is quantized."""
    if job.quantization != "nf4":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, job.precision),
    )
