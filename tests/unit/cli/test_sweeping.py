"""The table that `loralab sweep` prints."""

import pytest

from loralab.cli import sweeping


def test_a_list_stands_in_the_table_as_it_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    key = "lora.target_modules"
    figures = {"metric": 1.0, "interval": [0.9, 1.1], "train_seconds": 1.0, "peak_memory_bytes": 1 << 20}
    done = {"number": 1, "name": "001-a", "status": "completed", "settings": {key: "[q_proj,v_proj]"}, "steps": 3}
    failed = {"number": 2, "name": "002-b", "status": "failed", "settings": {key: "[bold]"}}
    result = {
        "space": {key: "[q_proj,v_proj], [bold]"},
        "metric": "eval_loss",
        "folder": "sweeps/[red]",
        "runs": [failed, {**done, **figures, "trainable_parameters": 7}],
        "reading": {"best": "001-a", "order": ["001-a"], "cautions": ["1 of 2 [runs]"]},
    }
    sweeping._print_sweep(result)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["001", "[q_proj,v_proj]"]
    assert lines[2].split() == ["002", "[bold]", "failed"]
    assert lines[3] == "best: sweeps/[red]/001-a"
    assert lines[4] == "note: 1 of 2 [runs]"
