"""`replay` and `train --warm-start` as a user runs them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import loralab
from loralab.errors import ConfigError, ProofError
from loralab.run import RunFolder, file_sha256
from loralab.workflows.record import CHANGED_AT_RESUME
from loralab.workflows.replay import check_evidence, compare_runs
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
            f"run:    {digest}  {run}\nreplay: {digest}  {other}\nequal: the adapter and 6 losses, to the last bit\n"
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
        "compared_losses": 6,
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
    assert (problem.where, problem.fix) == ("option --output", "name a new folder")
    (problem,) = read_problems(run_here("replay", world.run, f"output.dir={tmp_path}/again"))
    assert problem.fix == "use --output"
    assert snapshot(world.run) == before
    (run / "run.json").write_text(json.dumps(record(world.run)))
    (run / "config.yaml").unlink()
    (problem,) = read_problems(run_here("replay", run))
    assert (problem.what, problem.where) == ("missing file: config.yaml", str(run))


def test_one_of_several_processes_does_not_replay(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    (problem,) = read_problems(run_here("replay", world.run, "--output", tmp_path / "again"))
    assert problem.what == "the replay was started as one of 2 processes; the run was made by one"
    assert not (tmp_path / "again").exists()


def swap_adapter(run: Path) -> None:
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, run / "adapter" / "adapter_model.safetensors")


def damage_adapter(run: Path) -> None:
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"no tensors")


def drop_step(run: Path, step: int) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [line for line in lines if line["step"] != step or "loss" not in line]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def add_line(run: Path, line: str) -> None:
    with (run / "metrics.jsonl").open("a", encoding="latin-1") as stream:
        stream.write(line + "\n")


def edit_config(run: Path) -> None:
    with (run / "config.yaml").open("a", encoding="utf-8") as stream:
        stream.write("# a note\n")


NO_STEP = "line 5 has no step"
NO_EVIDENCE: dict[str, tuple[Any, str]] = {
    "config edited": (edit_config, "config.yaml was edited since the run"),
    "adapter swapped": (swap_adapter, "the adapter in the run folder is not the recorded one"),
    "adapter damaged": (damage_adapter, "the adapter in the run folder is not the recorded one"),
    "no metrics": (lambda run: (run / "metrics.jsonl").unlink(), "end at step 0, the run at step 3"),
    "last loss gone": (lambda run: drop_step(run, 3), "end at step 2, the run at step 3"),
    "a loss gone": (lambda run: drop_step(run, 2), "metrics.jsonl has no training loss of step 2"),
    "no step": (lambda run: add_line(run, '{"loss": 1.0}'), NO_STEP),
    "no object": (lambda run: add_line(run, "3"), NO_STEP),
    "no number": (lambda run: add_line(run, '{"step": 3, "loss": "low"}'), NO_STEP),
    "no JSON": (lambda run: add_line(run, "{\n{}"), "line 5 is not valid JSON"),
    "no UTF-8": (lambda run: add_line(run, "\xff"), "cannot read metrics.jsonl: 'utf-8' codec"),
    "evaluation damaged": (lambda run: (run / "evaluation.json").write_text("{"), "cannot read evaluation.json: not"),
    "evaluation empty": (lambda run: (run / "evaluation.json").write_text("{}"), "it has no eval_loss"),
}


@pytest.mark.parametrize(("damage", "said"), NO_EVIDENCE.values(), ids=NO_EVIDENCE)
def test_changed_run_folder_fails_the_proof_before_training(
    damage: Any, said: str, world: World, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(world.run, tmp_path / "run"))
    damage(run)
    (problem,) = read_problems(run_here("replay", run, "--verify"), code=3)
    assert said in problem.what
    assert problem.where.startswith(str(run))
    assert not (tmp_path / "run-replay").exists()


def test_run_without_adapter_file_proves_nothing(world: World, tmp_path: Path) -> None:
    run = Path(shutil.copytree(world.run, tmp_path / "run"))
    (run / "adapter" / "adapter_model.safetensors").unlink()
    (problem,) = read_problems(run_here("replay", run, "--verify"))
    assert problem.what == "missing file: adapter/adapter_model.safetensors"
    assert not (tmp_path / "run-replay").exists()


def test_without_verify_a_damaged_folder_is_compared_as_far_as_it_goes(world: World, tmp_path: Path) -> None:
    run = Path(shutil.copytree(world.run, tmp_path / "run"))
    add_line(run, "3")
    edit_config(run)
    answer = run_here("replay", run, "--json")
    assert answer.code == 0, answer.err
    result = json.loads(answer.out)
    assert not result["equal"]
    assert result["compared_losses"] == 6
    assert NO_STEP in result["differences"][0]
    assert result["differences"][1:] == ["config.yaml was edited since the run"]


def test_final_evaluation_is_compared(world: World, tmp_path: Path) -> None:
    run = Path(shutil.copytree(world.run, tmp_path / "run"))
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    found["base"]["eval_loss"] += 1e-9
    (run / "evaluation.json").write_text(json.dumps(found), encoding="utf-8")
    answer = run_here("replay", run, "--verify")
    assert answer.code == 3, answer.err
    what = answer.err[answer.err.rindex("error: ") :].splitlines()[0]
    assert "differs from the run: the adapter is equal; losses differ; first at step 3" in what
    assert "evaluation.json base.eval_loss was " in what
    # A run from before the hash of its configuration, and without an evaluation, replays.
    (run / "evaluation.json").unlink()
    old = {name: value for name, value in record(run).items() if name != "config_sha256"}
    (run / "run.json").write_text(json.dumps(old), encoding="utf-8")
    edit_config(run)
    answer = run_here("replay", run, "--verify")
    assert answer.code == 0, answer.err
    assert "equal: the adapter and 4 losses" in answer.out


def test_number_of_processes_is_a_difference(world: World, tmp_path: Path) -> None:
    other = Path(shutil.copytree(world.run, tmp_path / "other"))
    (other / "run.json").write_text(json.dumps(record(other) | {"processes": 2}), encoding="utf-8")
    result = compare_runs(RunFolder(world.run), RunFolder(other))
    assert result["equal"]
    assert result["differences"] == ["processes was 1, now 2"]


def test_a_run_that_changed_at_a_resume_says_so(world: World, tmp_path: Path) -> None:
    run = Path(shutil.copytree(world.run, tmp_path / "run"))
    events = [{"at": "", "what": "resumed"}, {"at": "", "what": f"{CHANGED_AT_RESUME}threads was 2, now 1"}]
    (run / "run.json").write_text(json.dumps(record(run) | {"events": events}), encoding="utf-8")
    (cause,) = compare_runs(RunFolder(run), RunFolder(world.run))["differences"]
    assert cause == "the run itself was resumed on another machine or library: threads was 2, now 1"


def test_early_stop_between_two_lines_and_a_resume_with_others_are_whole(world: World, tmp_path: Path) -> None:
    run = Path(shutil.copytree(world.run, tmp_path / "run"))
    folder, whole = RunFolder(run), record(run)
    text = (run / "config.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(text.replace("logging_steps: 1", "logging_steps: 2"), encoding="utf-8")
    whole["config_sha256"] = file_sha256(run / "config.yaml")
    drop_step(run, 3)
    with pytest.raises(ProofError, match="end at step 2"):
        check_evidence(folder, whole)
    check_evidence(folder, whole | {"stopped_because": "no better for 2 evaluations"})
    shutil.copy(world.run / "metrics.jsonl", run / "metrics.jsonl")
    drop_step(run, 2)
    with pytest.raises(ProofError, match="no training loss of step 2"):
        check_evidence(folder, whole)
    check_evidence(folder, whole | {"events": [{"at": "", "what": "resumed; training.logging_steps was 3, now 2"}]})


def test_resumed_run_records_the_configuration_of_now(world: World, tmp_path: Path) -> None:
    run = Path(shutil.copytree(world.run, tmp_path / "run"))
    assert record(run)["config_sha256"] == file_sha256(run / "config.yaml")
    (run / "run.json").write_text(json.dumps(record(run) | {"status": "interrupted"}))
    answer = run_here("train", run, "--resume", "training.save_total_limit=5")
    assert answer.code == 0, answer.err
    assert record(run)["config_sha256"] == file_sha256(run / "config.yaml") != record(world.run)["config_sha256"]


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
    (problem,) = read_problems(run_here("train", world.config, out, "--warm-start", ""))
    assert (problem.what, problem.where) == ("no path: ''", "option --warm-start")
    damaged = Path(shutil.copytree(world.run / "adapter", tmp_path / "damaged"))
    (damaged / "adapter_model.safetensors").write_bytes(b"no tensors")
    (problem,) = read_problems(run_here("train", world.config, out, "--warm-start", damaged))
    assert problem.what.startswith("cannot read adapter_model.safetensors: ")
    assert (problem.where, problem.fix) == (f"option --warm-start: {damaged}", "restore the file")
    assert not (tmp_path / "run").exists()
    (problem,) = read_problems(run_here("train", world.config, out, "--warm-start", world.run, "--resume"))
    assert problem.where == "options --warm-start, --resume"
    before = snapshot(world.run)
    (problem,) = read_problems(run_here("train", world.config, "--warm-start", world.run, "--overwrite"))
    assert "lies in the output folder" in problem.what
    assert snapshot(world.run) == before


def test_warm_start_in_python(world: World, tmp_path: Path) -> None:
    output = {"dir": str(tmp_path / "run")}
    run = loralab.train(world.config, warm_start=loralab.Run(world.run), output=output)
    assert run.record["warm_start"]["source"] == str(world.run)
    wrong: Any
    for wrong in (3, "", run.record):
        with pytest.raises(loralab.LoralabError, match="not a run or a path") as caught:
            loralab.train(world.config, warm_start=wrong, output=output)
        assert isinstance(caught.value, ConfigError)
