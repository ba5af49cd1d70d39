"""Builds (or checks) the base model of ``loralab demo --vision`` and its pictures and questions.

Usage, from the repository root::

    python scripts/build_vision_base.py             # base, pictures and rows; see SOURCE.md for the time
    python scripts/build_vision_base.py --rows      # pictures and rows alone, seconds
    python scripts/build_vision_base.py --check     # seconds: checksums, text, tokenizer, rows

The script draws all pictures and writes all prose itself (``vision_world.py``, ``vision_prose.py``),
trains a tokenizer and a small Qwen2-VL on them from random weights and writes
``src/loralab/demo/vision``.  The base never sees a question; the rows (``vision_rows.py``) ask some.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open

from vision_base import new_model, new_tokenizer, write_base
from vision_pretrain import Plan, captions, pretrain, pretraining_digest, probe
from vision_rows import write_rows

DEMO = Path(__file__).resolve().parents[1] / "src" / "loralab" / "demo" / "vision"
TEXT_SEED, ROW_SEED, MODEL_SEED, PROBE_SEED = 101, 211, 307, 401
# One thread: layers this small gain little from a second, and lose much when the machine is shared.
THREADS = 1
MAX_WEIGHT_BYTES = 4_000_000
DIGEST_KEY = "pretraining_start_sha256"


def build(folder: Path, seed: int, scratch: Path | None) -> None:
    """Trains the base and writes it into a folder.

    Args:
        folder: The base's folder.
        seed: Added to the seeds of weights and pictures.
        scratch: Folder for checkpoints, from which an interrupted run goes on; None leaves the weights random.
    """
    torch.set_num_threads(THREADS)
    begun = time.monotonic()
    tokenizer = new_tokenizer(TEXT_SEED)
    model = new_model(tokenizer, MODEL_SEED + seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    plan = Plan(TEXT_SEED + seed, PROBE_SEED)
    if scratch:
        pretrain(model, tokenizer, plan, scratch)
    digest = pretraining_digest(tokenizer, plan)
    write_base(folder, model, tokenizer, {DIGEST_KEY: digest, "seed": str(seed)})
    size = (folder / "model.safetensors").stat().st_size
    print(f"weights {size:,} bytes, {time.monotonic() - begun:.0f} s in all")
    if size > MAX_WEIGHT_BYTES:
        raise SystemExit(f"the weights take {size:,} bytes, more than {MAX_WEIGHT_BYTES:,}")
    if scratch:
        for kind, (right, asked) in sorted(probe(model, tokenizer, PROBE_SEED + 1, 2000).items()):
            print(f"probe {kind}: {right}/{asked} = {right / asked:.1%}")
        for true, said in captions(model, tokenizer, PROBE_SEED + 2, 10):
            print(f"true: {true}\nsaid: {said}")


def _other_rows(made: Path) -> list[str]:
    """Names of rows' files and pictures that differ from those made afresh."""
    names = [p.relative_to(made) for p in sorted(made.rglob("*")) if p.suffix in {".jsonl", ".png"}]
    others = []
    for name in names:
        old, new = DEMO / name, made / name
        if not old.is_file():
            others.append(str(name))
        elif name.suffix == ".png":
            # How well a picture is packed depends on the library's version; its pixels do not.
            others += [str(name)] if Image.open(old).convert("RGB") != Image.open(new).convert("RGB") else []
        elif old.read_bytes() != new.read_bytes():
            others.append(str(name))
    return others


def check() -> list[str]:
    """Compares the shipped files with their checksums and with freshly made text and rows.

    Returns:
        One line for each difference; empty when all is as it should be.
    """
    base, problems = DEMO / "base", []
    lines = (base / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    present = {p.name for p in base.iterdir()} - {"SHA256SUMS"}
    problems += [f"{name}: only listed or only present" for name in sorted(present ^ set(sums))]
    for name in sorted(present & set(sums)):
        if hashlib.sha256((base / name).read_bytes()).hexdigest() != sums[name]:
            problems.append(f"{name}: its bytes do not match SHA256SUMS")
    tokenizer = new_tokenizer(TEXT_SEED)
    with safe_open(base / "model.safetensors", "pt") as stored:
        notes = stored.metadata()
    plan = Plan(TEXT_SEED + int(notes["seed"]), PROBE_SEED)
    if notes[DIGEST_KEY] != pretraining_digest(tokenizer, plan):
        problems.append("the pictures and prose are not those that the model was trained on")
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        if (Path(scratch) / "tokenizer.json").read_bytes() != (base / "tokenizer.json").read_bytes():
            problems.append("tokenizer.json: training it again gives other bytes")
        write_rows(Path(scratch), ROW_SEED)
        problems += [f"{name}: making it again gives something else" for name in _other_rows(Path(scratch))]
    return problems


def main() -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(description="Build or check the files of loralab demo --vision.")
    parser.add_argument("--check", action="store_true", help="verify instead of building")
    parser.add_argument("--rows", action="store_true", help="only draw the pictures and write the rows")
    parser.add_argument("--out", type=Path, default=DEMO / "base", help="folder of the base")
    parser.add_argument("--untrained", action="store_true", help="write a base with random weights")
    parser.add_argument("--seed", type=int, default=0, help="added to the seeds of weights and pictures")
    parser.add_argument("--scratch", type=Path, help="folder that keeps checkpoints; a temporary one by default")
    options = parser.parse_args()
    if options.check:
        problems = check()
        for problem in problems:
            print(problem, file=sys.stderr)
        print("vision demo files differ" if problems else "vision demo files are as generated")
        return 1 if problems else 0
    if options.rows:
        write_rows(DEMO, ROW_SEED)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        build(options.out, options.seed, None if options.untrained else options.scratch or Path(temporary))
    if options.out == DEMO / "base":
        write_rows(DEMO, ROW_SEED)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
