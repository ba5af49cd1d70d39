"""The printed equations of a QLoRA run, against numbers worked out by hand.

Schedule, AdamW, clipping, W' = W + alpha / r B A, effective batch and perplexity, each on the path
that a run takes: its trainer, its optimizer, its adapter, its measurement.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import loralab
from loralab.config.load import load_config
from loralab.config.schema import EvaluationConfig, LoraConfig
from loralab.config.training_schema import TrainingConfig
from loralab.data.example import TokenizedExample
from loralab.evaluation.perplexity import measure_loss
from loralab.layout.planner import Planner, ShrinkingPlanner
from loralab.models.adapters import build_adapter
from loralab.models.supervised import SupervisedPeftModel
from loralab.progress import Reporter
from loralab.training.arguments import build_arguments
from loralab.training.callbacks import MetricsWriter
from loralab.training.distributed import Processes
from loralab.training.loss import run_micro_batches
from loralab.training.state import RunState
from loralab.training.trainer import StepTrainer
from loralab.workflows.step_layout import build_sampler
from support import tiny
from support.families import build_family
from support.layouts import draw_adapter, largest_difference, sharing_rows, transformers_loss_and_gradients
from unit.layout.examples import example

CPU = torch.device("cpu")
VOCABULARY = 97
RATE = 0.01
HALF = math.sqrt(3) / 2  # cos(pi / 6)


def build_model(**lora: Any) -> SupervisedPeftModel:
    model, _ = build_adapter(build_family("llama", vocabulary=VOCABULARY), LoraConfig(**lora), seed=0)
    model.tree_kernel = "per_tree"
    return model


def build_trainer(
    model: SupervisedPeftModel,
    folder: Path,
    training: TrainingConfig,
    *,
    examples: Sequence[TokenizedExample],
    further: dict[str, Any] | None = None,
) -> StepTrainer:
    """Return a run's trainer; every step takes all examples, in micro-batches of at most 90 tokens."""
    planner = ShrinkingPlanner(Planner(90, layout="packed"))
    return StepTrainer(
        model=model,
        args=build_arguments(
            training,
            evaluation=EvaluationConfig(strategy="no"),
            staging=folder,
            steps_per_epoch=1,
            device=CPU,
            further=further or {},
        ),
        train_dataset=list(examples),
        steps=DataLoader(list(examples), batch_size=len(examples), collate_fn=planner),  # type: ignore[arg-type]
        run_state=RunState(),
        measure=None,
        planner=planner,
        on_shrink=lambda step, budget: None,
        callbacks=[MetricsWriter(folder / "metrics.jsonl")],
    )


