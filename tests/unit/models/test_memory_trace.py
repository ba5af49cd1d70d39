"""Counting tensors on the meta device: the same that are made where numbers are."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from loralab.models.memory_trace import META, WithoutNumbers, trace_memory


def peak_on_cpu(run: object) -> int:
    """Return what torch's allocator handed out at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        run()  # type: ignore[operator]
    assert measured.profiler is not None
    found = [event for event in measured.profiler.kineto_results.events() if event.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(found, key=lambda e: e.start_ns())]).max(initial=0))


def test_known_sizes() -> None:
    weight = nn.Linear(4, 4, device="meta")

    def run() -> None:
        first = torch.ones(100, device=META)
        second = first + 1
        del first
        third = second.view(10, 10) * 2  # a view is no tensor of its own
        del second, third

    trace = trace_memory(weight, run)
    assert trace.peak_bytes == 800
    assert [size for _, size in trace.events] == [400, 400, -1, 400, -1, -1]


def test_weights_count_for_nothing() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(META)
    trace = trace_memory(model, lambda: [p.detach() for p in model.parameters()])
    assert trace.peak_bytes == 0


def test_training_takes_what_it_takes_with_numbers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 64))
    blank = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 64)).to(META)

    def step(network: nn.Module, device: torch.device) -> None:
        network.zero_grad()
        network(torch.ones(512, 64, device=device)).square().sum().backward()

    step(model, torch.device("cpu"))
    measured = peak_on_cpu(lambda: step(model, torch.device("cpu")))
    counted = trace_memory(blank, lambda: step(blank, META)).peak_bytes
    assert abs(counted - measured) < 0.05 * measured


def test_attention_keeps_no_scores() -> None:
    """The kernel that the meta device would take by itself keeps a square for each head."""
    query = torch.empty(1, 8, 512, 16, device=META, requires_grad=True)
    key = torch.empty(1, 2, 512, 16, device=META, requires_grad=True)

    def run() -> None:
        out = functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
        out.sum().backward()

    assert trace_memory(nn.Identity(), run).peak_bytes < 8 * 512 * 512


def test_numbers_are_answered_for() -> None:
    nothing = torch.ones(3, device=META)
    with WithoutNumbers():
        assert not nothing.all()
        assert float(nothing.sum()) == 0.0
        assert nothing.max().item() == 0.0
        assert bool(torch.ones(1).all())  # where there are numbers, they count
