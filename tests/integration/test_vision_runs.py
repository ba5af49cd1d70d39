"""Runs on rows with pictures: cut and layout change nothing, a resume is the same run, and so are two processes."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loralab
from loralab.training.checkpoint import list_checkpoints
from support import tiny
from support.command import write_config
from support.processes import run_team
from support.tiny_vision import draw_picture, save_vision_base, vqa_rows

Sections = dict[str, dict[str, Any]]
# Everything that a cut might change: dropout, and gradients into the tower.
NOISY: Sections = {"lora": {"vision": "all", "dropout": 0.1}}


@dataclass(frozen=True)
class World:
    """A tiny base that reads pictures, and rows on 4 pictures; read only."""

    base: Path
    rows: Path

    def config(self, output: Path, *parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        merged: Sections = {"data": {"max_length": 256}, "training": {"max_steps": 4}}
        for part in (NOISY, *parts):
            for name, values in part.items():
                merged[name] = merged.get(name, {}) | dict(values)
        return tiny.run_config(self.base, self.rows, output, **merged)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    rows = tiny.write_rows(folder / "rows.json", vqa_rows(folder, 4, questions=3))
    return World(save_vision_base(folder / "base"), rows)


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> loralab.Run:
    """An uninterrupted run with a checkpoint after every step; read only."""
    saving = {"training": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}}
    return loralab.train(world.config(tmp_path_factory.mktemp("whole") / "run", saving))


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def check_same_run(run: Path, whole: Path) -> None:
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)
    found, wanted = adapter(run), adapter(whole)
    assert found.keys() == wanted.keys()
    assert any("visual.blocks" in name for name in wanted)
    for name, tensor in wanted.items():
        assert tensor.norm() > 0, f"{name} was never trained"
        assert float((found[name] - tensor).norm() / tensor.norm()) <= 1e-4, name


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "training",
    [
        pytest.param({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, id="1 x 4", marks=SLOW),
        pytest.param(
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "token_budget": 40},
            id="2 x 2, 40 tokens",
        ),
        pytest.param({"layout": "padded"}, id="padded", marks=SLOW),
        pytest.param({"layout": "packed", "token_budget": 64}, id="packed", marks=SLOW),
        pytest.param({"gradient_checkpointing": True}, id="recomputed", marks=SLOW),
    ],
)
def test_the_same_run_however_a_step_is_cut(
    training: dict[str, Any], world: World, whole: loralab.Run, tmp_path: Path
) -> None:
    run = loralab.train(world.config(tmp_path / "run", {"training": training}))
    check_same_run(run.path, whole.path)


@SLOW
def test_dropout_acts_in_the_tower(world: World, whole: loralab.Run, tmp_path: Path) -> None:
    """Or the cuts above would prove nothing about its masks."""
    still = loralab.train(world.config(tmp_path / "run", {"lora": {"dropout": 0.0}}))
    assert losses(still.path) != pytest.approx(losses(whole.path), rel=1e-4)


def killed_after(whole: loralab.Run, step: int, folder: Path) -> Path:
    """Return a copy of a run as a kill soon after `step` leaves it."""
    run = Path(shutil.copytree(whole.path, folder))
    for path in list_checkpoints(run / "checkpoints"):
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)
    for name in ("adapter", "plots"):
        shutil.rmtree(run / name)
    (run / "report.html").unlink()
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps(record | {"status": "running"}), encoding="utf-8")
    return run


@pytest.mark.parametrize("step", [1, pytest.param(3, marks=SLOW)])
def test_a_resume_is_the_same_run_to_the_bit(step: int, world: World, whole: loralab.Run, tmp_path: Path) -> None:
    run = killed_after(whole, step, tmp_path / "run")
    saving = {"training": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}}
    resumed = loralab.train(world.config(run, saving), resume=True)
    assert resumed.record["adapter_sha256"] == whole.record["adapter_sha256"]
    assert losses(run) == losses(whole.path)


@SLOW
def test_a_resume_with_another_picture_is_refused(
    world: World, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The rows are the same files; what they show is not."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(world.rows.parent / "images", folder / "images")
    rows = Path(shutil.copy(world.rows, folder / "rows.json"))
    other = World(world.base, rows)
    saving = {"training": {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "save_total_limit": None}}
    run = killed_after(loralab.train(other.config(tmp_path / "run", saving)), 1, tmp_path / "killed")
    draw_picture(folder / "images/0.png", 99)
    with pytest.raises(loralab.LoralabError, match="tokens of train"):
        loralab.train(other.config(run, saving), resume=True)


@SLOW
def test_two_processes_are_one_run(world: World, whole: loralab.Run, tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "config.yaml",
        world.config(tmp_path / "run", {"training": {"per_device_train_batch_size": 2}}),
    )
    answers = run_team("train", config, folder=tmp_path)
    assert [answer.code for answer in answers] == [0, 0], [answer.err for answer in answers]
    check_same_run(tmp_path / "run", whole.path)
