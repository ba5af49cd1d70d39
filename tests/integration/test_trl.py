"""The loss curve and the adapter are those of TRL's `SFTTrainer` on the same rows in the same order.

TRL gets the text of the rows and makes tokens, masks, batches, loss and steps itself; only the order of the rows is
given to it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import loralab
from loralab.training.sampler import StepSampler
from support import tiny

SEED, STEPS, BATCH = 7, 50, 4
# What both call by the same name.
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 5,
    "weight_decay": 0.1,
    "max_grad_norm": 0.9,
    "optim": "adamw_torch",
}
TARGETS = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "v_proj", "down_proj"]}
# (rows, epochs, K), each 50 steps: two shuffled epochs; one epoch with accumulation, whose last step is short.
PLANS = {"B4": (100, 2, 1), "B4xK2": (398, 1, 2)}


def trl_arguments(folder: Path, *, accumulation: int) -> SFTConfig:
    """Return loralab's settings in TRL's words."""
    return SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,  # TRL's default is on
        activation_checkpointing=False,  # TRL's default is on: the same gradients, later
        completion_only_loss=True,
        train_sampling_strategy="sequential",  # the rows come in loralab's order, all epochs in one
        num_train_epochs=1,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **SETTINGS,
    )


def train_with_trl(base: Path, rows: list[dict[str, str]], *, targets: list[str], arguments: SFTConfig) -> SFTTrainer:
    """Train with TRL on `rows` as they come and return its trainer."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # loralab's default: none in the frozen base
            module.p = 0.0
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets,
        fan_in_fan_out=model.config.model_type == "gpt2",
        task_type=TaskType.CAUSAL_LM,
    )
    torch.manual_seed(SEED)  # the same first weights
    trainer = SFTTrainer(
        model=get_peft_model(model, lora),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.train()
    return trainer


def rows_in_loralabs_order(rows: list[dict[str, str]], *, epochs: int, rows_per_step: int) -> list[dict[str, str]]:
    """Return the rows of all epochs in the order in which loralab takes them."""
    sampler = StepSampler(rows=len(rows), rows_per_step=rows_per_step, seed=SEED)
    ordered = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        ordered += [rows[index] for indices in sampler for index in indices]
    return ordered


def largest_relative_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return the largest ||a - b|| / ||b|| over the adapter's tensors."""
    assert ours.keys() == theirs.keys()
    assert all(float(tensor.norm()) > 0 for tensor in theirs.values())
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", TARGETS)
def test_curve_and_adapter_equal_trl(tmp_path: Path, family: tiny.Family, plan: str) -> None:
    count, epochs, accumulation = PLANS[plan]
    base = tiny.save_base(tmp_path / "base", family)
    # TRL makes tokens of prompt and answer as one text, so a prompt must end where a token ends: one line break.
    rows = [{"prompt": row["instruction"] + "\n", "completion": row["output"]} for row in tiny.alpaca_rows(count)]
    config = tiny.run_config(
        base,
        tiny.write_rows(tmp_path / "rows.json", rows),
        tmp_path / "run",
        lora={"target_modules": TARGETS[family]},
        training={"num_train_epochs": epochs, "gradient_accumulation_steps": accumulation, "seed": SEED, **SETTINGS},
    )
    run = loralab.train(config)
    ordered = rows_in_loralabs_order(rows, epochs=epochs, rows_per_step=BATCH * accumulation)
    arguments = trl_arguments(tmp_path / "trl", accumulation=accumulation)
    trainer = train_with_trl(base, ordered, targets=TARGETS[family], arguments=arguments)

    theirs = [line for line in trainer.state.log_history if "loss" in line]
    assert len(theirs) == STEPS
    for name, tolerance in {"loss": 1e-4, "grad_norm": 1e-3, "learning_rate": 1e-9}.items():
        values = [line[name] for line in run.metrics]
        assert values == pytest.approx([line[name] for line in theirs], rel=tolerance, abs=0), name
    norms = [line["grad_norm"] for line in theirs]
    assert min(norms) < SETTINGS["max_grad_norm"] < max(norms)  # some steps are clipped, some are not
    assert theirs[-1]["loss"] < 0.95 * theirs[0]["loss"]
    ours = load_file(run.adapter() / "adapter_model.safetensors")
    assert largest_relative_difference(ours, get_peft_model_state_dict(trainer.model)) < 1e-3
