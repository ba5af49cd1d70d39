"""What every contender is given and what it gives back, with the clock and the memory watch that all of them use.

Owns the job and result files. Imports the standard library alone: each contender has a Python environment of its
own. The scripts beside this file are named `train_NAME.py`, since a `trl.py` here would hide the library.
"""

import argparse
import importlib.metadata
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.05
UNSUPERVISED = -100


class CannotRunError(Exception):
    """A contender cannot run this job here; the message says why, in one line."""


@dataclass
class Job:
    """What to train.

    Attributes:
        model: folder of the base model and its tokenizer.
        rows: JSON lines of prompt and completion, the completion with its end token, in the order of the steps.
        unordered_rows: the same rows without end tokens, in the order of the data file.
        end: text of the end token.
        batch: rows of an optimizer step.
        steps: optimizer steps of the epoch.
        max_length: tokens of the longest row.
        r: rank of the adapter.
        alpha: its scale is alpha / r.
        targets: names of the layers that get an adapter.
        learning_rate: at the first step; linear to 0.
        precision: of the base's weights.
        quantization: none or nf4.
        base_dropout: off or as_configured; the model's config.json says the same.
        grouped: whether rows with a long common prefix shall meet in a step.
        threads: of the computation.
        launched_at: time.time() just before the process started.
        work: a folder for this run alone.
        options: what tells two contenders of one script apart.
    """

    model: str
    rows: str
    unordered_rows: str
    end: str
    batch: int
    steps: int
    max_length: int
    r: int
    alpha: int
    targets: list[str]
    learning_rate: float
    precision: str
    quantization: str
    base_dropout: str
    grouped: bool
    threads: int
    launched_at: float
    work: str
    options: dict[str, Any] = field(default_factory=dict)

    def read_rows(self) -> list[dict[str, str]]:
        """Return prompt and completion of every row, in the order of the steps."""
        lines = Path(self.rows).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


@dataclass
class Result:
    """What one epoch gave.

    Attributes:
        train_seconds: of the training loop alone.
        start_seconds: from the start of the process to the end of the first step.
        losses: mean per supervised token, step by step.
        supervised_tokens: of the epoch; None where the contender does not tell.
        step_tokens: the same, step by step.
        layout_tokens: tokens that went through the model, padding included; None where it does not tell.
        peak_rss_bytes: largest resident set, with the mapped files.
        peak_anonymous_bytes: largest RssAnon, sampled: without mapped files.
        versions: of the libraries.
        notes: what a reader of the figures should know.
    """

    train_seconds: float
    start_seconds: float
    losses: list[float]
    supervised_tokens: int | None
    step_tokens: list[int] | None
    layout_tokens: int | None
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    versions: dict[str, str]
    notes: list[str] = field(default_factory=list)


def read_arguments(description: str) -> tuple[Job, Path]:
    """Return the job of the command line, and where its result goes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("job", type=Path)
    parser.add_argument("result", type=Path)
    arguments = parser.parse_args()
    return Job(**json.loads(arguments.job.read_text(encoding="utf-8"))), arguments.result


def write_result(path: Path, result: Result) -> None:
    """Write what one epoch gave."""
    path.write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")


def run(train: Any, description: str) -> None:
    """Train the job of the command line with `train`; write its result, or exit with the reason in one line."""
    job, path = read_arguments(description)
    try:
        write_result(path, train(job))
    except CannotRunError as error:
        path.write_text(json.dumps({"cannot_run": str(error)}), encoding="utf-8")


def versions(*names: str) -> dict[str, str]:
    """Return the installed version of each package."""
    return {name: importlib.metadata.version(name) for name in names}


class MemoryWatch:
    """Samples the memory of a process, and of those below it, until it is left.

    Args:
        process: its id; this process by default.
    """

    def __init__(self, process: int | None = None) -> None:
        self.process = os.getpid() if process is None else process
        self.peak_anonymous_bytes = 0
        self.peak_rss_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _sample_until_stopped(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        found = [_read_status(process) for process in _family(self.process)]
        self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, sum(each.get("RssAnon", 0) for each in found))
        # The kernel's own high-water mark: a peak between two samples is not missed.
        self.peak_rss_bytes = max(self.peak_rss_bytes, *(each.get("VmHWM", 0) for each in found), 0)


def _family(process: int) -> list[int]:
    found = [process]
    for parent in found:
        for listing in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in listing.read_text().split()]
            except OSError:  # ended meanwhile
                continue
    return found


def _read_status(process: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # ended meanwhile
        return {}
    pairs = (line.split(":", 1) for line in lines if line.startswith(("RssAnon:", "VmHWM:")))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def count_supervised(labels: Sequence[Sequence[int]]) -> int:
    """Return how many labels of a batch carry loss; the first of a row is predicted by nothing."""
    return sum(label != UNSUPERVISED for row in labels for label in row[1:])


def encode_row(row: Mapping[str, str], encode: Any, *, max_length: int) -> tuple[list[int], list[int]]:
    """Return ids and labels of a row.

    Args:
        row: prompt and completion.
        encode: text -> ids, without special tokens.
        max_length: where the row is cut.
    """
    prompt, completion = encode(row["prompt"]), encode(row["completion"])
    ids = [*prompt, *completion][:max_length]
    return ids, [*[UNSUPERVISED] * len(prompt), *completion][:max_length]


def seconds_since_launch(job: Job) -> float:
    """Return how long ago the process of this job was started."""
    return time.time() - job.launched_at
