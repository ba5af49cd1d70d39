"""Preference tests without a model: a comparison, a folder that looks like a finished run, votes by a rule."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from loralab.judging.items import ItemSet, Origin, build_items, comparison_sha256
from loralab.judging.votes import Choice, Votes
from loralab.models.adapter_hash import WEIGHTS_FILE, adapter_sha256
from loralab.run import RunFolder, write_json

SEED = 20260117


def make_comparison(count: int, *, same: int = 0, digest: str | None = None) -> dict[str, Any]:
    """Return a comparison with `count` prompts, of which the first `same` have the same answer twice."""
    prompts = [
        {
            "source": "rows.json",
            "row": number + 1,
            "prompt": f"What is {number} + {number}?",
            "base_output": f"It is {2 * number}." if number < same else f"It makes {2 * number}.",
            "adapter_output": f"It is {2 * number}." if number < same else f"{2 * number}, of course.",
        }
        for number in range(count)
    ]
    return {"data": None, "split": "validation", "adapter_sha256": digest, "prompts": prompts}


def make_items(count: int, *, same: int = 0, seed: int = SEED, pictures: Path = Path("pictures")) -> ItemSet:
    """Return the items of such a comparison."""
    comparison = make_comparison(count, same=same)
    origin = Origin("a" * 64, comparison_sha256(comparison), pictures)
    return build_items(comparison, origin, examples=count, seed=seed)


def write_run(path: Path, count: int = 8, *, same: int = 0) -> RunFolder:
    """Write what `judge` needs of a finished and compared run."""
    folder = RunFolder(path)
    folder.adapter.mkdir(parents=True)
    save_file({"lora_A.weight": np.ones((2, 3), np.float32)}, folder.adapter / WEIGHTS_FILE)
    digest = adapter_sha256(folder.adapter)
    write_json(folder.record, {"status": "completed", "name": path.name, "adapter_sha256": digest})
    write_json(folder.comparison, make_comparison(count, same=same, digest=digest))
    return folder


def vote_all(items: ItemSet, rater: str, choose: Callable[[str, str], Choice], *, closed: bool = True) -> Votes:
    """Return a rater's votes on all pairs; `choose` takes the item and the adapter's side."""
    votes = Votes(rater, items.sha256, closed=closed)
    for item, side in items.adapter_sides(rater).items():
        votes.choices[item] = choose(item, side)
    return votes


def saved_page_votes(items: ItemSet, rater: str, *, count: int | None = None, closed: bool = True) -> dict[str, Any]:
    """Return what an offline page saves, with the adapter's answer preferred in the first `count` pairs."""
    sides = items.adapter_sides(rater)
    pairs = items.pairs_for(rater)[:count]
    acts = [
        {"item": pair.item, "choice": sides[pair.item], "seconds": 4.5, "at": "2026-11-27T10:00:00.000Z"}
        for pair in pairs
    ]
    return {"loralab_votes": 1, "items_sha256": items.sha256, "rater": rater, "acts": acts, "closed": closed}


def write_saved(path: Path, value: object) -> Path:
    """Write the file that a page saves."""
    path.write_text(json.dumps(value), encoding="utf-8")
    return path
