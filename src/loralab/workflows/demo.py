"""The demonstration: the whole pipeline on an embedded model and data set, offline.

Owns the demo's settings and what it says at the end. The base model and the rows are made by
`scripts/build_demo.py` in the repository; nothing here knows their content.
"""

import hashlib
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


def demo_files() -> Path:
    """Return the folder of the embedded model and rows.

    Raises:
        ModelError: a file differs from its recorded SHA-256.
    """
    folder = Path(str(resources.files("loralab"))) / "demo"
    for line in (folder / "base" / "SHA256SUMS").read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        found = hashlib.sha256((folder / "base" / name).read_bytes()).hexdigest()
        if found != digest:
            raise ModelError(
                f"the embedded model's {name} has SHA-256 {found}, recorded is {digest}",
                where=str(folder / "base"),
                fix="install loralab again",
            )
    return folder


def demo_config(output: Path) -> dict[str, Any]:
    """Return the demo's configuration."""
    files = demo_files()
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
        "output": {"dir": str(output)},
    }


def run_demo(output: Path, *, reporter: Reporter) -> tuple[RunFolder, list[str]]:
    """Train, evaluate and report; return the run folder and what was seen, in words.

    Args:
        output: run folder; an earlier demo there is replaced.
        reporter: told of progress.

    Raises:
        RunFolderError: another run is in the way.
    """
    folder = RunFolder(output)
    base = str(demo_files() / "base")
    if folder.exists() and read_json(folder.record).get("model", {}).get("name") != base:
        raise RunFolderError(
            f"output folder holds a run that is no demo: {str(output)!r}",
            where="option --output",
            fix="name another folder with --output",
        )
    loaded = load_run_config(demo_config(output), name="demo")
    folder = train(loaded, reporter=reporter, overwrite=folder.exists())
    return folder, _describe(folder)


def _describe(folder: RunFolder) -> list[str]:
    evaluation, samples = read_json(folder.evaluation), read_json(folder.samples)["samples"]
    exact = {
        side: found["metrics"]["exact_match"] for side, found in (("base", evaluation["base"]), ("adapter", evaluation))
    }
    right = {side: round(figure["value"] * figure["count"]) for side, figure in exact.items()}
    lines = [
        "",
        f"{HELD_OUT_ROWS} held-out questions, answered word for word: base {right['base']}, adapter {right['adapter']}",
        f"loss on their answers: base {evaluation['base']['eval_loss']:.3f}, adapter {evaluation['eval_loss']:.3f} "
        "nats per token",
        "",
    ]
    for sample in samples[:_SHOWN]:
        question = sample["prompt"].partition("### Instruction:\n")[2].partition("\n\n### Response:")[0]
        lines += [
            f"  question: {' / '.join(part for part in question.splitlines() if part)}",
            f"  base:     {' '.join(sample['base_output'].split())[:100]}",
            f"  adapter:  {sample['adapter_output']}",
            f"  expected: {sample['reference']}",
            "",
        ]
    return lines
