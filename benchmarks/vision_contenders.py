"""The contenders of the vision benchmark: what each is given, its process, and what it gave.

Owns the table of contenders. Every run is a process group of its own, whose memory is watched from outside.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contest import ALPHA, RANK, environment
from peers.job import MemoryWatch
from vision_model import STOP, Prepared
from workloads import ALL_LINEAR

HERE = Path(__file__).resolve().parent
LEARNING_RATE = 2e-4
_FIRST_AND_LAST = 2  # steps without which nothing can be timed
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Way:
    """One way in which loralab trains.

    Attributes:
        says: what it does, for the report.
        layout: training.layout.
        kept: data.image.cache_features.
        budget: training.token_budget.
        copies: whether each row has a picture file of its own.
    """

    says: str
    layout: str = "shared"
    kept: bool = False
    budget: int | str = "auto"
    copies: bool = False


WAYS = {
    "loralab": Way("a picture's rows meet in a step (grouped); picture and prompt are encoded and laid out once"),
    "loralab_kept": Way("the same, the picture's features read from disk", kept=True),
    "loralab_unshared": Way(
        "layout packed: each row has its own copy of prompt and picture tokens; a micro-batch still encodes a picture "
        "once for all its rows",
        layout="packed",
    ),
    "loralab_copies": Way(
        "layout packed, each row with a picture file of its own (same pixels): nothing is shared, every row's picture "
        "is encoded",
        layout="packed",
        copies=True,
    ),
    "loralab_one_by_one": Way(
        "layout packed with a token budget of 1: a row at a time, each with its picture encoded",
        layout="packed",
        budget=1,
    ),
}
TRL = "trl"
CONTENDERS = (*WAYS, TRL)
SAYS = {name: way.says for name, way in WAYS.items()} | {
    TRL: "SFTTrainer with its own collator for pictures: a row has its own copy of everything, padded"
}


class CannotRunError(Exception):
    """A contender failed; the message says where to look."""


def loralab_config(way: Way, rows: Prepared, *, model: Path, work: Path) -> dict[str, Any]:
    """Return the configuration of a run."""
    return {
        "model": {"name": str(model), "precision": "bfloat16", "device": "cpu"},
        "data": {
            "train": str(rows.copies if way.copies else rows.grouped),
            "format": "vqa",
            "stop_tokens": [STOP],
            "max_length": 1024,
            "cache_dir": str(work / "cache"),
            "image": {"cache_features": way.kept},
        },
        "lora": {"r": RANK, "alpha": ALPHA, "target_modules": list(ALL_LINEAR)},
        "training": {
            "num_train_epochs": 1,
            "per_device_train_batch_size": rows.batch,
            "learning_rate": LEARNING_RATE,
            # Rows with pictures of their own are written so that this order holds the same rows in each step.
            "sampling": "random" if way.copies else "grouped",
            "layout": way.layout,
            "token_budget": way.budget,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "logging_steps": 1,
        },
        "evaluation": {"strategy": "no", "num_samples": 0},
        "output": {"dir": str(work / "run")},
    }


def run_once(name: str, rows: Prepared, *, model: Path, work: Path, threads: int, limit: float) -> dict[str, Any]:
    """Train one epoch in a new process and return what it gave.

    Raises:
        CannotRunError: it did not end well.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    job, result = work / "job.json", work / "result.json"
    if name == TRL:
        given: dict[str, Any] = {"model": str(model), "rows": str(rows.rendered), "work": str(work), "r": RANK}
        given |= {"alpha": ALPHA, "targets": list(ALL_LINEAR), "batch": rows.batch, "learning_rate": LEARNING_RATE}
        command = [sys.executable, str(HERE / "vision_trl.py"), str(job), str(result)]
    else:
        given = loralab_config(WAYS[name], rows, model=model, work=work)  # JSON is YAML
        command = [sys.executable, "-m", "loralab.cli", "train", str(job)]
    job.write_text(json.dumps(given, indent=1), encoding="utf-8")
    memory = _watch(command, log=work / "log.txt", threads=threads, limit=limit)
    if name == TRL:
        return json.loads(result.read_text(encoding="utf-8")) | memory
    return _read_run(work / "run", rows) | memory


def _watch(command: list[str], *, log: Path, threads: int, limit: float) -> dict[str, Any]:
    """Run a command to its end and return its wall-clock time and largest memory."""
    started = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(threads),
            cwd=log.parent,
            start_new_session=True,
        )
    try:
        with MemoryWatch(process.pid) as watch:
            # Its memory is readable until it is waited for, so the watch ends first.
            while process.poll() is None:
                if time.perf_counter() - started > limit:
                    raise CannotRunError(f"not done after {limit:.0f} s (see {log})")
                time.sleep(_POLL_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise CannotRunError(f"exit code {process.returncode}: {' '.join(lines[-3:])[:400]} (see {log})")
    return {
        "wall_seconds": time.perf_counter() - started,
        "peak_rss_bytes": watch.peak_rss_bytes,
        "peak_anonymous_bytes": watch.peak_anonymous_bytes,
    }


def _read_run(folder: Path, rows: Prepared) -> dict[str, Any]:
    """Return what a run folder says; a step's seconds are its rows' tokens by its tokens per second."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in metrics if "loss" in line]
    data = json.loads((folder / "data.json").read_text(encoding="utf-8"))["splits"]["train"]
    if record["layout_tokens"]["rows"] != sum(rows.step_tokens):
        raise CannotRunError(
            f"its rows have {record['layout_tokens']['rows']} tokens, those written {sum(rows.step_tokens)}"
        )
    resolved = record["resolved"]
    kept = record.get("kept_features")
    return {
        "step_seconds": [
            tokens / line["tokens_per_second"] for tokens, line in zip(rows.step_tokens, lines, strict=True)
        ],
        "losses": [line["loss"] for line in lines],
        "labels": data["supervised_tokens"],
        "laid_out": record["layout_tokens"]["laid_out"],
        "trained_parameters": record["model"]["trainable_parameters"],
        "encoding_seconds": kept and kept["seconds"],
        "versions": {name: record["versions"][name] for name in ("loralab", "transformers", "peft", "torch")},
        "notes": [
            f"layout {resolved['layout']['value']}, token budget {resolved['token_budget']['value']}, features kept "
            f"{resolved['cache_features']['value']}"
        ],
    }


def timed_seconds(run: dict[str, Any]) -> float:
    """Return the seconds of a run's steps but the first, which warms up."""
    return sum(run["step_seconds"][1:])


def check_steps(steps: int) -> None:
    """End where there is nothing to time."""
    if steps < _FIRST_AND_LAST:
        raise SystemExit(f"--steps {steps}: the first step is not timed, so there must be two or more")
