"""Gradients of a base in parts: their mean over the processes, whoever reached what."""

from pathlib import Path

from support.processes import run_program

_PROGRAM = """
import torch
from torch import nn
from loralab.training.distributed import joined
from loralab.training.sharding import average_gradients

with joined("cpu", "fsdp2") as processes:
    assert processes.lockstep
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("both", "first", "nobody")})
    model["both"].weight.grad = torch.full((2, 2), 1.0 + 2 * processes.rank)
    if processes.first:
        model["first"].weight.grad = torch.full((2, 2), 8.0)
    average_gradients(model, processes)
    found = {name: None if w.weight.grad is None else w.weight.grad.unique().tolist() for name, w in model.items()}
    print(found)
"""


def test_gradients_are_averaged(tmp_path: Path) -> None:
    answers = run_program(_PROGRAM, folder=tmp_path)
    assert [answer.code for answer in answers] == [0, 0], answers[0].err
    assert {answer.out.strip() for answer in answers} == {"{'both': [2.0], 'first': [4.0], 'nobody': None}"}
