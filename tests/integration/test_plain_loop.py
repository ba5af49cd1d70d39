"""The loss curve is the one of a plain transformers + peft loop on the same examples in the same order."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

import loralab
from loralab.training.sampler import StepSampler
from support import tiny

ROWS, BATCH, EPOCHS, RATE, SEED = 22, 4, 2, 1e-2, 7
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def plain_batch(tokenizer, rows):
    """Return padded ids, mask and labels, made the way most scripts make them."""
    pairs = []
    for row in rows:
        prompt = (WITH_INPUT if row["input"] else WITHOUT_INPUT).format(**row)
        prompt_ids = tokenizer(prompt)["input_ids"]
        answer_ids = [*tokenizer(row["output"])["input_ids"], tokenizer.eos_token_id]
        pairs.append((prompt_ids, answer_ids))
    longest = max(len(p) + len(a) for p, a in pairs)
    ids = torch.zeros((len(rows), longest), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (p, a) in enumerate(pairs):
        ids[i, : len(p) + len(a)] = torch.tensor(p + a)
        mask[i, : len(p) + len(a)] = 1
        labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
    return ids, mask, labels


def plain_losses(base, rows, targets):
    """Return the loss of every step of a plain loop."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(SEED)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out="gpt2" in base))
    model.eval()  # the base model's dropout is off, and the adapter has none
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    sampler = StepSampler(rows=len(rows), rows_per_step=BATCH, seed=SEED)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, EPOCHS * len(sampler))
    losses = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for indices in sampler:
            ids, mask, labels = plain_batch(tokenizer, [rows[i] for i in indices])
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("family", "targets"),
    [("gpt2", ["c_attn", "c_proj"]), ("llama", ["q_proj", "v_proj"]), ("qwen2", ["q_proj", "down_proj"])],
)
def test_loss_curve_equals_a_plain_loop(tmp_path: Path, family: tiny.Family, targets: list[str]) -> None:
    base = tiny.save_base(tmp_path / f"base-{family}", family)
    rows = tiny.alpaca_rows(ROWS)
    config = tiny.run_config(
        base,
        tiny.write_rows(tmp_path / "rows.json", rows),
        tmp_path / "run",
        lora={"target_modules": targets},
        training={"num_train_epochs": EPOCHS, "learning_rate": RATE, "seed": SEED},
    )
    run = loralab.train(config)
    ours = [line["loss"] for line in run.metrics]
    assert ours == pytest.approx(plain_losses(str(base), rows, targets), rel=1e-4)
    assert len(ours) == 12
    assert ours[-1] < ours[0]
    assert json.loads(run.folder.record.read_text())["steps"] == 12
