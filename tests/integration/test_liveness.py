"""A base with a layer that nothing calls: the run stops before its first step, in one process and in two."""

import json
from pathlib import Path
from typing import Any

import pytest

import loralab
from loralab.errors import DeadAdapterError
from support import idle, tiny
from support.command import read_problems, write_config
from support.processes import run_program

TESTS = Path(__file__).resolve().parents[1]
DEAD = "2 of 30 trained tensors learn nothing (model.layers.0.mlp.idle_proj.lora_A.weight"


def config(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    rows = tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(16))
    return tiny.run_config(idle.save_base(folder / "base"), rows, folder / "run", **sections)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_a_run_stops(tmp_path: Path, checkpointing: bool) -> None:
    settings = config(tmp_path, training={"gradient_checkpointing": checkpointing})
    with pytest.raises(DeadAdapterError) as caught:
        loralab.train(settings)
    assert caught.value.problems[0].what.startswith(DEAD)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "run" / "adapter").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_the_layers_that_are_used_train(tmp_path: Path) -> None:
    names = [f"{part}_proj" for part in ("q", "k", "v", "o", "up", "gate", "down")]
    run = loralab.train(config(tmp_path, lora={"target_modules": names}))
    assert run.record["status"] == "completed"


def test_two_processes_stop_together(tmp_path: Path) -> None:
    path = write_config(tmp_path / "config.yaml", config(tmp_path))
    program = (
        f"import sys\nsys.path.insert(0, {str(TESTS)!r})\nimport support.idle\nfrom loralab.cli import main\n"
        f"sys.argv = ['loralab', 'train', {str(path)!r}]\nmain()\n"
    )
    answers = run_program(program, folder=tmp_path)
    assert [answer.code for answer in answers] == [3, 3], answers[0].err
    assert read_problems(answers[0], code=3)[0].what.startswith(DEAD)
