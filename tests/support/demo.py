"""`loralab demo` as a user runs it, and how many of its questions each side answered word for word."""

import json
import subprocess
import sys
from pathlib import Path


def run_demo_command(output: Path, *options: str) -> str:
    """Run a demo into `output` and return what it printed."""
    command = [sys.executable, "-m", "loralab.cli", "demo", *options, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def right_answers(output: Path, *, questions: int) -> tuple[int, int]:
    """Return how many questions adapter and base answered word for word, counted anew."""
    lines = [json.loads(text) for text in (output / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == questions
    adapter, base = (
        sum(line[side]["answer"].strip() == line["reference"].strip() for line in lines) for side in ("adapter", "base")
    )
    return adapter, base
