"""A run that has changed is never gone on with: each change is refused by name, with both values."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import loralab
from loralab.errors import RunFolderError
from support import tiny

Sections = dict[str, dict[str, Any]]
SECTIONS: Sections = {
    "data": {"validation": 5},
    "lora": {"dropout": 0.1},
    "training": {"save_strategy": "steps", "save_steps": 2},
}


@dataclass(frozen=True)
class World:
    """A run that a kill ended behind its checkpoint; read only."""

    folder: Path
    base: Path
    rows: Path
    run: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base = tiny.save_base(folder / "base")
    rows = tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(16))
    run = loralab.train(tiny.run_config(base, rows, folder / "run", **SECTIONS))
    run.folder.record.write_text(json.dumps(run.record | {"status": "running"}))
    return World(folder, base, rows, run.path)


def other_rows(change: Callable[[list[dict[str, str]]], Any]) -> Callable[[World, Path], Sections]:
    def make(world: World, folder: Path) -> Sections:
        rows = json.loads(world.rows.read_text(encoding="utf-8"))
        change(rows)
        return {"data": {"train": str(tiny.write_rows(folder / "other.json", rows))}}

    return make


def other_base(change: Callable[[Path], None]) -> Callable[[World, Path], Sections]:
    def make(world: World, folder: Path) -> Sections:
        base = Path(shutil.copytree(world.base, folder / "base"))
        change(base)
        return {"model": {"name": str(base)}}

    return make


def change_weights(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][5] += 1e-3
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def change_tokenizer(base: Path) -> None:
    file = base / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(content), encoding="utf-8")


def setting(section: str, **values: Any) -> Callable[[World, Path], Sections]:
    return lambda *_: {section: values}


HASHES = r"was sha256 [0-9a-f]{12}\.\., now sha256 [0-9a-f]{12}\.\."
CHANGES: dict[str, tuple[Callable[[World, Path], Sections], str]] = {
    "row changed": (other_rows(lambda rows: rows[3].update(output="red")), f"data.rows {HASHES}"),
    "row added": (other_rows(lambda rows: rows.append(rows[0])), f"data.rows {HASHES}"),
    "rows in another order": (other_rows(lambda rows: rows.reverse()), f"data.rows {HASHES}"),
    "template": (setting("data", template="none"), "data.template was 'alpaca', now 'none'"),
    "stop tokens": (
        setting("data", stop_tokens=["!"]),
        # An ordinary token that ends answers becomes a special one, so the tokenizer is another, too.
        re.escape("""data.stop_tokens was '["<|end|>"]', now '["!"]'""") + f"; data.tokenizer {HASHES}",
    ),
    "tokenizer": (other_base(change_tokenizer), f"data.tokenizer {HASHES}"),
    "model weights": (other_base(change_weights), f"model weights {HASHES}"),
    "rank": (setting("lora", r=2), "lora.r was 4, now 2"),
    "dropout": (setting("lora", dropout=0.2), "lora.dropout was 0.1, now 0.2"),
    "learning rate": (setting("training", learning_rate=0.5), "training.learning_rate was 0.01, now 0.5"),
    "batch size": (
        setting("training", per_device_train_batch_size=2, gradient_accumulation_steps=2),
        "training.gradient_accumulation_steps was 1, now 2; training.per_device_train_batch_size was 4, now 2",
    ),
    "seed": (setting("training", seed=7), "training.seed was 42, now 7"),
    "max_length": (setting("data", max_length=96), "data.max_length was '128', now '96'"),
    "train_on": (setting("data", train_on="all"), "data.train_on was 'response', now 'all'"),
    "split": (
        setting("data", validation=4),
        r"data\.split was 'validation 5, random, seed 42', now 'validation 4, random, seed 42'",
    ),
    "precision": (setting("model", precision="bfloat16"), "model.precision was 'float32', now 'bfloat16'"),
    "epochs": (setting("training", num_train_epochs=9), "training.num_train_epochs was 1.0, now 9.0"),
}


def merged(changes: Sections) -> Sections:
    return {name: SECTIONS.get(name, {}) | changes.get(name, {}) for name in {*SECTIONS, *changes}}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_run_is_refused_by_name(
    change: tuple[Callable[[World, Path], Sections], str], world: World, tmp_path: Path
) -> None:
    make, said = change
    before = {path: path.read_bytes() for path in world.run.rglob("*") if path.is_file()}
    config = tiny.run_config(world.base, world.rows, world.run, **merged(make(world, tmp_path)))
    with pytest.raises(RunFolderError) as caught:
        loralab.train(config, resume=True)
    assert caught.value.exit_code == 2
    (problem,) = caught.value.problems
    listed = problem.what.partition("cannot resume, the run has changed: ")[2]
    assert re.fullmatch(said, listed), listed
    assert problem.where.startswith(str(world.run / "checkpoints"))
    assert {path: path.read_bytes() for path in world.run.rglob("*") if path.is_file()} == before


def test_same_run_in_other_places_is_not_refused(world: World, tmp_path: Path) -> None:
    """The control of the test above: moved files, rows in other words of JSON, what only is written."""
    rows = tmp_path / "moved.json"
    rows.write_text(json.dumps(json.loads(world.rows.read_text(encoding="utf-8")), indent=4), encoding="utf-8")
    base = shutil.copytree(world.base, tmp_path / "moved-base")
    run = Path(shutil.copytree(world.run, tmp_path / "run"))
    changes = {"data": {"train": str(rows)}, "training": {"logging_steps": 2, "save_steps": 1, "save_total_limit": 9}}
    resumed = loralab.train(tiny.run_config(base, rows, run, **merged(changes)), resume=True)
    assert resumed.record["adapter_sha256"] == json.loads((world.run / "run.json").read_text())["adapter_sha256"]
