"""`training.sampling: grouped` lays out a quarter of the tokens of `random`, and its validation loss is not worse.

The figures come from `benchmarks/grouped.py`, run as a program: questions about documents, nine rows to a document of
256 tokens, validation on documents that were never seen.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from architecture.source import ROOT

LARGEST_RATIO = 0.25


def measure(*arguments: object) -> dict[str, Any]:
    """Run the benchmark and return what it prints."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "grouped.py"), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def check_rows_and_ratio(result: dict[str, Any]) -> None:
    """Check that the rows are what the experiment is about, and that grouping lays out a quarter of them."""
    tokens = result["tokens"]
    assert tokens["document"][0] >= 256
    assert tokens["document"][1] <= 290
    assert 10 <= tokens["question"][0] <= tokens["question"][1] <= 20
    steps = {run["steps"] for run in result["runs"]}
    assert len(steps) == 1  # the same epochs in the same number of steps
    assert result["comparison"]["tokens_ratio"] <= LARGEST_RATIO


def test_grouped_lays_out_a_quarter() -> None:
    result = measure(
        "--documents", 12, "--documents-per-step", 1, "--validation-documents", 1, "--epochs", 1, "--seeds", 1
    )
    check_rows_and_ratio(result)


@pytest.mark.slow
def test_grouped_is_not_worse(data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = data_folder / "models/stories260k"
    # Documents that this model was trained on are separated by its bos token, which therefore ends an answer.
    result = measure("--model", model, "--stop-token", "<s>", "--documents", 120, "--epochs", 3, "--seeds", 3)
    check_rows_and_ratio(result)
    assert all(run["eval_loss"] < 0.5 * run["base_loss"] for run in result["runs"])  # all of them have learnt
    with capsys.disabled():
        print(f"\ngrouped against random: {json.dumps(result['comparison'])}")
    assert result["comparison"]["grouped_is_not_worse"], result["comparison"]
