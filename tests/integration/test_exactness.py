"""The layout, the split of a step and an interruption never change what is trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import loralab
from loralab.config.checks import TRAINER_ARGS
from loralab.errors import RunFolderError
from loralab.training.checkpoint import list_checkpoints
from support import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.json", tiny.alpaca_rows(27))


def run(base: Path, rows: Path, output: Path, **sections: dict[str, Any]) -> loralab.Run:
    return loralab.train(tiny.run_config(base, rows, output, **sections))


def losses(run: loralab.Run) -> list[float]:
    return [line["loss"] for line in run.metrics if "loss" in line]


def test_batch_times_accumulation_is_all_that_counts(base: Path, rows: Path, tmp_path: Path) -> None:
    curves, adapters = [], []
    for batch, accumulation in ((8, 1), (4, 2), (1, 8)):
        result = run(
            base,
            rows,
            tmp_path / f"{batch}x{accumulation}",
            training={
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": accumulation,
                "num_train_epochs": 2,
            },
        )
        curves.append(losses(result))
        adapters.append(load_file(result.adapter() / "adapter_model.safetensors"))
    assert len(curves[0]) == 8  # 27 rows: the fourth step of an epoch has three
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[2] == pytest.approx(curves[0], rel=1e-5)
    for name, tensor in adapters[0].items():
        assert tensor.abs().max() > 0, f"{name} was never trained"
        torch.testing.assert_close(adapters[2][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.2])
def test_layout_and_token_budget_never_change_the_curve(base: Path, rows: Path, tmp_path: Path, dropout: float) -> None:
    expected = None
    for layout in ("padded", "packed", "shared"):
        for budget in ("auto", 64):
            result = run(
                base,
                rows,
                tmp_path / f"{layout}-{budget}",
                lora={"dropout": dropout},
                training={"layout": layout, "token_budget": budget, "per_device_train_batch_size": 8},
            )
            assert result.record["resolved"]["layout"]["value"] == layout
            curve = losses(result)
            expected = expected or curve
            assert curve == pytest.approx(expected, rel=1e-5), (layout, budget)


def test_same_configuration_gives_the_same_adapter(base: Path, rows: Path, tmp_path: Path) -> None:
    dropout = {"lora": {"dropout": 0.1}}
    first = run(base, rows, tmp_path / "a", **dropout)
    second = run(base, rows, tmp_path / "b", **dropout)
    other = run(base, rows, tmp_path / "c", **dropout, training={"seed": 43})
    assert first.record["adapter_sha256"] == second.record["adapter_sha256"]
    assert losses(first) == losses(second)
    assert first.record["adapter_sha256"] != other.record["adapter_sha256"]


def test_gradient_checkpointing_changes_nothing(base: Path, rows: Path, tmp_path: Path) -> None:
    plain = run(base, rows, tmp_path / "plain")
    recomputed = run(base, rows, tmp_path / "recomputed", training={"gradient_checkpointing": True})
    assert losses(recomputed) == pytest.approx(losses(plain), rel=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_resumed_run_equals_uninterrupted_one(base: Path, rows: Path, tmp_path: Path, precision: str) -> None:
    sections: dict[str, dict[str, Any]] = {
        "model": {"precision": precision},
        "data": {"validation": 5},
        "lora": {"dropout": 0.1},
        "training": {
            "num_train_epochs": 2,
            "save_strategy": "steps",
            "save_steps": 4,
            "save_total_limit": None,
            "logging_steps": 3,
        },
    }
    whole = run(base, rows, tmp_path / "whole", **sections)
    cut = tmp_path / "cut"
    shutil.copytree(whole.path, cut)
    # As a kill right behind the first checkpoint leaves it: later checkpoints and results are not there yet.
    for checkpoint in list_checkpoints(cut / "checkpoints")[1:]:
        shutil.rmtree(checkpoint)
    shutil.rmtree(cut / "adapter")
    (cut / "run.json").write_text(json.dumps(whole.record | {"status": "running"}))
    config = tiny.run_config(base, rows, cut, **sections)
    resumed = loralab.train(config, resume=True)
    assert resumed.record["adapter_sha256"] == whole.record["adapter_sha256"]
    timed = {"tokens_per_second"}
    assert [{k: v for k, v in line.items() if k not in timed} for line in resumed.metrics] == [
        {k: v for k, v in line.items() if k not in timed} for line in whole.metrics
    ]


def test_damaged_checkpoint_is_passed_over(base: Path, rows: Path, tmp_path: Path) -> None:
    training = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
    whole = run(base, rows, tmp_path / "run", training=training)
    newest = list_checkpoints(whole.folder.checkpoints)[-1]
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    whole.folder.record.write_text(json.dumps(whole.record | {"status": "running"}))
    resumed = loralab.train(tiny.run_config(base, rows, whole.path, training=training), resume=True)
    assert resumed.record["adapter_sha256"] == whole.record["adapter_sha256"]


def test_resume_refuses_other_data(base: Path, rows: Path, tmp_path: Path) -> None:
    training = {"save_strategy": "steps", "save_steps": 2}
    first = run(base, rows, tmp_path / "run", training=training)
    first.folder.record.write_text(json.dumps(first.record | {"status": "running"}))
    changed = tiny.alpaca_rows(27)
    changed[3]["output"] += " red"
    other = tiny.write_rows(tmp_path / "other.json", changed)
    with pytest.raises(RunFolderError, match=r"data\.rows was sha256"):
        loralab.train(tiny.run_config(base, other, first.path, training=training), resume=True)


def test_best_checkpoint_is_the_one_that_is_kept(base: Path, rows: Path, tmp_path: Path) -> None:
    result = run(
        base,
        rows,
        tmp_path / "run",
        data={"validation": 6},
        training={
            "num_train_epochs": 6,
            "learning_rate": 0.3,  # far too high: the loss soon rises again
            "load_best_model_at_end": True,
            "early_stopping": {"metric": "eval_loss", "patience": 2},
        },
    )
    measured = {line["step"]: line["eval_loss"] for line in result.metrics if "eval_loss" in line}
    best = min(measured.values())
    evaluation = json.loads(result.folder.evaluation.read_text())
    assert evaluation["eval_loss"] == pytest.approx(best, rel=1e-6)
    assert "early stopping" in result.record["stopped_because"]
    assert max(measured) < 36


def test_early_stopping_on_the_training_loss(base: Path, rows: Path, tmp_path: Path) -> None:
    stopping = {"metric": "loss", "patience": 2, "min_delta": 100.0}
    result = run(base, rows, tmp_path / "run", training={"early_stopping": stopping, "num_train_epochs": 3})
    assert result.record["steps"] == 3
    assert "loss" in result.record["stopped_because"]


@pytest.fixture(scope="module")
def plain(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    cosine = {"lr_scheduler_type": "cosine"}
    return str(run(base, rows, tmp_path_factory.mktemp("plain") / "run", training=cosine).record["adapter_sha256"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("adam_beta1", 0.5), ("adam_beta2", 0.5), ("adam_epsilon", 0.1), ("lr_scheduler_kwargs", {"num_cycles": 2})],
)
def test_every_passed_through_argument_acts(
    base: Path, rows: Path, tmp_path: Path, plain: str, name: str, value: object
) -> None:
    sections = {"training": {"lr_scheduler_type": "cosine"}, "advanced": {"trainer_args": {name: value}}}
    assert run(base, rows, tmp_path / "run", **sections).record["adapter_sha256"] != plain


def test_all_passed_through_arguments_are_tested() -> None:
    assert set(TRAINER_ARGS) == {"adam_beta1", "adam_beta2", "adam_epsilon", "lr_scheduler_kwargs"}
