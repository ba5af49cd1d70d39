"""What each process holds under DeepSpeed's ZeRO; where deepspeed is installed."""

import importlib.util
from pathlib import Path

import pytest

from support.processes import run_program

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the extra deepspeed is not installed"
)

_SETUP = """
import sys
import torch
from peft import LoraConfig
from loralab.errors import WorkerError
from loralab.models.supervised import SupervisedPeftModel
from loralab.training.distributed import joined
from loralab.training.sharding import average_gradients, place_model
from loralab.training.zero import MomentsInParts
sys.path.insert(0, {tests!r})
from support import tiny

def build():
    base = tiny.build_model(vocabulary=64)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return SupervisedPeftModel(base, config)

def sweep(model, rank):
    ids = (torch.arange(12)[None] * 7 + rank) % 64
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits.float().log_softmax(-1)[..., 3].sum()
"""

_LAYERS = """
with joined("cpu", "zero3") as processes:
    model, whole = build(), build()
    whole.load_state_dict(model.state_dict())
    layers = [name for name, _ in model.named_parameters() if ".layers." in name]
    place_model(model, torch.device("cpu"), "zero3", processes=processes)
    found, expected = dict(model.named_parameters()), dict(whole.named_parameters())
    for name in layers:
        weight = expected[name]
        if weight.dim() == 2 and not weight.requires_grad:
            assert found[name].numel() == 0 and found[name].ds_tensor.numel() == weight.numel() // 2, name
    optimizers = [torch.optim.SGD([w for w in m.parameters() if w.requires_grad], lr=0.01) for m in (model, whole)]
    for _ in range(4):
        model.zero_grad(), whole.zero_grad()
        sweep(model, processes.rank).backward()
        sweep(whole, processes.rank).backward()
        average_gradients(model, processes), average_gradients(whole, processes)
        [optimizer.step() for optimizer in optimizers]
        with torch.no_grad():  # forwards without a sweep back between: an order that DeepSpeed does not expect
            assert torch.allclose(sweep(model, 0), sweep(whole, 0))
    for name, weight in expected.items():
        if weight.requires_grad:
            assert torch.allclose(found[name], weight, rtol=1e-5), name
    # What would be lost must be noticed.
    next(w for w in model.parameters() if w.requires_grad).ds_active_sub_modules.clear()
    try:
        sweep(model, 0)
    except WorkerError as error:
        assert "let go of trained weights" in str(error)
    else:
        raise AssertionError("not noticed")
"""

_MOMENTS = """
with joined("cpu", "zero2") as processes:
    model, whole = build(), build()
    whole.load_state_dict(model.state_dict())
    place_model(model, torch.device("cpu"), "zero2", processes=processes)
    trained, others = ([w for w in m.parameters() if w.requires_grad] for m in (model, whole))
    make = lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1)
    parts = MomentsInParts(make(trained), max_norm=0.5, processes=processes, device=torch.device("cpu"))
    plain = make(others)
    for number in range(3):
        for micro in range(2):
            parts.backward(sweep(model, processes.rank + 2 * micro), last=micro == 1)
            sweep(whole, processes.rank + 2 * micro).backward()
        average_gradients(whole, processes)
        if number == 0:
            parts.show_gradients()
            for weight, other in zip(trained, others, strict=True):
                assert torch.allclose(weight.grad, other.grad, rtol=1e-4, atol=1e-6)
        norm = torch.nn.utils.clip_grad_norm_(others, 0.5)
        parts.step(), plain.step(), plain.zero_grad()
        assert torch.allclose(parts.norm, norm, rtol=1e-4)
        for weight, other in zip(trained, others, strict=True):
            assert weight.grad is None and torch.allclose(weight, other, rtol=1e-4, atol=1e-7)
    parts.gather()
    state = parts.state_dict()["parts"]
    assert len(state) == (2 if processes.first else 0)
    sizes = [sum(held["exp_avg"].numel() for held in part["state"].values()) for part in state]
    numbers = sum(weight.numel() for weight in trained)
    assert all(numbers // 2 <= size <= numbers // 2 + 8 for size in sizes), (sizes, numbers)
"""


@needs_deepspeed
@pytest.mark.parametrize("program", [_LAYERS, _MOMENTS], ids=["zero3", "zero2"])
def test_each_process_holds_its_part(program: str, tmp_path: Path) -> None:
    tests = str(Path(__file__).parents[2])
    answers = run_program(_SETUP.format(tests=tests) + program, folder=tmp_path)
    assert [answer.code for answer in answers] == [0, 0], answers[0].err
