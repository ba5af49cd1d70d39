"""Training in float16 under loss scaling: the curve of float32, resumes to the same bits, overflows that pass."""

import math
from pathlib import Path
from typing import Any

import pytest

import loralab
from gpu.world import curve, killed_after, run_config, save_base
from loralab.training import loss_scaling
from loralab.training.state import RunState

HALF = {"precision": "float16"}
EVERY_TWO: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def last_state(run: loralab.Run) -> RunState:
    """Return what the run's last checkpoint remembers."""
    return RunState.load(run.path / "checkpoints" / f"checkpoint-{run.record['steps']}")


@pytest.fixture(scope="module")
def references(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, loralab.Run]:
    """The same runs in float32; the layout changes no curve."""
    folder, runs = tmp_path_factory.mktemp("float32"), {}
    for quantization in ("none", "nf4", "int8"):
        sections: dict[str, Any] = {"model": {"quantization": quantization}, "lora": {"dropout": 0.1}}
        runs[quantization] = loralab.train(run_config(base, folder, quantization, training=EVERY_TWO, **sections))
    return runs


@pytest.mark.parametrize(
    ("quantization", "training"),
    [("none", {"layout": "padded"}), ("none", {"gradient_checkpointing": True}), ("nf4", {}), ("int8", {})],
    ids=["padded", "shared, recomputed", "nf4", "int8"],
)
def test_curve_is_that_of_float32(
    base: Path, references: dict[str, loralab.Run], tmp_path: Path, quantization: str, training: dict[str, Any]
) -> None:
    sections: dict[str, Any] = {"model": HALF | {"quantization": quantization}, "lora": {"dropout": 0.1}}
    half = loralab.train(run_config(base, tmp_path, "run", training=EVERY_TWO | training, **sections))
    full = references[quantization]
    assert half.record["resolved"]["precision"] == {
        "value": "float16",
        "reason": "set in model.precision (trains with loss scaling)",
    }
    assert curve(half) == pytest.approx(curve(full), rel=2e-2)
    norms = [[line["grad_norm"] for line in run.metrics if "grad_norm" in line] for run in (half, full)]
    assert norms[0] == pytest.approx(norms[1], rel=0.1)  # of the true gradients, not of the scaled ones
    assert last_state(half).loss_scale == loss_scaling.INITIAL_SCALE
    assert last_state(full).loss_scale is None


RESUMES: dict[str, dict[str, Any]] = {
    "shared": {},
    "a layer trained whole": {
        "lora": {"modules_to_save": ["lm_head"], "dropout": 0.0},
        "training": {"layout": "packed"},
    },
    "nf4, 8-bit": {"model": {"quantization": "nf4"}, "training": {"optim": "adamw_8bit"}},
}


@pytest.mark.parametrize("name", RESUMES)
def test_a_killed_run_resumes_to_the_same_adapter(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The scale moves before and behind the kill: first down from one that is too high, then up every third step."""
    monkeypatch.setattr(loss_scaling, "INITIAL_SCALE", 2.0**30)
    monkeypatch.setattr(loss_scaling, "GROWTH_STEPS", 3)
    sections = RESUMES[name]
    sections = {
        "model": HALF | sections.get("model", {}),
        "lora": {"r": 64, "dropout": 0.1} | sections.get("lora", {}),
        "training": EVERY_TWO | sections.get("training", {}),
    }
    config = run_config(base, tmp_path, "whole", **sections)
    whole = loralab.train(config)
    cut = killed_after(whole, 4, tmp_path / "cut")
    config["output"]["dir"] = str(cut)
    resumed = loralab.train(config, resume=True)
    assert resumed.record["adapter_sha256"] == whole.record["adapter_sha256"]
    assert curve(resumed) == curve(whole)
    ends = [(state.loss_scale, state.good_steps) for state in map(last_state, (whole, resumed))]
    assert ends[0] == ends[1]
    assert ends[0][0] is not None
    assert ends[0][0] < 2.0**30


def test_an_overflow_lowers_the_scale_and_keeps_the_curve(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for name, scale in (("usual", loss_scaling.INITIAL_SCALE), ("huge", 2.0**40)):
        monkeypatch.setattr(loss_scaling, "INITIAL_SCALE", scale)
        runs.append(loralab.train(run_config(base, tmp_path, name, model=HALF, training=EVERY_TWO)))
    usual, huge = runs
    assert curve(huge) == pytest.approx(curve(usual), rel=1e-2)
    lowered = last_state(huge).loss_scale
    assert lowered is not None
    assert loss_scaling.LOWEST_SCALE < lowered < 2.0**40
    assert math.log2(lowered).is_integer()
    events = [event["what"] for event in huge.record["events"]]
    assert any("gradients exceeded float16's range" in event and "at step 1:" in event for event in events), events
    assert not any("exceeded" in event["what"] for event in usual.record["events"])
