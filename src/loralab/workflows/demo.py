"""The demonstrations: the whole pipeline on an embedded model and data set, offline.

Owns the demos' settings and what they say at the end. Base models and rows are made by programs in the
repository's `scripts`; nothing here knows their content.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from loralab.errors import ModelError, RunFolderError
from loralab.progress import Reporter
from loralab.run import RunFolder, read_json
from loralab.workflows.configure import load_run_config
from loralab.workflows.train import train

HELD_OUT_ROWS = 100
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class _Demo:
    """One demonstration.

    Attributes:
        folder: of its files, below the package's `demo`; the base model lies in `base` there.
        configure: given that folder, returns the configuration but for the output folder.
        read_question: takes the question out of a sample's prompt.
    """

    folder: str
    configure: Callable[[Path], dict[str, Any]]
    read_question: Callable[[str], str]


def demo_files(folder: str = "") -> Path:
    """Return a folder with an embedded model and rows.

    Args:
        folder: below the package's `demo`.

    Raises:
        ModelError: a file differs from its recorded SHA-256.
    """
    path = _demo_folder(folder)
    for line in (path / "base" / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        found = hashlib.sha256((path / "base" / name).read_bytes()).hexdigest()
        if found != digest:
            raise ModelError(
                f"the embedded model's {name} has SHA-256 {found}, recorded is {digest}",
                where=str(path / "base"),
                fix="install loralab again",
            )
    return path


def _demo_folder(folder: str) -> Path:
    return Path(str(resources.files("loralab"))) / "demo" / folder


def _configure_text(files: Path) -> dict[str, Any]:
    return {
        "model": {"name": str(files / "base"), "precision": "float32", "device": "cpu"},
        "data": {
            "train": str(files / "instructions.jsonl"),
            "validation": HELD_OUT_ROWS,
            "template": "alpaca",
            "max_length": 256,
        },
        "lora": {"r": 16, "alpha": 32, "target_modules": "auto"},
        "training": {
            "num_train_epochs": 3,
            "per_device_train_batch_size": 16,
            "learning_rate": 5e-3,
            "logging_steps": 5,
        },
        "evaluation": {
            "batch_size": 25,
            "metrics": ["exact_match"],
            "metric_rows": 25,
            "num_samples": 8,
            "max_new_tokens": 24,
        },
    }


def _configure_vision(files: Path) -> dict[str, Any]:
    return {
        "model": {"name": str(files / "base"), "precision": "float32", "device": "cpu"},
        "data": {
            "train": str(files / "train.jsonl"),
            "validation": str(files / "held_out.jsonl"),
            "format": "vqa",
            "template": "tokenizer",
            "max_length": 128,
        },
        "lora": {"r": 16, "alpha": 32, "target_modules": "auto"},
        "training": {
            "num_train_epochs": 16,
            "per_device_train_batch_size": 20,
            "learning_rate": 2e-3,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.05,
            "sampling": "grouped",
            "logging_steps": 5,
        },
        "evaluation": {
            "batch_size": 50,
            "metrics": ["exact_match"],
            "group_by": "kind",
            "metric_rows": 40,
            "num_samples": 8,
            "max_new_tokens": 8,
        },
    }


def _alpaca_question(prompt: str) -> str:
    return prompt.partition("### Instruction:\n")[2].partition("\n\n### Response:")[0]


def _picture_question(prompt: str) -> str:
    asked = re.findall(r"<\|vision_end\|>(.*?)<\|im_end\|>", prompt, flags=re.DOTALL)
    return asked[-1] if asked else prompt


TEXT = _Demo("", _configure_text, _alpaca_question)
VISION = _Demo("vision", _configure_vision, _picture_question)


def run_demo(output: Path, *, reporter: Reporter, vision: bool = False) -> tuple[RunFolder, list[str]]:
    """Train, evaluate and report; return the run folder and what was seen, in words.

    Args:
        output: run folder; an earlier demo there is replaced.
        reporter: told of progress.
        vision: questions about pictures, not about text.

    Raises:
        RunFolderError: another run is in the way.
    """
    demo, folder = VISION if vision else TEXT, RunFolder(output)
    files = demo_files(demo.folder)
    if folder.exists() and read_json(folder.record).get("model", {}).get("name") not in _bases():
        raise RunFolderError(
            f"output folder holds a run that is no demo: {str(output)!r}",
            where="option --output",
            fix="name another folder with --output",
        )
    config = demo.configure(files) | {"output": {"dir": str(output)}}
    folder = train(load_run_config(config, name="demo"), reporter=reporter, overwrite=folder.exists())
    return folder, _describe(folder, demo)


def _bases() -> list[str]:
    return [str(_demo_folder(demo.folder) / "base") for demo in (TEXT, VISION)]


def _describe(folder: RunFolder, demo: _Demo) -> list[str]:
    evaluation, samples = read_json(folder.evaluation), read_json(folder.samples)["samples"]
    exact = {
        side: found["metrics"]["exact_match"] for side, found in (("base", evaluation["base"]), ("adapter", evaluation))
    }
    right = {side: round(figure["value"] * figure["count"]) for side, figure in exact.items()}
    lines = [
        "",
        f"{exact['adapter']['count']} held-out questions, answered word for word: "
        f"base {right['base']}, adapter {right['adapter']}",
        f"loss on their answers: base {evaluation['base']['eval_loss']:.3f}, adapter {evaluation['eval_loss']:.3f} "
        "nats per token",
        "",
    ]
    for sample in samples[:_SHOWN]:
        question = demo.read_question(sample["prompt"])
        lines += [
            f"  question: {' / '.join(part for part in question.splitlines() if part)}",
            f"  base:     {' '.join(sample['base_output'].split())[:100]}",
            f"  adapter:  {sample['adapter_output']}",
            f"  expected: {sample['reference']}",
            "",
        ]
    return lines
