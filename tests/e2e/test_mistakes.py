"""What a user can do wrong: each mistake is refused with exit code 2 and three lines, and nothing is half-written."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from loralab.cli import training
from loralab.console import ConsoleReporter
from loralab.errors import Problem
from loralab.training.checkpoint import list_checkpoints, read_checkpoint
from support import tiny
from support.command import Answer, read_problems, run_here, snapshot, write_config

ROWS = 20
PAGE_BYTES = 4096


@dataclass(frozen=True)
class World:
    """A tiny base, its rows, and runs that nobody may change."""

    folder: Path
    base: Path
    rows: Path

    def config(self, folder: Path, **sections: dict[str, Any]) -> Path:
        """Write a configuration whose run goes to `folder / "out"`."""
        config = tiny.run_config(self.base, self.rows, folder / "out", **sections)
        config["data"]["cache_dir"] = str(self.folder / "cache")
        return write_config(folder / "run.yaml", config)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    return World(folder, tiny.save_base(folder / "base"), tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(ROWS)))


def refused(answer: Answer, *, what: str, where: str, fix: str, code: int = 2) -> Problem:
    """Check that a command was refused for one reason, which names these things, and return it."""
    (problem,) = read_problems(answer, code=code)
    assert what in problem.what, problem
    assert where in problem.where, problem
    assert fix in problem.fix, problem
    return problem


# --- the configuration -------------------------------------------------------------------------------------------


def test_missing_config_names_the_nearest(world: World, tmp_path: Path) -> None:
    world.config(tmp_path)
    answer = run_here("train", tmp_path / "rnu.yaml")
    refused(answer, what=f"no such file: '{tmp_path}/rnu.yaml'", where="argument CONFIG", fix=f"'{tmp_path}/run.yaml'")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


CONFIG_MISTAKES = {
    "format": ("data.format=alpcaa", "no such format: 'alpcaa'", "data.format", "did you mean 'alpaca'?"),
    "template": ("data.template=alpcaa", "no such template: 'alpcaa'", "data.template", "did you mean 'alpaca'?"),
    "template file": ("data.template=none.jinja", "'none.jinja'", "data.template", "path of a Jinja file"),
    "key": ("training.learning_rat=1", "unknown key: 'training.learning_rat'", "training.learning_rat", "'learning_r"),
    "section": ("trainin.seed=1", "unknown key: 'trainin'", "key trainin", "did you mean"),
    "value": ("training.learning_rate=-1", "training.learning_rate got -1", "learning_rate", "Peak learning rate"),
    "choice": ("model.precision=float8", "got 'float8'", "model.precision", "precision"),
    "float16": ("model.precision=float16", "float16 does not train on a CPU", "model.precision", "bfloat16"),
    "no override": ("--", "not an override: 'data'", "command line: data", "section.key=value"),
    "trainer argument": ("advanced.trainer_args.fp16=true", "'fp16'", "advanced.trainer_args", "use model.precision"),
    "split": ("data.validation=1.5", "not a usable fraction: 1.5", "data.validation", "below 1"),
    "ignored": ("training.save_steps=5", "save_steps 5 with save_strategy no", "training.save_steps", "steps"),
    "range": ("advanced.trainer_args.adam_beta1=1", "adam_beta1 got 1", "advanced.trainer_args.adam_beta1", "below 1"),
    "home": ("output.dir=~nosuchuser/x", "cannot expand '~nosuchuser/x'", "output.dir", "whole path"),
    "long name": (f"data.cache_dir={'n' * 300}", "name of 300 bytes", "data.cache_dir", "shorten"),
    "digits": (f"training.seed={'1' * 5000}", "training.seed got '111", "training.seed", "Seed"),
}


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES.values(), ids=CONFIG_MISTAKES)
def test_config_mistake(mistake: tuple[str, str, str, str], world: World, tmp_path: Path) -> None:
    override, what, where, fix = mistake
    answer = run_here("train", world.config(tmp_path), "data" if override == "--" else override)
    refused(answer, what=what, where=where, fix=fix)
    assert answer.err.startswith("error: ")
    assert snapshot(tmp_path / "out") is None


def test_unknown_key_has_its_line(world: World, tmp_path: Path) -> None:
    config = world.config(tmp_path, training={"warmup_rato": 0.1})
    line = config.read_text(encoding="utf-8").splitlines().index("  warmup_rato: 0.1") + 1
    refused(
        run_here("train", config),
        what="unknown key: 'training.warmup_rato'",
        where=f"{config} line {line}, key training.warmup_rato",
        fix="did you mean 'warmup_ratio'?",
    )
    assert snapshot(tmp_path / "out") is None


def test_invalid_yaml_has_its_line(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("model:\n  name: x\ndata:\n  train: [a\nlora: {r: 4}\n", encoding="utf-8")
    refused(run_here("train", config), what="not valid YAML", where=f"{config} line 5", fix="check")


MANY_MISTAKES = {
    "fields": (["lora.rr=3", "training.seed=-1", "data.max_length=long"], ["'lora.rr'", "got -1", "got 'long'"]),
    "rules": (
        ["data.format=alpcaa", "data.template=nnone", "training.warmup_steps=1", "training.warmup_ratio=0.5"],
        ["warmup_ratio 0.5 and warmup_steps 1", "'alpcaa'", "'nnone'"],
    ),
    "sources": (["data.train=[./a.json, ./b.json]"], ["'./a.json'", "'./b.json'"]),
}


@pytest.mark.parametrize("mistakes", MANY_MISTAKES.values(), ids=MANY_MISTAKES)
def test_several_problems_at_once(mistakes: tuple[list[str], list[str]], world: World, tmp_path: Path) -> None:
    overrides, parts = mistakes
    problems = read_problems(run_here("train", world.config(tmp_path), *overrides))
    assert len(problems) == len(parts)
    for part in parts:
        assert sum(part in problem.what for problem in problems) == 1, problems
    assert snapshot(tmp_path / "out") is None


def test_unknown_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = run_here("init", "gpt2-alpcaa")
    refused(answer, what="no such recipe: 'gpt2-alpcaa'", where="argument RECIPE", fix="did you mean 'gpt2-alpaca'?")
    assert snapshot(tmp_path) == {}


# --- the data ----------------------------------------------------------------------------------------------------

GOOD = {"instruction": "red cat", "output": "blue dog"}
DATA_MISTAKES: dict[str, tuple[str, str, str, str, str]] = {
    "empty": ("rows.json", "", "empty file: '{file}'", "data.train", "at least one row"),
    "no rows": ("rows.json", "[]", "no rows in '{file}'", "{file}", "at least one row"),
    "invalid JSON": (
        "rows.json",
        f'[\n{json.dumps(GOOD)},\n{{"instruction": oops}}\n]',
        "invalid JSON: Expecting value, got 'oops",
        "{file} line 3 column 17",
        "mend it there",
    ),
    "invalid line": ("rows.jsonl", f"{json.dumps(GOOD)}\n{{oops\n", "invalid JSON", "{file} line 2", "one object per"),
    "columns": (
        "rows.json",
        json.dumps([{"query": "a", "reply": "b"}]),
        "no format fits these columns: query, reply",
        "{file}",
        "data.columns",
    ),
    "missing field": (
        "rows.json",
        json.dumps([GOOD, GOOD, {"instruction": "red"}]),
        "missing field 'output'; the row has: instruction",
        "{file} row 3",
        "data.on_bad_row: drop",
    ),
    "no string": (
        "rows.jsonl",
        f"{json.dumps(GOOD)}\n\n{json.dumps({**GOOD, 'output': 7})}\n",
        "field 'output' is int, not a string: 7",
        "{file} row 2 (line 3)",
        "mend the row",
    ),
    "no object": ("rows.json", json.dumps([GOOD, "red"]), "row 2 is a string", "{file} row 2", "an object"),
    "suffix": ("rows.xlsx", "x", "unknown kind of file '.xlsx'", "data.train", ".jsonl"),
}


@pytest.mark.parametrize("mistake", DATA_MISTAKES.values(), ids=DATA_MISTAKES)
def test_data_mistake(mistake: tuple[str, str, str, str, str], world: World, tmp_path: Path) -> None:
    name, content, what, where, fix = mistake
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    answer = run_here("train", world.config(tmp_path), f"data.train={file}")
    refused(answer, what=what.format(file=file), where=where.format(file=file), fix=fix)
    assert snapshot(tmp_path / "out") is None


def test_missing_data_names_the_nearest(world: World, tmp_path: Path) -> None:
    missing = world.folder / "rosw.json"
    answer = run_here("train", world.config(tmp_path), f"data.train={missing}")
    problem = refused(answer, what="no such file: ", where="key data.train", fix=f"did you mean '{world.rows}'?")
    assert "there is no 'rosw.json' in" in problem.fix  # the whole path may be cut
    assert snapshot(tmp_path / "out") is None


def test_all_rows_too_long(world: World, tmp_path: Path) -> None:
    answer = run_here("train", world.config(tmp_path), "data.max_length=8")
    refused(
        answer,
        what=f"{ROWS} of {ROWS} train rows dropped: {ROWS} prompt_too_long",
        where="first rows: 1, 2, 3, 4, 5",
        fix="raise data.max_length (now 8)",
    )
    assert snapshot(tmp_path / "out") is None


def test_too_many_rows_dropped(world: World, tmp_path: Path) -> None:
    rows = [*tiny.alpaca_rows(ROWS - 2), {"instruction": "red"}, {"instruction": "red", "output": None}]
    file = tiny.write_rows(tmp_path / "rows.json", rows)
    config = world.config(tmp_path, data={"train": str(file), "on_bad_row": "drop"})
    refused(
        run_here("train", config),
        what="2 of 20 train rows dropped (at most 5% may be, data.max_dropped_fraction): 2 bad_row",
        where="first rows: 19, 20",
        fix="data.max_dropped_fraction",
    )
    assert snapshot(tmp_path / "out") is None
    assert run_here("train", config, "data.max_dropped_fraction=0.1").code == 0


# --- the base model ----------------------------------------------------------------------------------------------


def break_base(world: World, folder: Path, *gone: str) -> Path:
    shutil.copytree(world.base, folder)
    for name in gone:
        (folder / name).unlink()
    return folder


def test_missing_model_names_the_nearest(world: World, tmp_path: Path) -> None:
    name = world.folder / "bsae"
    answer = run_here("train", world.config(tmp_path), f"model.name={name}")
    refused(answer, what=f"no such model folder: '{name}'", where="model.name", fix=f"did you mean '{world.base}'?")
    assert snapshot(tmp_path / "out") is None


def test_model_without_config(world: World, tmp_path: Path) -> None:
    base = break_base(world, tmp_path / "base", "config.json")
    answer = run_here("train", world.config(tmp_path), f"model.name={base}")
    refused(answer, what=f"no config.json in '{base}'", where="model.name", fix="Hugging Face layout")
    assert snapshot(tmp_path / "out") is None


def test_model_without_weights(world: World, tmp_path: Path) -> None:
    base = break_base(world, tmp_path / "base", "model.safetensors")
    answer = run_here("train", world.config(tmp_path), f"model.name={base}")
    problem = refused(answer, what=f"without safetensors weights: '{base}'", where="model.name", fix="safetensors")
    assert "found" not in problem.what
    assert snapshot(tmp_path / "out") is None


class _Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self.path, "unpickled")


def test_pickled_weights_are_never_opened(world: World, tmp_path: Path) -> None:
    base = break_base(world, tmp_path / "base", "model.safetensors")
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(tmp_path / "trapped")))
    answer = run_here("train", world.config(tmp_path), f"model.name={base}")
    refused(answer, what="found pytorch_model.bin", where="model.name", fix="pickles that may run code")
    assert not (tmp_path / "trapped").exists()
    assert snapshot(tmp_path / "out") is None
    pickle.loads((base / "pytorch_model.bin").read_bytes())  # the trap is one
    assert (tmp_path / "trapped").exists()


def test_more_tokens_than_positions(world: World, tmp_path: Path) -> None:
    answer = run_here("train", world.config(tmp_path), "data.max_length=257")
    refused(
        answer, what="257 is more than the model's 256 positions", where="data.max_length", fix="data.max_length: 256"
    )
    assert snapshot(tmp_path / "out") is None
    assert run_here("train", tmp_path / "run.yaml", "data.max_length=256", "training.max_steps=1").code == 0


def test_unknown_target_module(world: World, tmp_path: Path) -> None:
    answer = run_here("train", world.config(tmp_path), "lora.target_modules=[q_prj, v_proj]")
    problem = refused(answer, what="'q_prj'", where="lora.target_modules", fix="did you mean 'q_proj'?")
    assert "v_proj" not in problem.what
    assert snapshot(tmp_path / "out") is None


@pytest.mark.parametrize("key", ["model.name", "data.train"])
def test_unreachable_hub_id(key: str, world: World, tmp_path: Path) -> None:
    answer = run_here("train", world.config(tmp_path), f"{key}=nobody/nothing-here")
    refused(answer, what="nobody/nothing-here", where=f"key {key}", fix="network")
    assert snapshot(tmp_path / "out") is None


# --- the output folder -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(world: World) -> Path:
    """A finished run without checkpoints, on which `generate` and `eval` can be tried; read only."""
    folder = world.folder / "finished"
    folder.mkdir()
    config = world.config(folder, data={"validation": 4})
    answer = run_here("train", config)
    assert answer.code == 0, answer.err
    return folder / "out"


def test_other_run_is_kept(world: World, finished: Path, tmp_path: Path) -> None:
    before = snapshot(finished)
    answer = run_here("train", world.config(tmp_path), f"output.dir={finished}", "training.seed=7")
    problem = refused(
        answer, what=f"holds another run (completed): '{finished}'", where="output.dir", fix="--overwrite"
    )
    assert "--resume" in problem.fix
    assert snapshot(finished) == before


def test_overwrite_replaces_the_run_alone(world: World, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = world.config(tmp_path, training={"save_strategy": "epoch"})
    assert run_here("train", config, "data.validation=4").code == 0
    foreign = {"notes.txt": b"mine", "more/deep.bin": b"\0\1"}
    (out / "more").mkdir()
    for name, content in foreign.items():
        (out / name).write_bytes(content)
    old = snapshot(out)
    assert old is not None
    assert {"evaluation.json", "checkpoints/checkpoint-4/manifest.json"} <= set(old)

    answer = run_here("train", config, "--overwrite", "training.seed=7", "training.save_strategy=no")

    assert answer.code == 0, answer.err
    new = snapshot(out)
    assert new is not None
    assert {name: new[name] for name in foreign} == foreign
    assert "evaluation.json" not in new
    changed = "checkpoints/checkpoint-4/adapter_model.safetensors"
    assert new.get(changed) != old[changed]
    assert new["adapter/adapter_model.safetensors"] != old["adapter/adapter_model.safetensors"]
    assert json.loads((out / "run.json").read_text())["seeds"]["training"] == 7
    assert len((out / "metrics.jsonl").read_text().splitlines()) == ROWS // 4


@pytest.mark.parametrize("mistake", ["data.train=./nowhere.json", "lora.target_modules=[nothing]", "lora.rr=1"])
def test_failed_overwrite_keeps_the_old_run(mistake: str, world: World, finished: Path, tmp_path: Path) -> None:
    before = snapshot(finished)
    answer = run_here("train", world.config(tmp_path), f"output.dir={finished}", "--overwrite", mistake)
    read_problems(answer)
    assert snapshot(finished) == before


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["plain", "overwrite"])
def test_folder_of_something_else_is_kept(options: list[str], world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    answer = run_here("train", world.config(tmp_path), *options)
    refused(answer, what=f"not empty and holds no run: '{out}'", where="output.dir", fix="nothing there was touched")
    assert snapshot(out) == {"thesis.txt": b"years of work"}


def test_output_that_is_a_file(world: World, tmp_path: Path) -> None:
    answer = run_here("train", world.config(tmp_path), f"output.dir={world.rows}")
    refused(answer, what=f"not a folder: '{world.rows}'", where="output.dir", fix="another output.dir")


def test_output_that_cannot_be_written(world: World, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for output, parent in (("/dev/null/x", "/dev/null"), (f"{file}/deep/run", str(file))):
        answer = run_here("train", world.config(tmp_path), f"output.dir={output}")
        refused(answer, what=f"cannot write to '{output}'", where="output.dir", fix=f"make '{parent}' a writable")
    assert file.read_text() == "x"


def test_nothing_to_resume(world: World, tmp_path: Path) -> None:
    answer = run_here("train", world.config(tmp_path), "--resume")
    refused(answer, what=f"no run to resume in '{tmp_path}/out'", where="option --resume", fix="without --resume")
    assert snapshot(tmp_path / "out") is None


# --- resuming another run ----------------------------------------------------------------------------------------


class StopsAtStep3(ConsoleReporter):
    """Sends SIGINT to its own process when the third step is done."""

    def progress(self, label: str, done: int, total: int | None, *, detail: str = "") -> None:
        super().progress(label, done, total, detail=detail)
        if label == "train" and done == 3:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(scope="module")
def interrupted(world: World) -> Path:
    """A run that was stopped at step 3 of 5 with a checkpoint; read only."""
    folder = world.folder / "interrupted"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "ConsoleReporter", StopsAtStep3)
        answer = run_here("train", world.config(folder))
    assert answer.code == 130, answer.err
    assert [path.name for path in list_checkpoints(folder / "out" / "checkpoints")] == ["checkpoint-3"]
    return folder / "out"


@pytest.fixture(scope="module")
def uninterrupted(world: World) -> Path:
    """The same run without the stop; read only."""
    folder = world.folder / "uninterrupted"
    folder.mkdir()
    assert run_here("train", world.config(folder)).code == 0
    return folder / "out"


def changed_rows(world: World, folder: Path) -> str:
    rows = json.loads(world.rows.read_text(encoding="utf-8"))
    rows[11]["output"] += " red"
    return f"data.train={tiny.write_rows(folder / 'changed.json', rows)}"


def changed_base(world: World, folder: Path) -> str:
    base = break_base(world, folder / "changed-base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][5] += 1e-3
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return f"model.name={base}"


HASHES = r"was sha256 [0-9a-f]{12}\.\., now sha256 [0-9a-f]{12}\.\."
CHANGES: dict[str, tuple[Callable[[World, Path], str], str]] = {
    "seed": (lambda *_: "training.seed=7", "training.seed was 42, now 7"),
    "rank": (lambda *_: "lora.r=2", "lora.r was 4, now 2"),
    "rate": (lambda *_: "training.learning_rate=0.5", "training.learning_rate was 0.01, now 0.5"),
    "epochs": (lambda *_: "training.num_train_epochs=9", "training.num_train_epochs was 1.0, now 9.0"),
    "row": (changed_rows, rf"data\.rows {HASHES}"),
    "base": (changed_base, f"model weights {HASHES}"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_resume_of_a_changed_run(
    change: tuple[Callable[[World, Path], str], str], world: World, interrupted: Path, tmp_path: Path
) -> None:
    make, wanted = change
    before = snapshot(interrupted)
    answer = run_here("train", interrupted / "config.yaml", "--resume", make(world, tmp_path))
    problem = refused(answer, what="cannot resume", where=str(interrupted / "checkpoints"), fix="restore these")
    listed = problem.what.partition("the run has changed: ")[2]
    assert re.fullmatch(wanted, listed), listed
    values = re.findall(r"[0-9a-f]{12}", listed)
    assert len(set(values)) == len(values)
    assert snapshot(interrupted) == before


def test_resume_of_the_same_run_elsewhere(world: World, interrupted: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """The control of the test above: what does not change the run may change."""
    out = Path(shutil.copytree(interrupted, tmp_path / "out"))
    rows = shutil.copy(world.rows, tmp_path / "moved.json")
    base = break_base(world, tmp_path / "moved-base")
    answer = run_here(
        "train", out, "--resume", f"output.dir={out}", f"data.train={rows}", f"model.name={base}",
        "training.logging_steps=2",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert read_hash(out) == read_hash(uninterrupted)


def read_hash(run: Path) -> str:
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "completed"
    return str(record["adapter_sha256"])


def read_losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


# --- asking an adapter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--file", "prompts.txt"]], ids=["nothing", "blank file"])
def test_no_prompt(options: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n  \n")
    answer = run_here("generate", finished, *options)
    refused(answer, what="no prompt given", where="--prompt", fix="--prompt 'Your question'")


def test_missing_prompts_file(finished: Path) -> None:
    answer = run_here("generate", finished, "--file", "nowhere.txt")
    refused(answer, what="'nowhere.txt'", where="option --file", fix="UTF-8 text file")


def test_number_is_a_name_where_a_name_is_wanted(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["generate", finished, "-p", "red"], ["eval", finished]):
        answer = run_here(*command, "--model", "2024")
        (problem,) = read_problems(answer)
        assert "'2024'" in problem.what
        assert "string" not in problem.what


WITHOUT_EFFECT = {
    "section": (["eval", "training.seed=7"], "training.seed has no effect on this command", "training.seed=7"),
    "answers": (["eval", "evaluation.max_new_tokens=7"], "evaluation.max_new_tokens has no effect", "max_new_tokens=7"),
    "contract": (["eval", "data.template=none"], "data.template has no effect", "data.template=none"),
    "own rows": (["eval", "--data", "x.json", "data.validation=3"], "data.validation has no effect", "validation=3"),
    "rows": (["generate", "-p", "a", "data.max_length=7"], "data.max_length has no effect", "data.max_length=7"),
    "base": (["generate", "-p", "a", "--model", "m", "model.name=n"], "model.name has no effect", "model.name=n"),
    "nucleus": (["generate", "-p", "a", "--top-p", "0.5"], "top_p 0.5 has no effect at temperature 0", "--top-p"),
    "seed": (["generate", "-p", "a", "--seed", "3"], "seed 3 has no effect at temperature 0", "--seed"),
}


@pytest.mark.parametrize("mistake", WITHOUT_EFFECT.values(), ids=WITHOUT_EFFECT)
def test_what_a_command_does_not_read(mistake: tuple[list[str], str, str], finished: Path) -> None:
    (name, *rest), what, where = mistake
    before = snapshot(finished)
    refused(run_here(name, finished, *rest), what=what, where=where, fix="remove it")
    assert snapshot(finished) == before


@pytest.mark.parametrize("options", [["--temperature", "inf"], ["--temperature", "1", "--top-p", "0"]])
def test_sampling_out_of_range(options: list[str], finished: Path) -> None:
    answer = run_here("generate", finished, "-p", "red", *options)
    refused(answer, what=f"{options[-2][2:].replace('-', '_')} {float(options[-1])}", where=options[-2], fix="give")


def test_prompt_that_is_no_text(finished: Path, tmp_path: Path) -> None:
    answer = run_here("generate", finished, "-p", "red", "-p", "caf\udce9")
    refused(answer, what="not UTF-8 text: 'caf\\udce9'", where="prompt 2, character 4", fix="UTF-8")
    system = run_here("generate", finished, "-p", "red", "--system", "\udce9")
    refused(system, what="not UTF-8 text", where="system message, character 1", fix="UTF-8")


def test_empty_prompt_of_a_template_without_words(world: World, tmp_path: Path) -> None:
    rows = tiny.write_rows(tmp_path / "rows.json", [{"prompt": "red", "completion": "blue"}] * 4)
    assert run_here("train", world.config(tmp_path), f"data.train={rows}").code == 0
    answer = run_here("generate", tmp_path / "out", "-p", "red", "-p", "")
    refused(answer, what="empty prompt", where="prompt 2", fix="some text")


@pytest.mark.parametrize("command", ["generate", "eval", "report"])
def test_run_that_no_path_can_name(command: str) -> None:
    answer = run_here(command, "n" * 300, *(["-p", "red"] if command == "generate" else []))
    refused(answer, what="name of 300 bytes in the path", where="argument RUN", fix="at most 255 bytes")


@pytest.mark.parametrize("command", [["generate", "-p", "red"], ["eval"]], ids=["generate", "eval"])
@pytest.mark.parametrize("place", ["base", "nowhere"])
def test_no_adapter(command: list[str], place: str, world: World) -> None:
    folder = world.folder / place
    before = snapshot(folder)
    answer = run_here(command[0], folder, *command[1:])
    what = "no adapter_config.json in" if place == "base" else "no such folder:"
    refused(answer, what=f"{what} '{folder}'", where="argument RUN", fix="give a run folder, or the adapter folder")
    assert snapshot(folder) == before


@pytest.mark.parametrize(
    "command", [["generate", "-p", "red"], ["merge", "--output", "out"], ["export", "--to", "gguf"]]
)
def test_adapter_without_its_local_base(
    command: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = Path(shutil.copytree(finished / "adapter", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "gone"}))
    answer = run_here(command[0], adapter, *command[1:])
    refused(answer, what="it was a local folder called 'gone'", where=str(adapter), fix="--model FOLDER")


def llama_base(folder: Path, *, hidden: int, layers: int) -> Path:
    tokenizer = tiny.build_tokenizer()
    tokenizer.save_pretrained(folder)
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    sizes = {"hidden_size": hidden, "intermediate_size": 64, "num_hidden_layers": layers}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **sizes)).save_pretrained(folder)
    return folder


OTHER_BASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "architecture": (lambda folder: tiny.save_base(folder, "gpt2"), "q_proj"),
    "width": (lambda folder: llama_base(folder, hidden=48, layers=2), ""),
    "fewer layers": (lambda folder: llama_base(folder, hidden=32, layers=1), "layers.1."),
    "more layers": (lambda folder: llama_base(folder, hidden=32, layers=3), "layers.2."),
}


@pytest.mark.parametrize("other", OTHER_BASES.values(), ids=OTHER_BASES)
def test_adapter_of_another_base(other: tuple[Callable[[Path], Path], str], finished: Path, tmp_path: Path) -> None:
    build, named = other
    base, before = build(tmp_path / "other"), snapshot(finished)
    for command in (["generate", finished, "-p", "red"], ["eval", finished]):
        problem = refused(
            run_here(*command, "--model", base),
            what="not the base of this adapter",
            where=str(finished / "adapter"),
            fix="give the base that it was trained on",
        )
        assert "sha256" in problem.what
    bare = Path(shutil.copytree(finished / "adapter", tmp_path / "bare"))
    command = ("generate", bare, "-p", "red", "--model", base)
    refused(run_here(*command), what="not the base of this adapter", where=str(bare), fix="give the base")
    # One that does not say which its base was: its tensors must fit.
    (bare / "adapter_facts.json").unlink()
    problem = refused(
        run_here(*command),
        what="the adapter does not fit this base",
        where=str(bare),
        fix="name the base that it was trained on",
    )
    assert named in problem.what
    assert snapshot(finished) == before


def test_unknown_split(finished: Path) -> None:
    before = snapshot(finished)
    nonsense = run_here("eval", finished, "--split", "validatoin")
    refused(nonsense, what="got 'validatoin'", where="evaluation.split", fix="Split of the final evaluation")
    absent = run_here("eval", finished, "--split", "test")
    refused(absent, what="no such split: 'test'", where="evaluation.split", fix="known: train, validation")
    assert snapshot(finished) == before


def test_bare_adapter_without_data(finished: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(finished / "adapter", tmp_path / "bare"))
    answer = run_here("eval", bare)
    refused(answer, what="no data to evaluate on", where=str(bare), fix="--data FILE")


def change_template(adapter: Path) -> None:
    file = adapter / "chat_template.jinja"
    text = file.read_text(encoding="utf-8")
    assert text.count("### Instruction:") == 1
    file.write_text(text.replace("### Instruction:", "### instruction:"), encoding="utf-8")


def change_tokenizer(adapter: Path) -> None:
    file = adapter / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["merges"] = []
    file.write_text(json.dumps(content), encoding="utf-8")


def change_ids(adapter: Path) -> None:
    file = adapter / "prompt_contract.json"
    contract = json.loads(file.read_text(encoding="utf-8"))
    contract["golden"][1]["ids"][-1] += 1
    file.write_text(json.dumps(contract), encoding="utf-8")


BREAKAGES = {
    "template": (change_template, "### instruction:"),
    "tokenizer": (change_tokenizer, "What is the capital of France?"),
    "ids": (change_ids, "Sort these: 3, 1, 2."),
}


@pytest.mark.parametrize("breakage", BREAKAGES.values(), ids=BREAKAGES)
def test_broken_prompt_contract(breakage: tuple[Callable[[Path], None], str], finished: Path, tmp_path: Path) -> None:
    change, named = breakage
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    commands = (["generate", run, "-p", "red"], ["eval", run])
    for command in commands:
        assert run_here(*command).code == 0
    change(run / "adapter")
    before = snapshot(run)
    for command in commands:
        refused(
            run_here(*command),
            code=3,
            what="prompt contract broken",
            where=str(run / "adapter" / "prompt_contract.json"),
            fix="restore the adapter folder's tokenizer files",
        )
        assert named in run_here(*command).err
    assert snapshot(run) == before


# --- what happens while training ---------------------------------------------------------------------------------


def test_diverging_run_names_step_and_rows(world: World, tmp_path: Path) -> None:
    answer = run_here("train", world.config(tmp_path, training={"learning_rate": 1e30, "save_strategy": "epoch"}))
    problem = refused(answer, what="the loss is nan at step 2", where="training rows", fix="training.learning_rate")
    rows = [int(row) for row in problem.where.removeprefix("training rows ").split(", ")]
    assert len(set(rows)) == 4
    assert set(rows) <= set(range(1, ROWS + 1))
    out = tmp_path / "out"
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert (record["status"], record["stopped_because"]) == ("failed", "the loss is nan at step 2")
    assert not (out / "adapter").exists()
    assert [step for step, _ in read_losses(out)] == [1]


def test_infinite_weights_name_all_rows(world: World, tmp_path: Path) -> None:
    base = break_base(world, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"].fill_(torch.inf)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    rows = tiny.write_rows(tmp_path / "rows.json", tiny.alpaca_rows(4))
    answer = run_here("train", world.config(tmp_path), f"model.name={base}", f"data.train={rows}")
    problem = refused(answer, what="the loss is nan at step 1", where="training rows", fix="look at these rows")
    assert sorted(problem.where.removeprefix("training rows ").split(", ")) == ["1", "2", "3", "4"]


def test_the_row_behind_a_divergence_is_named(world: World, tmp_path: Path) -> None:
    """One token's embedding is not a number, and one row alone has that token."""
    (token,) = tiny.build_tokenizer().encode("z")
    base = break_base(world, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = torch.nan
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    rows = tiny.alpaca_rows(ROWS)
    rows[12]["instruction"] += " z"
    config = world.config(tmp_path, training={"per_device_train_batch_size": 1})
    file = tiny.write_rows(tmp_path / "rows.json", rows)
    answer = run_here("train", config, f"model.name={base}", f"data.train={file}")
    problem = refused(answer, what="the loss is nan at step", where="training rows 13", fix="look at these rows")
    assert problem.where == "training rows 13"
    step = int(problem.what.rpartition(" ")[2])
    assert [done for done, _ in read_losses(tmp_path / "out")] == list(range(1, step))


# --- a disk that fills -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disk:
    """A small file system in memory."""

    folder: Path

    def resize(self, size: int, *, remount: bool = True) -> subprocess.CompletedProcess[str]:
        options = f"{'remount,' if remount else ''}size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        return subprocess.run(command, capture_output=True, text=True, check=remount)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk of 64 MiB, made smaller by the test."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    small = Disk(tmp_path / "disk")
    small.folder.mkdir()
    mounted = small.resize(1 << 26, remount=False)
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted: {mounted.stderr.strip()}")
    yield small
    os.chdir(tmp_path)
    subprocess.run(["umount", str(small.folder)], check=True)


def disk_bytes(*paths: Path) -> int:
    """Return what files and folders take on a disk, in whole pages."""
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return sum(-(-file.stat().st_size // PAGE_BYTES) * PAGE_BYTES for file in files)


@pytest.fixture(scope="module")
def roomy(world: World) -> Path:
    """A run with a checkpoint after every step, on a disk that has room for it; read only."""
    folder = world.folder / "roomy"
    folder.mkdir()
    steps = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    assert run_here("train", world.config(folder, training=steps)).code == 0
    assert len(list_checkpoints(folder / "out" / "checkpoints")) == 5
    return folder / "out"


def small_files(run: Path) -> int:
    return disk_bytes(*(run / name for name in ("config.yaml", "run.json", "data.json", "metrics.jsonl")))


def check_full_disk(answer: Answer, out: Path) -> None:
    refused(answer, what=f"the disk is full: '{out}'", where="while writing the run (", fix="--resume")
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert record["status"] in ("failed", "running")  # the old record, where there was no room for a new one
    assert not (out / "adapter").exists()
    assert not list(out.glob(".*"))


def check_resumed(disk: Disk, roomy: Path, *, step: int) -> None:
    out = disk.folder / "run"
    disk.resize(1 << 26)
    answer = run_here("train", out / "config.yaml", "--resume")
    assert answer.code == 0, answer.err
    assert f"resuming from step {step}\n" in answer.err
    assert read_hash(out) == read_hash(roomy)
    assert read_losses(out) == read_losses(roomy)


def test_disk_fills_at_a_checkpoint(disk: Disk, roomy: Path) -> None:
    checkpoint = disk_bytes(roomy / "checkpoints" / "checkpoint-5")
    disk.resize(small_files(roomy) + 2 * checkpoint + checkpoint // 2)
    out = disk.folder / "run"

    answer = run_here("train", roomy / "config.yaml", f"output.dir={out}")

    check_full_disk(answer, out)
    found = [read_checkpoint(path) for path in list_checkpoints(out / "checkpoints")]
    assert [checkpoint and checkpoint.step for checkpoint in found] == [1, 2]
    check_resumed(disk, roomy, step=2)


def test_disk_fills_at_the_adapter(disk: Disk, roomy: Path) -> None:
    room = disk_bytes(roomy / "checkpoints" / "checkpoint-5") + disk_bytes(roomy / "adapter") // 2
    disk.resize(small_files(roomy) + room)
    out = disk.folder / "run"

    answer = run_here(
        "train", roomy / "config.yaml", f"output.dir={out}", "training.save_strategy=epoch", "training.save_steps=500"
    )

    check_full_disk(answer, out)
    found = [read_checkpoint(path) for path in list_checkpoints(out / "checkpoints")]
    assert [checkpoint and checkpoint.step for checkpoint in found] == [5]
    check_resumed(disk, roomy, step=5)
