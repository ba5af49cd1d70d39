"""Loss scaling: what it must not change, what an overflow does, and what a resume goes on with."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

import loralab
from gpu.world import killed_after
from loralab.config.schema import LoraConfig
from loralab.data.example import TokenizedExample
from loralab.errors import TrainingDivergedError
from loralab.layout.planner import Planner, ShrinkingPlanner
from loralab.models.adapters import build_adapter
from loralab.models.supervised import SupervisedPeftModel
from loralab.training import loss_scaling, trainer
from loralab.training.distributed import ALONE, FloatArray, Processes
from loralab.training.loss_scaling import HIGHEST_SCALE, INITIAL_SCALE, LOWEST_SCALE, LossScaler, resolve_loss_scaler
from loralab.training.state import RunState
from loralab.training.trainer import StepTrainer
from support import tiny
from support.families import build_family
from support.layouts import draw_adapter, sharing_rows

VOCABULARY = 97
PLANNER = Planner(90, layout="packed")  # several micro-batches to a step


def build(dtype: torch.dtype = torch.float32, **lora: Any) -> SupervisedPeftModel:
    base = build_family("llama", vocabulary=VOCABULARY).to(dtype)  # type: ignore[arg-type]
    model, _ = build_adapter(base.requires_grad_(False), LoraConfig(r=4, **lora), seed=0)
    draw_adapter(model, seed=1)
    model.tree_kernel = "per_tree"
    return model


def rows() -> list[TokenizedExample]:
    return sharing_rows(0, vocabulary=VOCABULARY)


def trainer_of(
    model: SupervisedPeftModel, folder: Path, state: RunState, *, processes: Processes = ALONE, **arguments: Any
) -> tuple[StepTrainer, list[str]]:
    notes: list[str] = []
    planner = ShrinkingPlanner(PLANNER)
    found = StepTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            **arguments,
        ),
        train_dataset=rows(),  # type: ignore[arg-type]
        steps=DataLoader(rows(), batch_size=len(rows()), collate_fn=planner),  # type: ignore[arg-type]
        run_state=state,
        measure=None,
        planner=planner,
        on_shrink=lambda *_: None,
        processes=processes,
        note=notes.append,
    )
    return found, notes


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def overflow_above(model: nn.Module, state: RunState, scale: float, value: float = math.inf) -> list[float]:
    """Let one gradient be `value` while the run's scale is above `scale`; return the scales that it was seen under."""
    seen: list[float] = []

    def spoil(gradient: Tensor) -> Tensor:
        seen.append(state.loss_scale or 0.0)
        return torch.full_like(gradient, value) if seen[-1] > scale else gradient

    next(weight for name, weight in model.named_parameters() if "lora_A" in name).register_hook(spoil)
    return seen


def run_one_step(
    folder: Path, state: RunState, model: SupervisedPeftModel | None = None
) -> tuple[float, Any, list[str]]:
    model = build(dropout=0.1, modules_to_save=["lm_head"]) if model is None else model
    engine, notes = trainer_of(model, folder, state)
    share = engine.training_step(model, PLANNER(rows()))
    return float(share), gradients(model), notes


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_scale_changes_no_bit_of_loss_and_gradients(tmp_path: Path) -> None:
    plain, expected, _ = run_one_step(tmp_path, RunState())
    state = RunState(loss_scale=2.0**14)
    share, found, notes = run_one_step(tmp_path, state)
    assert equal(found, expected)
    assert any("lm_head" in name for name in found)  # a layer that is trained whole too
    assert share == plain
    assert (state.loss_scale, state.good_steps, notes) == (2.0**14, 1, [])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_an_overflow_halves_the_scale_and_runs_the_step_again(tmp_path: Path, value: float) -> None:
    plain_state = RunState()
    plain, expected, _ = run_one_step(tmp_path, plain_state)
    model, state = build(dropout=0.1, modules_to_save=["lm_head"]), RunState(loss_scale=2.0**13, good_steps=7)
    seen = overflow_above(model, state, 2.0**11, value)
    share, found, notes = run_one_step(tmp_path, state, model)
    assert equal(found, expected)
    assert share == plain
    assert sorted(set(seen), reverse=True) == [2.0**13, 2.0**12, 2.0**11]
    assert (state.loss_scale, state.good_steps) == (2.0**11, 1)
    counted = ("window_total", "window_count", "train_tokens", "train_examples", "laid_out_tokens")
    assert [getattr(state, name) for name in counted] == [getattr(plain_state, name) for name in counted]
    exceeded = "gradients exceeded float16's range 2 times at step 1"
    assert notes == [f"{exceeded}: loss scale lowered to 2,048, the step was run again"]


def test_gradients_that_no_scale_keeps_finite_end_the_run(tmp_path: Path) -> None:
    model, state = build(), RunState(loss_scale=1.0)
    seen = overflow_above(model, state, 0.0)
    with pytest.raises(TrainingDivergedError, match=r"not finite at step 1, down to a loss scale of 0\.0625") as caught:
        run_one_step(tmp_path, state, model)
    (problem,) = caught.value.problems
    assert problem.where == f"training rows {', '.join(str(each.row) for each in rows())}"
    assert "model.precision: float32" in problem.fix
    assert min(seen) == LOWEST_SCALE
    assert state.train_examples == 0


