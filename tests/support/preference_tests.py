"""Preference tests without a model: a comparison, a folder that looks like a finished run, votes by a rule."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from loralab.evaluation.preference import Vote
from loralab.judging.items import ItemSet, Origin, build_items, comparison_sha256
from loralab.judging.votes import Act, Choice, Votes
from loralab.models.adapter_hash import WEIGHTS_FILE, adapter_sha256
from loralab.run import RunFolder, write_json

SEED = 20260117
AT = "2026-11-27T10:00:00.000Z"


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


def cast(items: ItemSet, rater: str, choices: Mapping[str, Choice], *, closed: bool = True) -> Votes:
    """Return a rater's votes, by item."""
    votes = Votes(rater, items.sha256)
    for item, choice in choices.items():
        votes.take(Act(item, choice, None, AT))
    votes.closed = closed
    return votes


def cast_wishes(items: ItemSet, rater: str, wishes: Sequence[Vote]) -> Votes:
    """Return the votes of a rater who wants these verdicts, in the order of the items that are shown."""
    sides = items.adapter_sides(rater)
    choices: dict[str, Choice] = {}
    for item, wish in zip(items.shown, wishes, strict=False):
        side = sides[item.item]
        other: Choice = "right" if side == "left" else "left"
        meant: dict[Vote, Choice] = {"adapter": side, "base": other, "tie": "tie", "both_bad": "both_bad"}
        choices[item.item] = meant[wish]
    return cast(items, rater, choices)


def saved_page_votes(items: ItemSet, rater: str, *, count: int | None = None, closed: bool = True) -> dict[str, Any]:
    """Return what an offline page saves, with the adapter's answer preferred in the first `count` pairs."""
    sides = items.adapter_sides(rater)
    pairs = items.pairs_for(rater)[:count]
    acts = [{"item": pair.item, "choice": sides[pair.item], "seconds": 4.5, "at": AT} for pair in pairs]
    return {"loralab_votes": 1, "items_sha256": items.sha256, "rater": rater, "acts": acts, "closed": closed}


def write_saved(path: Path, value: object) -> Path:
    """Write the file that a page saves."""
    path.write_text(json.dumps(value), encoding="utf-8")
    return path
