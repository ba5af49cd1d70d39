"""How fast this machine multiplies bfloat16 matrices: square ones, and those of a model's frozen linear layers.

The rate that a training step is held against. Run it alone, or let `throughput.py` do so between contenders:

    python benchmarks/matrix_rate.py --model FOLDER [--tokens 1024] [--threads 2] [--precision bfloat16]
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn import functional as F

SQUARE = 4096
# Names of the two-dimensional weights that are no frozen linear layer, and of those that lie as (in, out).
NOT_LINEAR = ("wte", "wpe", "embed", "lm_head")
TRANSPOSED = ("c_attn", "c_proj", "c_fc")


def linear_shapes(model: Path) -> Counter[tuple[int, int]]:
    """Return how many linear layers of each (in, out) a model has, without embedding and head."""
    shapes: Counter[tuple[int, int]] = Counter()
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                shape = file.get_slice(name).get_shape()
                if len(shape) == 2 and not any(part in name for part in NOT_LINEAR):
                    transposed = any(part in name for part in TRANSPOSED)
                    shapes[(shape[0], shape[1]) if transposed else (shape[1], shape[0])] += 1
    return shapes


def linear_parameters(model: Path) -> int:
    """Return the number of weights in a model's linear layers, without embedding and head."""
    return sum(size * wide * number for (size, wide), number in linear_shapes(model).items())


def best_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Return the least seconds of some calls, after one that is not timed."""
    work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def measure(model: Path, *, tokens: int, precision: str = "bfloat16", repeats: int = 5) -> dict[str, Any]:
    """Return rates in GFLOP/s.

    Args:
        model: folder with the weights, of which only names and shapes are read.
        tokens: rows of the input of each layer (N).
        precision: of the model's own shapes; the square product is in bfloat16.
        repeats: timed calls of each product, the best of which counts.

    Returns:
        `square`, `forward` (x W^T), `backward` (g W), and `model`: both together, each layer as often as it is there.
    """
    dtype = getattr(torch, precision)
    square = torch.randn(SQUARE, SQUARE, dtype=torch.bfloat16)
    rates = {"square": 2 * SQUARE**3 / best_seconds(lambda: F.linear(square, square), min(repeats, 3)) / 1e9}
    flops, seconds = 0.0, {"forward": 0.0, "backward": 0.0}
    for (size, wide), number in linear_shapes(model).items():
        weight = torch.randn(wide, size, dtype=dtype)
        given, gradient = torch.randn(tokens, size, dtype=dtype), torch.randn(tokens, wide, dtype=dtype)
        flops += number * 2.0 * tokens * size * wide
        forward = best_seconds(lambda x=given, w=weight: F.linear(x, w), repeats)
        backward = best_seconds(lambda g=gradient, w=weight: F.linear(g, w.t()), repeats)
        seconds["forward"] += number * forward
        seconds["backward"] += number * backward
    rates |= {name: flops / spent / 1e9 for name, spent in seconds.items()}
    rates["model"] = 2 * flops / sum(seconds.values()) / 1e9
    return {name: round(rate, 1) for name, rate in rates.items()}


def main() -> None:
    """Measure and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = measure(arguments.model, tokens=arguments.tokens, precision=arguments.precision, repeats=arguments.repeats)
    print(json.dumps(found | {"tokens": arguments.tokens, "threads": arguments.threads}))


if __name__ == "__main__":
    main()
