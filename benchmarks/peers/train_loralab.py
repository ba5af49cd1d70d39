"""loralab, by its command: `loralab train` in a process of its own, read from its run folder."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from job import SAMPLE_SECONDS, CannotRunError, Job, MemoryWatch, Result, run, seconds_since_launch


def build_config(job: Job) -> dict[str, Any]:
    """Return the configuration of the run."""
    return {
        "model": {
            "name": job.model,
            "precision": job.precision,
            "quantization": job.quantization,
            "device": "cpu",
            "base_dropout": job.base_dropout,
        },
        "data": {
            "train": job.unordered_rows,
            "format": "prompt_completion",
            "template": "none",
            "stop_tokens": [job.end],
            "max_length": job.max_length,
            "cache_dir": str(Path(job.work) / "cache"),
        },
        "lora": {"r": job.r, "alpha": job.alpha, "target_modules": job.targets},
        "training": {
            "num_train_epochs": 1,
            "per_device_train_batch_size": job.batch,
            "learning_rate": job.learning_rate,
            "sampling": "grouped" if job.grouped else "random",
            "layout": job.options.get("layout", "auto"),
            "save_strategy": "no",
            "logging_steps": 1,
        },
        "evaluation": {"strategy": "no", "num_samples": 0},
        "output": {"dir": str(Path(job.work) / "run")},
    }


def wait_for_first_step(process: subprocess.Popen[bytes], metrics: Path, *, job: Job) -> float:
    """Return the seconds from the start to the first line of metrics."""
    while process.poll() is None:
        if metrics.is_file() and metrics.stat().st_size:
            return seconds_since_launch(job)
        time.sleep(SAMPLE_SECONDS)
    return seconds_since_launch(job)


def train(job: Job) -> Result:
    """Train the job's epoch."""
    work = Path(job.work)
    config = work / "config.json"  # JSON is YAML
    config.write_text(json.dumps(build_config(job)), encoding="utf-8")
    with (work / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "loralab.cli", "train", str(config)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(job.threads)},
        )
        with MemoryWatch(process.pid) as watch:
            start_seconds = wait_for_first_step(process, work / "run/metrics.jsonl", job=job)
            code = process.wait()
    if code:
        lines = (work / "output.txt").read_text(encoding="utf-8").strip().splitlines()
        raise CannotRunError(f"loralab train ended with {code}: {' '.join(lines[-3:])}")
    record = json.loads((work / "run/run.json").read_text(encoding="utf-8"))
    lines = (work / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    data = json.loads((work / "run/data.json").read_text(encoding="utf-8"))
    kept = data["splits"]["train"]
    resolved = record["resolved"]
    return Result(
        train_seconds=record["train_seconds"],
        start_seconds=start_seconds,
        losses=[json.loads(line)["loss"] for line in lines],
        supervised_tokens=kept["supervised_tokens"],
        step_tokens=None,
        layout_tokens=record["layout_tokens"]["laid_out"],
        peak_rss_bytes=watch.peak_rss_bytes,
        peak_anonymous_bytes=watch.peak_anonymous_bytes,
        versions={name: record["versions"][name] for name in ("loralab", "transformers", "peft", "torch")},
        notes=[
            f"{kept['rows_kept']} rows, {kept['truncated']} truncated; "
            f"layout {resolved['layout']['value']}, token budget {resolved['token_budget']['value']}"
        ],
    )


if __name__ == "__main__":
    run(train, __doc__)
