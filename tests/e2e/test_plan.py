"""`loralab plan` as a user runs it."""

import json
from pathlib import Path

import pytest

from support import tiny
from support.command import read_problems, run_here, write_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration of a short run."""
    base = tiny.save_base(tmp_path / "base")
    rows = tiny.write_rows(tmp_path / "rows.json", tiny.alpaca_rows(30))
    return write_config(tmp_path / "run.yaml", tiny.run_config(base, rows, tmp_path / "run"))


def test_table(config: Path) -> None:
    answer = run_here("plan", config, "--no-probe", "training.max_steps=3")
    assert answer.code == 0, answer.err
    for heading in ("choices", "parameters", "steps", "tokens", "memory", "time", "disk"):
        assert f"--- {heading}" in answer.out
    assert "3 (8 an epoch, 0.375 epochs)" in answer.out
    assert "unknown (not measured: --no-probe)" in answer.out
    assert "fits: needs " in answer.out


def test_one_json_document(config: Path) -> None:
    answer = run_here("plan", config, "--json", "lora.r=2")
    assert answer.code == 0, answer.err
    result = json.loads(answer.out)
    assert result["fits"] is True
    assert result["time"]["seconds"] > 0
    assert result["parameters"]["by_layer"][0]["parts"][0]["shape"][0] == 2
    assert not (config.parent / "run").exists()


def test_run_that_does_not_fit_is_told_and_no_failure(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loralab.workflows.plan.free_bytes", lambda device: 1 << 20)
    answer = run_here("plan", config, "--no-probe", "training.gradient_checkpointing=false")
    assert answer.code == 0
    assert "does not fit: needs " in answer.out
    assert "training.gradient_checkpointing=True" in answer.out
    assert "take a smaller base" in answer.out
    chosen = run_here("plan", config, "--no-probe")  # where memory is short, it is not left to advice
    assert "gradient_checkpointing  True" in chosen.out
    assert "training.gradient_checkpointing=True" not in chosen.out


def test_mistakes_are_three_lines(config: Path) -> None:
    (problem,) = read_problems(run_here("plan", config, "model.name=./nowhere"))
    assert problem.what == "no such model folder: './nowhere'"
    assert read_problems(run_here("plan", config, "training.no_such=1"))
