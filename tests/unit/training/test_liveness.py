"""What is said to be trained is trained, or the run stops and names what is not."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from loralab.config.schema import LoraConfig
from loralab.data.example import Branch, TokenizedExample
from loralab.errors import DeadAdapterError
from loralab.layout.planner import Planner, ShrinkingPlanner
from loralab.models.adapters import build_adapter
from loralab.models.supervised import SupervisedPeftModel
from loralab.training.liveness import LivenessCheck, check_reached
from loralab.training.loss import model_inputs
from loralab.training.state import RunState
from loralab.training.trainer import StepTrainer
from support.families import build_family
from support.fusing import unfused
from support.layouts import draw_adapter, sharing_rows

VOCABULARY = 97
# Variants that need neither training rows nor a quantized base to begin.
VARIANTS = ["lora", "rslora", "dora", "lora_plus", "pissa", "olora", "vera", "loha", "lokr", "ia3"]


def build(family: str = "llama", *, checkpointing: bool = False, **lora: Any) -> SupervisedPeftModel:
    base = build_family(family, vocabulary=VOCABULARY)
    if checkpointing:
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return on(base, **lora)


def on(base: Any, **lora: Any) -> SupervisedPeftModel:
    base.requires_grad_(False)
    model, _ = build_adapter(base, LoraConfig(**{"r": 4, **lora}), seed=0)
    model.tree_kernel = "per_tree"
    return model


def train(
    model: SupervisedPeftModel,
    folder: Path,
    *,
    rows: Sequence[TokenizedExample] | None = None,
    steps: int = 4,
    state: RunState | None = None,
    **arguments: Any,
) -> tuple[RunState, list[str]]:
    """Run a few steps and return what is remembered and noted."""
    state = RunState() if state is None else state
    notes: list[str] = []
    examples = list(sharing_rows(0, vocabulary=VOCABULARY) if rows is None else rows) * steps
    planner = ShrinkingPlanner(Planner(4096))
    trainer = StepTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            use_cpu=True,
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            save_strategy="no",
            max_steps=steps,
            **{"learning_rate": 1e-2, **arguments},
        ),
        train_dataset=examples,  # type: ignore[arg-type]
        steps=DataLoader(examples, batch_size=len(examples) // steps, collate_fn=planner),  # type: ignore[arg-type]
        run_state=state,
        measure=None,
        planner=planner,
        on_shrink=lambda *_: None,
        callbacks=[LivenessCheck(state, note=notes.append)],
    )
    trainer.train()
    return state, notes


def stopped(model: SupervisedPeftModel, folder: Path, **arguments: Any) -> Any:
    """Return what is said of a run that the check stops."""
    with pytest.raises(DeadAdapterError) as caught:
        train(model, folder, **arguments)
    return caught.value.problems[0]


def cut(module: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let what comes out of a module go on changed."""
    module.register_forward_hook(lambda _module, _inputs, output: change(output))


def no_gradient(output: torch.Tensor) -> torch.Tensor:
    """Keep the value, and a graph whose gradients are all zero."""
    return output.detach() + 0.0 * output


def layer(model: SupervisedPeftModel, name: str) -> Any:
    return model.get_submodule(f"base_model.model.model.layers.{name}")


# --- alive -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_alive(variant: str, checkpointing: bool, tmp_path: Path) -> None:
    state, notes = train(build(checkpointing=checkpointing, variant=variant), tmp_path)
    assert state.alive
    assert notes == []


@pytest.mark.parametrize(
    ("family", "lora"),
    [
        ("llama", {"dropout": 0.5}),
        ("llama", {"modules_to_save": ["norm", "lm_head", "embed_tokens"]}),
        ("qwen2", {"modules_to_save": ["lm_head"]}),
        ("gpt2", {"modules_to_save": ["ln_1", "wpe", "attn.c_proj"]}),
        ("qwen2", {"trainable_token_indices": [96, 1]}),  # rows of the head, too, which every step moves
    ],
)
def test_every_place_is_alive(family: str, lora: dict[str, Any], tmp_path: Path) -> None:
    state, notes = train(build(family, **lora), tmp_path)
    assert state.alive
    assert notes == []


