"""The loader of steps: how many processes decode, and what becomes of an error in one of them."""

import torch

from loralab.errors import DataError
from loralab.layout.planner import ShrinkingPlanner
from loralab.training.sampler import StepSampler
from loralab.training.step_loader import build_loader, resolve_decoders

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Refusing(ShrinkingPlanner):
    def __call__(self, examples):
        raise DataError("a picture changed", where="picture.png", fix="restore it")


def test_decoding_processes_follow_what_is_decoded_and_where() -> None:
    assert resolve_decoders("auto", decodes=False, device=CUDA).value == 0
    assert resolve_decoders(3, decodes=False, device=CUDA).value == 0
    assert resolve_decoders(3, decodes=True, device=CPU).value == 3
    assert resolve_decoders("auto", decodes=True, device=CPU).value == 0
    assert resolve_decoders("auto", decodes=True, device=CUDA).value >= 1


def test_an_error_in_another_process_arrives_as_it_was() -> None:
    sampler = StepSampler(rows=2, rows_per_step=1, seed=0)
    loader = build_loader([1, 2], sampler, Refusing(None), decoders=1)  # type: ignore[arg-type]
    (first, _) = list(loader)
    assert isinstance(first, DataError)
    assert str(first) == str(DataError("a picture changed", where="picture.png", fix="restore it"))
