"""Seconds of an epoch with and without the cache of the frozen layers, side by side in one process.

A model of GPT-2-small's shape with random weights, LoRA on its top layers, random rows of about one length. Epochs
with and without the cache take turns, in changing order, and the ratio of each pair is reported; so is what filling
the cache costs. Loss and gradients of both are compared first. Run it on an idle machine:

    python benchmarks/frozen_trunk.py [--precision bfloat16] [--rows 16] [--repeats 5] [--supervised 0.5]
        [--length 256] [--batch 4] [--adapted 4] [--layers 12]
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from loralab.config.schema import LoraConfig
from loralab.data.example import Branch, TokenizedExample
from loralab.layout.collate import StepBatch
from loralab.layout.planner import Planner
from loralab.models.adapters import build_adapter
from loralab.models.self_check import resolve_tree_kernel
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.trunk import CachedTrunk, FrozenTrunk, find_trunk
from loralab.models.trunk_store import TrunkStore
from loralab.training.loss import run_micro_batches
from loralab.workflows.trunk_check import keep_states, trunk_states

VOCABULARY = 50257


def build_model(*, layers: int, adapted: int, dtype: torch.dtype, device: torch.device) -> SupervisedPeftModel:
    """Return GPT-2 small's shape with LoRA on the linear layers of its top layers."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_layer=layers, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    base.requires_grad_(False).to(dtype)
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    names = [f"h.{layer}.{part}" for layer in range(layers - adapted, layers) for part in parts]
    model, _ = build_adapter(base, LoraConfig(r=16, alpha=32, target_modules=names), seed=0)
    with torch.no_grad():  # with B at zero half of all gradients are zero
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    model.to(device)
    model.tree_kernel = resolve_tree_kernel(model).value
    return model


def build_rows(*, count: int, length: int, supervised: float) -> list[TokenizedExample]:
    """Return random rows of 7/8 to 9/8 of a length, of which a share carries loss."""
    draw = np.random.default_rng(0)
    rows = []
    for place in range(count):
        ids = draw.integers(3, VOCABULARY, int(draw.integers(length * 7 // 8, length * 9 // 8))).astype(np.int32)
        border = max(1, round(len(ids) * (1 - supervised)))
        rows.append(TokenizedExample(place + 1, 0, (Branch(ids[:border], ids[border:]),)))
    return rows


def fill(model: SupervisedPeftModel, trunk: FrozenTrunk, steps: Sequence[StepBatch], folder: Path) -> CachedTrunk:
    """Run the frozen layers over all rows and keep what they give."""
    store: TrunkStore | None = None
    for step in steps:
        for batch in step.micro_batches:
            states = trunk_states(model, trunk, batch)
            store = store or TrunkStore(width=states.shape[-1], dtype=states.dtype, folder=folder)
            keep_states(store, batch, states)
    if store is None:
        raise SystemExit("no rows")
    store.commit()
    return CachedTrunk(trunk, store)


def train_epoch(model: SupervisedPeftModel, steps: Sequence[StepBatch], device: torch.device) -> tuple[float, float]:
    """Train one epoch; return its seconds, and those of all processor cores."""
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    _wait(device)
    started, processor = time.perf_counter(), time.process_time()
    for step in steps:
        count = step.supervised_tokens
        run_micro_batches(
            model, step.micro_batches, device=device, backward=lambda total, n=count: (total / n).backward()
        )
        optimizer.step()
        optimizer.zero_grad()
    _wait(device)
    return time.perf_counter() - started, time.process_time() - processor


def compare(model: SupervisedPeftModel, cached: CachedTrunk, step: StepBatch, device: torch.device) -> dict[str, float]:
    """Return how far loss and gradients of a step with and without the cache are apart, relatively."""
    found = []
    for trunk in (None, cached):
        model.cached_trunk = trunk
        model.zero_grad()
        result = run_micro_batches(model, step.micro_batches, device=device, backward=lambda loss: loss.backward())
        gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        found.append((float(result.total), gradients))
    model.zero_grad()
    (loss, own), (other_loss, others) = found
    errors = [float((others[name] - each).norm() / each.norm()) for name, each in own.items()]
    return {"loss": abs(other_loss - loss) / loss, "largest_gradient": max(errors), "gradients": len(errors)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Measure and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--adapted", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--supervised", type=float, default=0.5, help="share of a row's tokens that carry loss")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.precision)
    model = build_model(layers=options.layers, adapted=options.adapted, dtype=dtype, device=device)
    planner = Planner(token_budget=options.batch * options.length * 9 // 8)
    rows = build_rows(count=options.rows, length=options.length, supervised=options.supervised)
    steps = [planner(rows[start : start + options.batch]) for start in range(0, len(rows), options.batch)]
    trunk = find_trunk(model.body, layers=options.layers)
    model.train()
    with trunk.observing():
        run_micro_batches(model, steps[0].micro_batches, device=device)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        cached = fill(model, trunk, steps, Path(folder))
        filling = time.perf_counter() - started
        differences = compare(model, cached, steps[0], device)
        pairs = []
        for number in range(options.repeats):
            seconds = {}
            for with_cache in (False, True) if number % 2 else (True, False):
                model.cached_trunk = cached if with_cache else None
                seconds[with_cache] = train_epoch(model, steps, device)
            pairs.append(seconds)
    ratios, processor_ratios = ([pair[False][kind] / pair[True][kind] for pair in pairs] for kind in (0, 1))
    facts = {
        **vars(options),
        "threads": torch.get_num_threads(),
        "frozen_layers": trunk.first,
        "tokens": len(cached.store),
        "bytes": cached.store.bytes,
        "misses": cached.misses,
        "relative_differences": differences,
        "seconds_without": [round(pair[False][0], 3) for pair in pairs],
        "seconds_with": [round(pair[True][0], 3) for pair in pairs],
        "filling_to_epoch_without": round(filling / statistics.median(pair[False][0] for pair in pairs), 3),
        "speedups": [round(ratio, 3) for ratio in ratios],
        "median_speedup": round(statistics.median(ratios), 3),
        # On a machine with other work, this is the steadier one.
        "speedups_in_processor_time": [round(ratio, 3) for ratio in processor_ratios],
        "median_speedup_in_processor_time": round(statistics.median(processor_ratios), 3),
    }
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
