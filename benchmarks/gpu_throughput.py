"""Tokens per second and peak memory on a GPU: loralab, a plain transformers + peft loop, TRL's SFTTrainer.

Models have real shapes and random weights, rows have realistic lengths and begin with the same preamble, which loralab
lays out once. One contender after the other has the device for itself: a first epoch that compiles, then timed ones,
of the same rows in the same order (but for `trl_by_length`). The plain loop pads each batch and computes all logits, as
a short script does. TRL runs under its own defaults (`trl`) and without recomputation, with Liger's kernels where they
are installed (`trl_by_length`: rows by length, which 50 batches and more make use of; these kernels change
transformers' modules, so it comes last). Neither its packing nor bfloat16 without autocast is tried. Time is that of
the steps alone, from the end of the first one of an epoch to the end of the last. Run it on an idle machine:

    python benchmarks/gpu_throughput.py --shape qwen2.5-0.5b --batch 32
    python benchmarks/gpu_throughput.py --shape llama3-8b --quantization nf4 --batch 16 [--checkpointing]
"""

import argparse
import gc
import json
import statistics
import time

import torch

from gpu_contenders import CONTENDERS, Case, SFTTrainer, Timed
from gpu_shapes import SHAPES, draw_rows
from loralab.models.determinism import restored_algorithms


def measure(case: Case, name: str) -> Timed:
    """Measure one contender; of one that runs out of memory nothing is known but that."""
    timed = Timed()
    started = time.perf_counter()
    try:
        CONTENDERS[name](case, timed)
    except torch.OutOfMemoryError:
        timed.facts["out_of_memory"] = True
    whole = time.perf_counter() - started
    timed.other_seconds = whole - sum(case.tokens / rate for rate in timed.rates)
    return timed


def main() -> None:
    """Measure one case and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=SHAPES)
    parser.add_argument("--quantization", default="none", choices=("none", "nf4"))
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS))
    parser.add_argument("--layout", default="shared", choices=("shared", "packed", "padded"))
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32, help="rows of an optimizer step")
    parser.add_argument("--budget", type=int, default=16384, help="most tokens of a micro-batch of loralab's")
    parser.add_argument("--prompt", type=int, default=30)
    parser.add_argument("--answer", type=int, default=45)
    parser.add_argument("--preamble", type=int, default=35)
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--deterministic", action="store_true", help="as a run does")
    arguments = parser.parse_args()
    rows = draw_rows(
        arguments.rows,
        vocabulary=SHAPES[arguments.shape].vocab_size,
        prompt=arguments.prompt,
        answer=arguments.answer,
        longest=arguments.longest,
        preamble=arguments.preamble,
    )
    batches = [rows[s : s + arguments.batch] for s in range(0, len(rows) - arguments.batch + 1, arguments.batch)]
    if len(batches) < 2:
        parser.error(f"--rows {arguments.rows} are fewer than two steps of --batch {arguments.batch}: nothing to time")
    case = Case(arguments, torch.device(arguments.device), batches)
    asked = arguments.contenders or [name for name in CONTENDERS if SFTTrainer or "trl" not in name]
    names = [name for name in CONTENDERS if name in asked]  # in their order: the last one changes transformers
    found: dict[str, Timed] = {}
    for name in names:
        with restored_algorithms():
            found[name] = measure(case, name)
        gc.collect()
        if case.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name}: {json.dumps(found[name].shown())}", flush=True)
        counted = found[name].facts.get("supervised")
        if counted not in (None, case.supervised):
            print(f"{name} trains on {counted} tokens an epoch, the rows have {case.supervised} that carry loss")
    ours = found.get("loralab")
    ratios = {}
    if ours and ours.rates:
        mine = statistics.median(ours.rates)
        ratios = {
            name: round(mine / statistics.median(timed.rates), 2)
            for name, timed in found.items()
            if name != "loralab" and timed.rates
        }
    shown = {k: v for k, v in vars(arguments).items() if v != parser.get_default(k)}
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "CPU"
    document = {"case": shown, "device": device, "torch": torch.__version__, "ratios": ratios}
    document |= {"steps": len(batches), "tokens_per_epoch": case.tokens}
    print(json.dumps(document | {"contenders": {name: timed.shown() for name, timed in found.items()}}))


if __name__ == "__main__":
    main()