def test_a_loss_that_is_no_number_is_not_run_again(tmp_path: Path) -> None:
    model, state = build(), RunState(loss_scale=2.0**14)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_A" in name).fill_(torch.nan)
    seen = overflow_above(model, state, math.inf)
    with pytest.raises(TrainingDivergedError, match="the loss is nan at step 1") as caught:
        run_one_step(tmp_path, state, model)
    assert caught.value.problems[0].fix.startswith("set model.precision: float32")
    assert len(seen) == len(PLANNER(rows()).micro_batches)
    assert state.loss_scale == 2.0**14


def test_an_overflow_in_another_process_is_one_here(tmp_path: Path) -> None:
    class Beside(Processes):
        """One of two, of which the other overflows once."""

        told = 0

        def sum(self, values: FloatArray) -> FloatArray:
            Beside.told += 1
            return np.append(values[:-1] * 2, values[-1] + (Beside.told == 1))

    model, state = build(), RunState(loss_scale=2.0**14)
    engine, _ = trainer_of(model, tmp_path, state, processes=Beside(count=2))
    engine.training_step(model, PLANNER(rows()))
    assert state.loss_scale == 2.0**13
    assert Beside.told == 2


def test_scale_rises_after_good_steps_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scaling, "GROWTH_STEPS", 3)
    model, state = nn.Linear(1, 1), RunState(loss_scale=HIGHEST_SCALE / 4)
    scaler = LossScaler(state, note=lambda _: None)
    scales = []
    for step in range(1, 14):
        if step == 3:
            assert scaler.lower()
        scaler.unscale(model, step=step)
        scales.append(math.log2(HIGHEST_SCALE / scaler.scale))
    assert scales == [2, 2, 3, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0]
    scaler.unscale(model, step=14)
    assert scaler.scale == HIGHEST_SCALE


def test_only_float16_is_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        state = RunState()
        assert resolve_loss_scaler(build(dtype), state, note=print) is None
        assert state.loss_scale is None
    state = RunState()
    assert resolve_loss_scaler(build(torch.float16), state, note=print) is not None
    assert state.loss_scale == INITIAL_SCALE
    monkeypatch.setattr(LossScaler, "overflowed", None)  # a run without a scale does not even look
    run_one_step(tmp_path, RunState())


def test_scale_lifts_gradients_into_the_range_of_float16(tmp_path: Path) -> None:
    """In a step of a million tokens, the share of one is below what float16 can hold."""
    steps = {}
    for name, dtype, scale in (
        ("exact", torch.float32, None),
        ("scaled", torch.float16, None),
        ("unscaled", torch.float16, 1.0),
    ):
        model = build(dtype)
        engine, _ = trainer_of(model, tmp_path, RunState(loss_scale=scale))
        engine.training_step(model, PLANNER(rows()), 10**6)
        steps[name] = torch.cat([each.flatten() for each in gradients(model).values()])
    exact = steps.pop("exact")
    error = {name: float((found - exact).norm() / exact.norm()) for name, found in steps.items()}
    assert error["scaled"] < 0.02
    assert error["unscaled"] > 10 * error["scaled"]


def test_training_logs_the_true_norm_and_gives_the_same_weights(tmp_path: Path) -> None:
    found = []
    for scale in (None, 2.0**14):
        model = build(dropout=0.1)
        engine, _ = trainer_of(model, tmp_path, RunState(loss_scale=scale), max_steps=4, learning_rate=1e-2)
        engine.train()
        logged = [(line["loss"], line["grad_norm"]) for line in engine.state.log_history if "loss" in line]
        found.append((logged, {name: weight for name, weight in model.named_parameters() if weight.requires_grad}))
    (logged, weights), (scaled_logged, scaled_weights) = found
    assert len(logged) == 4
    assert scaled_logged == logged
    assert equal(scaled_weights, weights)


def test_a_resumed_run_goes_on_with_the_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scaling, "GROWTH_STEPS", 3)
    monkeypatch.setattr(trainer, "resolve_loss_scaler", lambda _, state, note: LossScaler(state, note=note))
    base = tiny.save_base(tmp_path / "base", "llama")
    data = tiny.write_rows(tmp_path / "rows.json", tiny.alpaca_rows(32))
    training = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None, "num_train_epochs": 1}
    config = tiny.run_config(base, data, tmp_path / "whole", training=training, lora={"dropout": 0.1})
    whole = loralab.train(config)
    config["output"]["dir"] = str(killed_after(whole, 4, tmp_path / "cut"))
    resumed = loralab.train(config, resume=True)
    for run in (whole, resumed):
        state = RunState.load(run.path / "checkpoints" / "checkpoint-8")
        assert (state.loss_scale, state.good_steps) == (INITIAL_SCALE * 4, 2)  # anew, it would be (* 2, 1)
    assert resumed.record["adapter_sha256"] == whole.record["adapter_sha256"]