def test_it_passes_only_after_three_steps_that_moved_something(tmp_path: Path) -> None:
    assert not train(build(), tmp_path, steps=2)[0].alive
    assert train(build(), tmp_path, steps=3)[0].alive
    warm_up = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}  # the first step's rate is zero
    assert not train(build(), tmp_path, steps=3, **warm_up)[0].alive
    assert train(build(), tmp_path, steps=4, **warm_up)[0].alive


# --- dead --------------------------------------------------------------------------------------------------------


def test_a_layer_that_the_forward_never_uses(tmp_path: Path) -> None:
    base = build_family("llama", vocabulary=VOCABULARY)
    base.model.layers[1].mlp.idle = nn.Linear(32, 32)
    said = stopped(on(base), tmp_path)
    assert said.what == (
        "2 of 30 trained tensors learn nothing (model.layers.1.mlp.idle.lora_A.weight, "
        "model.layers.1.mlp.idle.lora_B.weight); no gradient reaches them: the forward does not use their layers, or "
        "cuts the result off from the loss"
    )
    assert said.where == "optimizer step 1"
    assert "name the others in lora.target_modules" in said.fix


@pytest.mark.parametrize(("change", "why"), [(torch.detach, "no gradient reaches"), (no_gradient, "is zero")])
def test_a_branch_that_is_cut_off(change: Any, why: str, tmp_path: Path) -> None:
    model = build()
    cut(layer(model, "0.mlp.down_proj"), change)
    said = stopped(model, tmp_path)
    # Zero gradients of A prove nothing yet: B is zero. Without a graph, they have none at all.
    assert said.what.startswith(f"{6 if change is torch.detach else 3} of 28 trained tensors learn nothing")
    assert why in said.what
    assert "model.layers.0.mlp.gate_proj.lora_" in said.what


@pytest.mark.parametrize(("warmup", "step"), [(0, 3), (2, 4)])
def test_an_a_that_never_wakes_up(warmup: int, step: int, tmp_path: Path) -> None:
    """It may wait for its B, but no longer than to the third step with a positive rate."""
    model = build()
    unfused(model)  # a fused layer calls no part of its own
    cut(layer(model, "1.self_attn.v_proj.lora_A.default"), no_gradient)
    schedule = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": warmup}
    said = stopped(model, tmp_path, steps=5, **schedule)
    assert said.what.startswith("1 of 28 trained tensors learn nothing (model.layers.1.self_attn.v_proj.lora_A.weight)")
    assert said.where == f"optimizer step {step}"


@pytest.mark.parametrize("started", [False, True], ids=["B at zero", "B drawn"])
def test_an_a_has_nothing_to_wait_for_where_its_b_is_not_zero(started: bool, tmp_path: Path) -> None:
    model = build()
    if started:
        draw_adapter(model, seed=1)
    unfused(model)
    cut(layer(model, "1.self_attn.v_proj.lora_A.default"), no_gradient)
    assert stopped(model, tmp_path).where == f"optimizer step {1 if started else 3}"


@pytest.mark.parametrize(
    ("variant", "part"),
    [("dora", "lora_magnitude_vector"), ("vera", "vera_lambda_b"), ("loha", "hada_w2_a"), ("lokr", "lokr_w1")],
)
def test_parts_of_other_variants(variant: str, part: str, tmp_path: Path) -> None:
    """A tensor whose gradient is taken away is found, whatever it is called."""
    model = build(variant=variant)
    weight = next(w for n, w in model.named_parameters() if part in n and w.requires_grad)
    weight.register_hook(torch.zeros_like)
    said = stopped(model, tmp_path)
    assert part in said.what
    assert said.what.startswith("1 of ") or variant != "dora"


