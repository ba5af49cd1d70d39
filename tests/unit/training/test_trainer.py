"""One optimizer step inside Trainer: exact sums, and only what Trainer lets be overridden."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from loralab.config.schema import LoraConfig
from loralab.data.example import TokenizedExample
from loralab.errors import OutOfMemoryError, TrainingDivergedError
from loralab.layout.planner import Layout, Planner, ShrinkingPlanner
from loralab.models.adapters import build_adapter
from loralab.models.supervised import SupervisedPeftModel
from loralab.training.state import RunState
from loralab.training.trainer import StepTrainer
from support.families import build_family
from support.layouts import draw_adapter, largest_difference, sharing_rows, transformers_loss_and_gradients

VOCABULARY = 97
OVERRIDDEN = {
    "__init__",
    "create_accelerator_and_postprocess",
    "create_optimizer",
    "evaluate",
    "floating_point_ops",
    "get_batch_samples",
    "get_train_dataloader",
    "log",
    "save_model",
    "training_step",
}


def test_only_public_methods_of_trainer_are_overridden() -> None:
    own = {name for name in vars(StepTrainer) if callable(getattr(StepTrainer, name))}
    assert {name for name in own if hasattr(Trainer, name)} == OVERRIDDEN
    assert not any(hasattr(Trainer, name) for name in own if name.startswith("_") and not name.endswith("__"))


def build() -> SupervisedPeftModel:
    model, _ = build_adapter(build_family("llama", vocabulary=VOCABULARY), LoraConfig(r=4), seed=0)
    draw_adapter(model, seed=1)
    model.tree_kernel = "per_tree"
    return model


def trainer_of(
    model: SupervisedPeftModel, folder: Path, *, planner: Planner, examples: list[TokenizedExample]
) -> tuple[StepTrainer, RunState, list[Any]]:
    state, shrunk = RunState(), []
    shrinking = ShrinkingPlanner(planner)
    trainer = StepTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder), use_cpu=True, report_to=[], remove_unused_columns=False, disable_tqdm=True
        ),
        steps=DataLoader(examples, batch_size=len(examples), collate_fn=shrinking),  # type: ignore[arg-type]
        run_state=state,
        measure=None,
        planner=shrinking,
        on_shrink=lambda step, budget: shrunk.append((step, budget)),
    )
    return trainer, state, shrunk


@pytest.mark.parametrize(("layout", "budget"), [("padded", 90), ("packed", 4096), ("shared", 4096), ("shared", 60)])
def test_step_has_transformers_own_loss_and_gradients(tmp_path: Path, layout: Layout, budget: int) -> None:
    model, examples = build(), sharing_rows(0, vocabulary=VOCABULARY)
    own, own_gradients = transformers_loss_and_gradients(model, examples)
    model.zero_grad()
    trainer, state, _ = trainer_of(model, tmp_path, planner=Planner(budget, layout=layout), examples=examples)
    (step,), count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    assert int(count) == step.supervised_tokens == sum(each.supervised_tokens for each in examples)
    share = trainer.training_step(model, step, count)
    assert float(share) == pytest.approx(own, rel=1e-5)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert largest_difference(gradients, own_gradients) < 1e-5
    assert (state.train_examples, state.window_count) == (len(examples), int(count))
    assert state.train_tokens == step.example_tokens
    assert state.laid_out_tokens == step.tokens
    assert state.close_window()[0] == pytest.approx(own, rel=1e-5)


def test_diverged_step_names_its_rows(tmp_path: Path) -> None:
    model, examples = build(), sharing_rows(0, vocabulary=VOCABULARY)[:3]
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_A" in name).fill_(torch.nan)
    trainer, _, _ = trainer_of(model, tmp_path, planner=Planner(4096), examples=examples)
    with pytest.raises(TrainingDivergedError, match="the loss is nan at step 1") as caught:
        trainer.training_step(model, Planner(4096)(examples))
    (problem,) = caught.value.problems
    assert problem.where == f"training rows {', '.join(str(each.row) for each in examples)}"


def refuse_above(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    forward = SupervisedPeftModel.forward

    def limited(model: SupervisedPeftModel, *args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].numel() > tokens:
            raise torch.OutOfMemoryError("out of memory")
        return forward(model, *args, **kwargs)

    monkeypatch.setattr(SupervisedPeftModel, "forward", limited)


def test_step_that_does_not_fit_is_run_again_from_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches come largest first, but nothing rests on it: what was summed before is dropped."""
    model, examples = build(), sharing_rows(0, vocabulary=VOCABULARY)
    own, own_gradients = transformers_loss_and_gradients(model, examples)
    model.zero_grad()
    trainer, state, shrunk = trainer_of(model, tmp_path, planner=Planner(240, layout="packed"), examples=examples)
    step = Planner(240, layout="packed")(examples)
    step = replace(step, micro_batches=step.micro_batches[::-1])
    assert step.micro_batches[0].tokens <= 150 < step.micro_batches[-1].tokens
    refuse_above(monkeypatch, 150)
    share = trainer.training_step(model, step)
    half = min(240, max(batch.input_ids.numel() for batch in step.micro_batches)) // 2
    assert shrunk == [(1, half)]
    assert state.token_budget == half
    assert float(share) == pytest.approx(own, rel=1e-5)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert largest_difference(gradients, own_gradients) < 1e-5


def test_one_example_that_does_not_fit_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = build(), sharing_rows(0, vocabulary=VOCABULARY)
    trainer, _, shrunk = trainer_of(model, tmp_path, planner=Planner(240), examples=examples)
    refuse_above(monkeypatch, 5)
    with pytest.raises(OutOfMemoryError, match="with one example at a time") as caught:
        trainer.training_step(model, Planner(240)(examples))
    assert caught.value.problems[0].where == "optimizer step 1"
    budgets = [budget for _, budget in shrunk]
    assert budgets[0] <= 120
    assert all(2 * after <= before for before, after in itertools.pairwise(budgets))
