"""Which rows of a split begin alike, so that a step can hold them together.

Owns the grouping behind `training.sampling: grouped`. It decides on company, never on the maths
of a step.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np

from loralab.data.example import Branch, TokenIds, TokenizedExample
from loralab.layout.paths import Int64Array, token_keys

Keys: TypeAlias = TokenIds | Int64Array

# A shorter common beginning is a template's preamble, not a document.
MIN_SHARED_TOKENS = 32


def find_prefix_groups(examples: Iterable[TokenizedExample], *, largest: int) -> list[list[int]]:
    """Return the rows of a split in groups that share a long prefix.

    Rows are put in the order of their prompts. A group is cut where neighbours share less than 32
    tokens; one that is larger than a step, where its neighbours share least: so a preamble that
    all rows have does not hide the documents behind it.

    Args:
        examples: the split, in its order.
        largest: rows of a step; a group may be larger only where all its neighbours share alike.

    Returns:
        Positions in the split; each in exactly one group, groups and positions in a fixed order.
    """
    branches = [example.branches[0] for example in examples]
    prompts = [_prompt_keys(branch) for branch in branches]
    order = sorted(range(len(prompts)), key=lambda index: prompts[index].astype(">u8").tobytes())
    shared = [_link(branches[a], prompts[a], prompts[b]) for a, b in itertools.pairwise(order)]
    groups: list[list[int]] = []
    pending = [(0, len(order))]
    while pending:
        start, end = pending.pop()
        links = shared[start : end - 1]
        limit = _cut_below(links, too_large=end - start > largest)
        if limit is None:
            groups.append(order[start:end])
            continue
        cuts = [start + place + 1 for place, link in enumerate(links) if link < limit]
        pending += reversed(list(itertools.pairwise([start, *cuts, end])))
    return groups


def _cut_below(links: Sequence[int], *, too_large: bool) -> int | None:
    """Return the length below which links between neighbours are cut, or None to leave the group whole."""
    if not links:
        return None
    if min(links) < MIN_SHARED_TOKENS:
        return MIN_SHARED_TOKENS
    return min(links) + 1 if too_large and min(links) < max(links) else None


def _prompt_keys(branch: Branch) -> Keys:
    # Of text, the stored ids themselves: all prompts of a split may be long together.
    return token_keys(branch.prompt_ids.astype(np.int64), branch.images) if branch.images else branch.prompt_ids


def _link(branch: Branch, first: Keys, second: Keys) -> int:
    """Return the common beginning of two prompts; a picture in it counts as a document, however few its tokens are."""
    common = _common(first, second)
    shows = bool(branch.images) and common >= branch.images[0].end
    return max(common, MIN_SHARED_TOKENS) if shows else common


def _common(first: Keys, second: Keys) -> int:
    length = min(len(first), len(second))
    differing = np.flatnonzero(first[:length] != second[:length])
    return int(differing[0]) if len(differing) else length


def groups_per_step(groups: Sequence[Sequence[int]], steps: Iterable[Sequence[int]]) -> float:
    """Return how many distinct groups a step holds on average.

    Args:
        groups: as returned by `find_prefix_groups`.
        steps: the rows of each step.
    """
    owner = {index: number for number, group in enumerate(groups) for index in group}
    counts = [len({owner[index] for index in step}) for step in steps]
    return float(np.mean(counts)) if counts else 0.0
