"""`replay` and `train --warm-start` as a user runs them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from support import tiny
from support.command import read_problems, run_here, snapshot, write_config

Json = dict[str, Any]


@dataclass(frozen=True)
class World:
    """A finished run; read only."""

    folder: Path
    base: Path
    rows: Path
    config: Path
    run: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base = tiny.save_base(folder / "base")
    rows = tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(16))
    values = tiny.run_config(base, rows, folder / "run", data={"validation": 4}, lora={"dropout": 0.1})
    config = write_config(folder / "config.yaml", values)
    answer = run_here("train", config)
    assert answer.code == 0, answer.err
    return World(folder, base, rows, config, folder / "run")


def record(run: Path) -> Json:
    found: Json = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return found


# --- replay ------------------------------------------------------------------------------------------------------


def test_run_of_several_processes_is_not_replayed_in_one(world: World, tmp_path: Path) -> None:
    run = Path(shutil.copytree(world.run, tmp_path / "run"))
    (run / "run.json").write_text(json.dumps(record(run) | {"processes": 2}), encoding="utf-8")
    (problem,) = read_problems(run_here("replay", run))
    assert problem.what.startswith("the run was made by 2 processes, and a replay runs in one")
    assert not (tmp_path / "run-replay").exists()


def test_replay_is_equal(world: World, tmp_path: Path) -> None:
    run = Path(shutil.copytree(world.run, tmp_path / "run"))
    before = snapshot(run)
    digest = record(run)["adapter_sha256"]
    for number in ("", "-2"):
        answer = run_here("replay", run, "--verify")
        assert answer.code == 0, answer.err
        other = tmp_path / f"run-replay{number}"
        assert answer.out == (
            f"run:    {digest}  {run}\nreplay: {digest}  {other}\nequal: the adapter and 4 losses, to the last bit\n"
        )
        assert record(other)["adapter_sha256"] == digest
    assert snapshot(run) == before


def test_replay_as_json(world: World, tmp_path: Path) -> None:
    answer = run_here("replay", world.run, "--output", tmp_path / "again", "--json")
    assert answer.code == 0, answer.err
    result = json.loads(answer.out)
    digest = record(world.run)["adapter_sha256"]
    assert result == {
        "run": str(world.run),
        "replay": str(tmp_path / "again"),
        "adapter_sha256": {"run": digest, "replay": digest},
        "equal": True,
        "compared_losses": 4,
        "first_difference": None,
        "differences": [],
    }


def change_row(world: World, run: Path, folder: Path) -> list[str]:
    rows = json.loads(world.rows.read_text(encoding="utf-8"))
    rows[3]["output"] += " red"
    return [f"data.train={tiny.write_rows(folder / 'other.json', rows)}"]


def change_setting(world: World, run: Path, folder: Path) -> list[str]:
    return ["training.learning_rate=0.02"]


def change_record(world: World, run: Path, folder: Path) -> list[str]:
    """A record made by another version of a library, whose sums were others."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    lines[1]["loss"] += 1e-7
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (run / "run.json").write_text(json.dumps(record(run) | {"versions": {**record(run)["versions"], "torch": "1.0"}}))
    return []


DIFFERENCES = {
    "data": (change_row, "data.rows was sha256"),
    "setting": (change_setting, "training.learning_rate was 0.01, now 0.02"),
    "version": (change_record, "versions.torch was '1.0', now"),
}


