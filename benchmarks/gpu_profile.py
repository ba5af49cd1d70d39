"""Where the time of loralab's steps goes on a GPU: kernels, idle share, launches and waits of the host.

Steps are those of `gpu_throughput.py`, after a few that compile; with gradient clipping, as a run does. Run it on an
idle machine:

    python benchmarks/gpu_profile.py --shape qwen2.5-0.5b --batch 32
    python benchmarks/gpu_profile.py --shape llama3-8b --quantization nf4 --batch 16
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu_contenders import adamw, finish_step
from gpu_shapes import SHAPES, build_ours, draw_rows
from loralab.layout.planner import Planner
from loralab.models.determinism import resolve_determinism, restored_algorithms
from loralab.training.loss import run_micro_batches

STEPS = 3
# What makes the host wait for the device, and what copies between the two.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")
COPIES = ("Memcpy DtoH", "Memcpy HtoD")


def busy_microseconds(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def summarize(events: Sequence[Any], wall: float) -> dict[str, Any]:
    """Return per step: launches, waits and copies; over all: the share of the wall time without a kernel."""
    on_device = [event for event in events if event.device_type == DeviceType.CUDA]
    counts = Counter(event.name for event in events if event.device_type != DeviceType.CUDA)
    launches = sum(number for name, number in counts.items() if "LaunchKernel" in name)
    copies = Counter(name for event in on_device for name in COPIES if event.name.startswith(name))
    busy = busy_microseconds((event.time_range.start, event.time_range.end) for event in on_device)
    return {
        "wall_ms_per_step": round(wall * 1000 / STEPS, 1),
        "device_busy_ms_per_step": round(busy / 1000 / STEPS, 1),
        "idle_share": round(1 - busy / 1e6 / wall, 3),
        "launches_per_step": round(launches / STEPS),
        "waits_per_step": {name: round(counts[name] / STEPS, 1) for name in WAITS if counts[name]},
        "copies_per_step": {name: round(number / STEPS, 1) for name, number in copies.items()},
    }


def top_kernels(events: Sequence[Any], count: int) -> list[str]:
    """Return the kernels that take most time, summed by name."""
    times: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for event in events:
        if event.device_type == DeviceType.CUDA:
            times[event.name] += event.time_range.end - event.time_range.start
            numbers[event.name] += 1
    whole = sum(times.values()) or 1
    return [
        f"{time / 1000 / STEPS:8.2f} ms {time / whole:6.1%} {numbers[name] / STEPS:7.0f}x  {name[:110]}"
        for name, time in times.most_common(count)
    ]


def build_step(arguments: argparse.Namespace, device: torch.device) -> Callable[[int], float]:
    """Return what runs the step of a number."""
    model = build_ours(
        arguments.shape,
        quantization=arguments.quantization,
        dtype=torch.bfloat16,
        device=device,
        checkpointing=arguments.checkpointing,
        dropout=arguments.dropout,
    )
    if arguments.deterministic:
        resolve_determinism(model, device)
    rows = draw_rows(
        arguments.batch * 8,
        vocabulary=SHAPES[arguments.shape].vocab_size,
        prompt=30,
        answer=45,
        longest=1024,
        preamble=35,
    )
    planner = Planner(16384, layout=arguments.layout)
    optimizer = adamw(model)

    def step(number: int) -> float:
        first = number % 8 * arguments.batch
        batch = planner(rows[first : first + arguments.batch])
        count = batch.supervised_tokens
        result = run_micro_batches(
            model,
            batch.micro_batches,
            device=device,
            backward=lambda loss: (loss / count).backward(),
            dropout_key=(0, number),
        )
        loss = float(result.total) / count
        finish_step(optimizer)
        return loss

    return step


def main() -> None:
    """Profile one case and print what it shows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=SHAPES)
    parser.add_argument("--quantization", default="none", choices=("none", "nf4"))
    parser.add_argument("--layout", default="shared", choices=("shared", "packed", "padded"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--deterministic", action="store_true", help="as a run does")
    parser.add_argument("--top", type=int, default=25)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    with restored_algorithms():
        step = build_step(arguments, device)
        losses = [step(number) for number in range(8)]
        if cuda:
            torch.cuda.synchronize()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        started = time.perf_counter()
        for number in range(STEPS):
            step(number)
        if cuda:
            torch.cuda.synchronize()
        plain = time.perf_counter() - started
        with profile(activities=activities) as profiler:
            started = time.perf_counter()
            losses += [step(number) for number in range(STEPS)]
            if cuda:
                torch.cuda.synchronize()
            wall = time.perf_counter() - started
    events = list(profiler.events() or [])  # once: it takes long
    shown = {name: value for name, value in vars(arguments).items() if value != parser.get_default(name)}
    facts = {"case": shown, "wall_ms_unprofiled": round(plain * 1000 / STEPS, 1), **summarize(events, wall)}
    # What the device was idle for, by the time without a profiler, which slows the host.
    facts["idle_share_unprofiled"] = round(1 - facts["device_busy_ms_per_step"] / facts["wall_ms_unprofiled"], 3)
    print(json.dumps(facts))
    print("--- kernels, per step")
    print("\n".join(top_kernels(events, arguments.top)))


if __name__ == "__main__":
    main()