def test_a_layer_trained_whole_that_is_cut_off(tmp_path: Path) -> None:
    model = build(modules_to_save=["norm"])
    trained: Any = model.get_submodule("base_model.model.model.norm")
    trained.modules_to_save["default"].weight.register_hook(torch.zeros_like)
    said = stopped(model, tmp_path)
    assert said.what.startswith("1 of 29 trained tensors learn nothing (model.norm.weight)")
    assert said.fix.endswith("and none in lora.modules_to_save that it does not")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_a_loss_that_depends_on_nothing_trained(checkpointing: bool, tmp_path: Path) -> None:
    model = build(checkpointing=checkpointing)
    cut(model.get_submodule("base_model.model.model.norm"), torch.detach)
    said = stopped(model, tmp_path)
    assert said.what.startswith("the loss does not depend on any trained tensor: no gradient reaches them")


def test_nothing_is_trained(tmp_path: Path) -> None:
    model = build()
    for weight in model.parameters():
        weight.requires_grad_(False)
    with pytest.raises(DeadAdapterError, match="nothing is trained: every tensor is frozen"):
        LivenessCheck(RunState(), note=print).on_train_begin(None, None, None, model=model)  # type: ignore[arg-type]


# --- not dead, though without gradient ---------------------------------------------------------------------------


class Experts(nn.Module):
    """A feed-forward layer of which no token is ever sent to the second half."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(4)])

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.experts[0](states) + self.experts[1](states)  # type: ignore[no-any-return]


def test_experts_without_tokens_are_named(tmp_path: Path) -> None:
    base = build_family("llama", vocabulary=VOCABULARY)
    base.model.layers[0].mlp = Experts(32)
    state, notes = train(on(base), tmp_path)
    assert state.alive
    assert notes == [
        "experts that no token was sent to in the first 3 steps: 4 tensors ("
        + ", ".join(f"model.layers.0.mlp.experts.{n}.lora_{part}.weight" for n in (2, 3) for part in "AB")
        + ")"
    ]


def test_experts_without_tokens_stop_several_processes(tmp_path: Path) -> None:
    base = build_family("llama", vocabulary=VOCABULARY)
    base.model.layers[0].mlp = Experts(32)
    model = on(base)
    train(model, tmp_path, steps=1)
    model.zero_grad()
    (batch,) = Planner(4096)(sharing_rows(0, vocabulary=VOCABULARY)).micro_batches
    model(**model_inputs(batch)).losses.sum().backward()
    with pytest.raises(DeadAdapterError, match="experts that no token was sent to, in a run of several") as caught:
        check_reached(model, step=1)
    assert caught.value.problems[0].fix.startswith("run in one process")


def test_tokens_that_did_not_occur_are_named(tmp_path: Path) -> None:
    rows = sharing_rows(0, vocabulary=90)
    used = {int(token) for row in rows for branch in row.branches for token in branch.prompt_ids}
    present = min(used)
    state, notes = train(build(trainable_token_indices=[95, present, 91]), tmp_path, rows=rows)
    assert state.alive
    assert notes == ["trained tokens that did not occur in the first 3 steps: 95, 91"]
    _, notes = train(build(trainable_token_indices=[present]), tmp_path, rows=rows)
    assert notes == []


def test_a_single_token_before_each_label_proves_nothing(tmp_path: Path) -> None:
    """Attention over one token is constant: queries and keys have no gradient, and are not dead."""
    ids = np.arange(3, 11, dtype=np.int32)
    rows = [TokenizedExample(n + 1, 0, (Branch(ids[n : n + 1], ids[n + 1 : n + 2]),)) for n in range(4)]
    state, _ = train(build(), tmp_path, rows=rows)
    assert not state.attended
    assert not state.alive
    longer = [TokenizedExample(9, 0, (Branch(ids[:3], ids[3:5]),))]
    assert train(build(), tmp_path, rows=rows + longer)[0].alive


def test_what_has_passed_is_not_looked_at_again(tmp_path: Path) -> None:
    """A resumed run may have nothing left to learn; the check belongs to the beginning."""
    model = build()
    cut(layer(model, "0.mlp.down_proj"), no_gradient)
    state, _ = train(model, tmp_path, state=RunState(alive=True))
    assert state.alive


def test_the_state_remembers_it(tmp_path: Path) -> None:
    state, _ = train(build(), tmp_path / "run")
    state.save(tmp_path)
    assert RunState.load(tmp_path).alive