# Learning rate of step s = 0, 1, ... of S = 8, in units of the peak.
SCHEDULES = {
    # rho S = 2: 0, 1/2, then f(0), f(1/6), ... f(5/6) with f(x) = 1 - x ...
    ("linear", 0.25): [0, 1 / 2, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
    # ... or f(x) = (1 + cos(pi x)) / 2
    ("cosine", 0.25): [0, 1 / 2, 1, (1 + HALF) / 2, 3 / 4, 1 / 2, 1 / 4, (1 - HALF) / 2],
    ("constant_with_warmup", 0.25): [0, 1 / 2, 1, 1, 1, 1, 1, 1],
    # rho S = 2.4: three steps of warm-up, since a step is whole
    ("linear", 0.3): [0, 1 / 3, 2 / 3, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5],
    ("linear", 0.0): [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("base"), "llama")


@pytest.mark.parametrize(("schedule", "warmup_ratio"), SCHEDULES)
def test_warm_up_and_schedule_of_a_run(base: Path, tmp_path: Path, schedule: str, warmup_ratio: float) -> None:
    training = {
        "max_steps": 8,
        "learning_rate": RATE,
        "lr_scheduler_type": schedule,
        "warmup_ratio": warmup_ratio,
        "per_device_train_batch_size": 2,
    }
    rows = tiny.write_rows(tmp_path / "rows.json", tiny.alpaca_rows(4))
    run = loralab.train(tiny.run_config(base, rows, tmp_path / "run", training=training))
    assert [line["step"] for line in run.metrics] == list(range(1, 9))
    expected = [RATE * factor for factor in SCHEDULES[schedule, warmup_ratio]]
    assert [line["learning_rate"] for line in run.metrics] == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_logged_learning_rate_is_the_one_that_the_step_took(tmp_path: Path) -> None:
    """Plain gradient descent moves a weight by rate x gradient: by 0 in the first step, then at half the peak."""
    model, examples = build_model(r=4), sharing_rows(0, vocabulary=VOCABULARY)
    draw_adapter(model, seed=1)
    moved = []
    for steps in (1, 2):
        before = weights_of(model)
        training = TrainingConfig(
            max_steps=steps, optim="sgd", learning_rate=RATE, warmup_steps=2, max_grad_norm=0.0, logging_steps=1,
            lr_scheduler_type="constant_with_warmup", save_strategy="no",
        )  # fmt: skip
        gradients = transformers_loss_and_gradients(model, examples)[1]
        model.zero_grad()
        build_trainer(model, tmp_path, training, examples=examples).train()
        moved.append((before, weights_of(model), gradients))
    (before, after, _), (start, end, gradients) = moved
    assert all(torch.equal(before[name], after[name]) for name in before)
    moves = {name: (start[name] - end[name]) / (RATE / 2) for name in start}  # of the two steps the first moved nothing
    assert largest_difference(moves, gradients) < 1e-3
    logged = [line["learning_rate"] for line in logged_lines(tmp_path)]
    assert logged == [0.0, 0.0, RATE / 2]


def logged_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}


# Gradients 1, -2, 1/2 on a weight of 2, rate 1/10, decay 1/2: what it is after each step.
ADAMW = {
    # beta1 1/2, beta2 3/4, epsilon 1:
    #   t   m              v                m^              v^               m^/(sqrt(v^) + 1)      weight
    #   1   1/2            1/4              1               1                1/2                    2 - (1/2 + 1)/10
    #   2   -3/4           19/16            -1              19/7             -1/(1.647509 + 1)      1.85 + ...
    #   3   -1/8           61/64            -1/7            61/37            -0.142857/2.283997
    "large epsilon": ({"adam_beta1": 0.5, "adam_beta2": 0.75, "adam_epsilon": 1.0}, (1.85, 1.79527158, 1.71176261)),
    # beta1 0.9, beta2 0.999, epsilon 1e-8 (the defaults):
    #   1   0.1            0.001            1               1                1
    #   2   -0.11          0.004999         -11/19          2.5007504        -0.36610352
    #   3   -0.049         0.005244001      -49/271         1.7497495        -0.13669066
    "defaults": ({}, (1.8, 1.74661025, 1.67294881)),
}


@pytest.mark.parametrize("case", ADAMW)
def test_adamw_by_hand(tmp_path: Path, case: str) -> None:
    """m, v, both bias corrections, epsilon beside the root, and decay that passes by the moments."""
    further, expected = ADAMW[case]
    model = build_model(r=4)
    training = TrainingConfig(max_steps=3, learning_rate=0.1, weight_decay=0.5, lr_scheduler_type="constant")
    trainer = build_trainer(model, tmp_path, training, examples=sharing_rows(0, vocabulary=VOCABULARY), further=further)
    optimizer = trainer.create_optimizer()
    trained = {id(weight): name for name, weight in model.named_parameters() if weight.requires_grad}
    held = {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
    assert held.keys() == trained.keys()  # the frozen base has no place in it
    assert all(group["weight_decay"] == 0.5 for group in held.values())
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    with torch.no_grad():
        for weight in weights:
            weight.fill_(2.0)
    for gradient, value in zip((1.0, -2.0, 0.5), expected, strict=True):
        for weight in weights:
            weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        for weight in weights:
            torch.testing.assert_close(weight.detach(), torch.full_like(weight, value), rtol=1e-6, atol=0)


@pytest.mark.parametrize("share", [0.25, 4.0, None])
def test_clipping_after_normalisation(tmp_path: Path, share: float | None) -> None:
    """g c / ||g|| where the norm of the whole step's mean gradient is above c, else g; several micro-batches."""
    model, examples = build_model(r=4), sharing_rows(0, vocabulary=VOCABULARY)
    draw_adapter(model, seed=1)
    gradients = transformers_loss_and_gradients(model, examples)[1]
    model.zero_grad()
    norm = math.sqrt(sum(float((gradient.double() ** 2).sum()) for gradient in gradients.values()))
    limit = 0.0 if share is None else share * norm
    training = TrainingConfig(
        max_steps=1, optim="sgd", learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=limit,
        logging_steps=1, save_strategy="no",
    )  # fmt: skip
    before = weights_of(model)
    trainer = build_trainer(model, tmp_path, training, examples=examples)
    assert len(next(iter(trainer.get_train_dataloader())).micro_batches) > 1
    trainer.train()
    after = weights_of(model)
    factor = 0.25 if share == 0.25 else 1.0
    moves = {name: (before[name] - after[name]) / (RATE * factor) for name in before}
    assert largest_difference(moves, gradients) < 1e-3
    (line,) = logged_lines(tmp_path)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)  # as it was before clipping


@pytest.mark.parametrize(("variant", "grown"), [("lora", 15.0), ("rslora", 30.0)])
def test_adapted_weight_by_hand(variant: str, grown: float) -> None:
    """W' = W + alpha / r B A: with B of one 2 and A of one 5, one weight grows by 6 / 4 x 10, and the logits follow.

    rslora divides by the root of r: 6 / 2 x 10.
    """
    model = build_model(variant=variant, r=4, alpha=6, target_modules=["q_proj"])
    frozen = build_family("llama", vocabulary=VOCABULARY)
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_base_model().get_submodule(name)
    with torch.no_grad():
        layer.lora_A["default"].weight.zero_()[1, 3] = 5.0
        layer.lora_B["default"].weight.zero_()[7, 1] = 2.0
        frozen.get_submodule(name).weight[7, 3] += grown
    ids = torch.arange(12)[None]
    with torch.no_grad():
        adapted, plain = model(input_ids=ids).logits, frozen(input_ids=ids).logits
        with model.disable_adapter():
            base = model(input_ids=ids).logits
    torch.testing.assert_close(adapted, plain, rtol=1e-4, atol=1e-4)
    assert float((adapted - base).abs().max()) > 1e-2


def test_gradient_of_a_is_zero_until_b_has_moved() -> None:
    """dL/dA = alpha / r B^T G x^T, and B = 0 at the start; G itself is not."""
    model, examples = build_model(r=4), sharing_rows(0, vocabulary=VOCABULARY)
    step = Planner(4096)(examples)

    def largest() -> tuple[float, float]:
        model.zero_grad()
        run_micro_batches(model, step.micro_batches, device=CPU, backward=lambda loss: loss.backward())
        each = {name: float(w.grad.abs().max()) for name, w in model.named_parameters() if w.grad is not None}
        of_a = [value for name, value in each.items() if "lora_A" in name]
        of_b = [value for name, value in each.items() if "lora_B" in name]
        assert len(of_a) == len(of_b) > 0
        return max(of_a), min(of_b)

    of_a, of_b = largest()
    assert of_a == 0.0 < of_b
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(0.01)
    assert largest()[0] > 0.0


@pytest.mark.parametrize(("batch", "accumulation", "devices"), [(2, 3, 1), (3, 2, 2), (1, 1, 4)])
def test_effective_batch(base: Path, tmp_path: Path, batch: int, accumulation: int, devices: int) -> None:
    """A step takes B x K x D rows over all devices, each row of an epoch once; the last step takes the rest."""
    rows = tiny.write_rows(tmp_path / "rows.json", tiny.alpaca_rows(4))
    training = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    config = load_config(tiny.run_config(base, rows, tmp_path / "run", training=training)).config
    examples = [example(([1], [2]), row=row) for row in range(1, 23)]
    ranks = [
        list(build_sampler(config, examples, processes=Processes(rank=rank, count=devices))[0])
        for rank in range(devices)
    ]
    steps = [[row for part in parts for row in part] for parts in zip(*ranks, strict=True)]
    whole = batch * accumulation * devices
    assert [len(step) for step in steps] == [whole] * (22 // whole) + ([22 % whole] if 22 % whole else [])
    assert sorted(row for step in steps for row in step) == list(range(22))
    if devices == 1:
        return
    assert max(len(part) for rank in ranks for part in rank) == batch * accumulation


def test_steps_of_a_run_follow_from_the_effective_batch(base: Path, tmp_path: Path) -> None:
    """22 rows, B 2, K 3: steps of 6, 6, 6 and 4 rows, two epochs of them."""
    rows = tiny.write_rows(tmp_path / "rows.json", tiny.alpaca_rows(22))
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 2}
    run = loralab.train(tiny.run_config(base, rows, tmp_path / "run", training=training))
    assert (run.record["steps"], run.record["epochs"], run.record["sampling"]["rows_per_step"]) == (8, 2.0, 6)
    seconds = run.record["train_seconds"]
    assert run.record["examples_per_second"] * seconds == pytest.approx(2 * 22, rel=0.05)


def biased_model() -> SupervisedPeftModel:
    """Return a model that says token 0 with 3/12 and each of the other nine with 1/12, whatever came before."""
    model = tiny.build_model("llama", vocabulary=10)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                weight.zero_()
            elif name.endswith("embed_tokens.weight"):
                weight.fill_(1.0)
        model.get_output_embeddings().weight[0] = math.log(3) / 32  # 32 hidden units, each 1 behind the norm
    adapted, _ = build_adapter(model, LoraConfig(r=2), seed=0)
    adapted.tree_kernel = "per_tree"
    return adapted


@pytest.mark.parametrize("batch_size", [1, 2])
def test_perplexity_by_hand(batch_size: int) -> None:
    """One token of 1/4 and three of 1/12: exp((ln 4 + 3 ln 12) / 4) = 6912^(1/4), for every batch size.

    The mean over rows, exp((ln 4 + ln 12) / 2) = 48^(1/2), is another number.
    """
    rows = [example(([5, 6], [0])), example(([7], [1, 2, 3]), row=2)]
    options: dict[str, Any] = {"planner": Planner(4096), "device": CPU, "reporter": Reporter(), "label": "x"}
    measured = measure_loss(biased_model(), rows, batch_size=batch_size, **options).as_dict()
    assert measured["supervised_tokens"] == 4
    assert measured["eval_loss"] == pytest.approx((math.log(4) + 3 * math.log(12)) / 4, rel=1e-5)
    assert measured["perplexity"] == pytest.approx(6912**0.25, rel=1e-5)
    if batch_size == 1:
        assert math.exp(measured["eval_loss_batch_mean"]) == pytest.approx(48**0.5, rel=1e-5)