@pytest.mark.parametrize(("change", "cause"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_different_replay_fails_the_proof(change: Any, cause: str, world: World, tmp_path: Path) -> None:
    run = Path(shutil.copytree(world.run, tmp_path / "run"))
    options = change(world, run, tmp_path)
    answer = run_here("replay", run, *options, "--verify", "--json")
    assert answer.code == 3, answer.err
    result = json.loads(answer.out)
    assert not result["equal"]
    assert result["differences"][0].startswith(cause)
    assert result["first_difference"]["step"] in (1, 2)
    said = answer.err[answer.err.rindex("error: ") :].splitlines()
    assert len(said) == 3
    assert f"first at step {result['first_difference']['step']}: loss was" in said[0]
    assert said[2].startswith(f"fix:   restore what differs: {cause}")


def test_what_cannot_be_replayed(world: World, tmp_path: Path) -> None:
    (problem,) = read_problems(run_here("replay", world.base))
    assert "not a run folder" in problem.what
    run = Path(shutil.copytree(world.run, tmp_path / "run"))
    (run / "run.json").write_text(json.dumps(record(run) | {"status": "interrupted"}))
    (problem,) = read_problems(run_here("replay", run))
    assert problem.what == "the run is not complete (interrupted): there is no adapter to compare with"
    before = snapshot(world.run)
    (problem,) = read_problems(run_here("replay", run.parent / "run", "--output", world.run, "--verify"))
    assert "not complete" in problem.what
    (problem,) = read_problems(run_here("replay", world.run, "--output", world.run))
    assert "holds another run (completed)" in problem.what
    assert snapshot(world.run) == before


# --- warm start --------------------------------------------------------------------------------------------------


def test_warm_start_begins_with_the_weights_of_another_run(world: World, tmp_path: Path) -> None:
    """A run of one step with no learning rate to speak of keeps the weights that it began with."""
    still = ["training.learning_rate=1e-30", "training.max_steps=1", "lora.dropout=0"]
    answer = run_here("train", world.config, *still, f"output.dir={tmp_path}/run", "--warm-start", world.run)
    assert answer.code == 0, answer.err
    source = {"source": str(world.run), "adapter_sha256": record(world.run)["adapter_sha256"]}
    assert record(tmp_path / "run")["warm_start"] == source
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (world.run, tmp_path / "run")]
    assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])
    cold = run_here("train", world.config, *still, f"output.dir={tmp_path}/cold")
    assert cold.code == 0
    assert "warm_start" not in record(tmp_path / "cold")
    assert record(tmp_path / "cold")["adapter_sha256"] != source["adapter_sha256"]

    replayed = run_here("replay", tmp_path / "run", "--verify")
    assert replayed.code == 0, replayed.err
    assert record(tmp_path / "run-replay")["warm_start"] == source


def test_resumed_warm_start_begins_with_the_same_weights(world: World, tmp_path: Path) -> None:
    out, source = tmp_path / "run", Path(shutil.copytree(world.run / "adapter", tmp_path / "source"))
    answer = run_here("train", world.config, f"output.dir={out}", "--warm-start", source)
    assert answer.code == 0, answer.err
    whole = record(out)
    # As a kill before the first checkpoint leaves it.
    shutil.rmtree(out / "checkpoints")
    (out / "run.json").write_text(json.dumps(whole | {"status": "running"}))
    killed = Path(shutil.copytree(out, tmp_path / "killed"))
    answer = run_here("train", world.config, f"output.dir={out}", "--resume")
    assert answer.code == 0, answer.err
    assert record(out)["adapter_sha256"] == whole["adapter_sha256"]
    weights = load_file(source / "adapter_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, source / "adapter_model.safetensors")
    (problem,) = read_problems(run_here("train", killed, "--resume"))
    assert problem.what.startswith("the adapter that the run was started from has changed: sha256 was ")
    assert problem.where == str(source)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("lora.r=2", "lora.r is 4 there, 2 here"),
        ("lora.alpha=32", "lora.alpha is 8.0 there, 32.0 here"),
        ("lora.target_modules=[q_proj]", "of its tensors match no layer of the run"),
    ],
)
def test_adapter_that_does_not_fit(option: str, said: str, world: World, tmp_path: Path) -> None:
    answer = run_here("train", world.config, option, f"output.dir={tmp_path}/run", "--warm-start", world.run)
    (problem,) = read_problems(answer)
    assert said in problem.what
    assert problem.where.startswith("option --warm-start")
    assert snapshot(tmp_path) == {}


def test_adapter_of_another_base(world: World, tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", seed=5)
    out = tmp_path / "run"
    answer = run_here("train", world.config, f"model.name={base}", f"output.dir={out}", "--warm-start", world.run)
    (problem,) = read_problems(answer)
    assert "its base model was sha256" in problem.what
    assert not out.exists()


def test_warm_start_of_nothing_or_of_itself(world: World, tmp_path: Path) -> None:
    out = f"output.dir={tmp_path}/run"
    (problem,) = read_problems(run_here("train", world.config, out, "--warm-start", world.base))
    assert "no adapter_config.json" in problem.what
    (problem,) = read_problems(run_here("train", world.config, out, "--warm-start", world.run, "--resume"))
    assert problem.where == "options --warm-start, --resume"
    before = snapshot(world.run)
    (problem,) = read_problems(run_here("train", world.config, "--warm-start", world.run, "--overwrite"))
    assert "lies in the output folder" in problem.what
    assert snapshot(world.run) == before
