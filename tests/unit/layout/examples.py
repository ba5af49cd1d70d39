"""Tokenized examples by hand, and hypothesis strategies for them and for how they are laid out."""

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from loralab.data.example import Branch, TokenizedExample
from loralab.layout.planner import Layout, Planner, SharingCost
from loralab.layout.tree import Tree, build_leaves, shared_length

Pair = tuple[Sequence[int], Sequence[int]]


def branch(prompt: Sequence[int], answer: Sequence[int]) -> Branch:
    return Branch(np.asarray(prompt, dtype=np.int32), np.asarray(answer, dtype=np.int32))


def example(*pairs: Pair, row: int = 1, source: int = 0) -> TokenizedExample:
    return TokenizedExample(row, source, tuple(branch(*pair) for pair in pairs))


def predictions(pairs: Sequence[Pair]) -> list[tuple[tuple[int, ...], int]]:
    """Return what the examples ask of a model: (all tokens before, token to predict), by a naive loop."""
    found = []
    for prompt, answer in pairs:
        whole = [*prompt, *answer]
        found += [(tuple(whole[:i]), whole[i]) for i in range(max(len(prompt), 1), len(whole))]
    return found


def pairs_of(tokenized: TokenizedExample) -> list[Pair]:
    return [(b.prompt_ids.tolist(), b.answer_ids.tolist()) for b in tokenized.branches]


_IDS = st.lists(st.integers(0, 3), min_size=1, max_size=4)


@st.composite
def forests(draw: st.DrawFn, most: int = 7) -> list[TokenizedExample]:
    """Examples that meet at any depth: each branch may go on from any place of any branch before it.

    Identical branches, branches that begin another, one-token answers and empty prompts come up
    by themselves.
    """
    paths: list[list[int]] = [[]]
    examples = []
    for _ in range(draw(st.integers(1, most))):
        pairs: list[Pair] = []
        for _ in range(draw(st.integers(1, 3))):
            known = draw(st.sampled_from(paths))
            whole = known[: draw(st.integers(0, len(known)))] + draw(st.lists(st.integers(0, 3), max_size=4))
            # What an empty prompt leaves to predict begins at the answer's second token.
            whole += draw(st.lists(st.integers(0, 3), min_size=max(2 - len(whole), 0), max_size=3))
            border = draw(st.integers(0, len(whole) - 1))
            pairs.append((whole[:border], whole[border:]))
            paths.append(whole)
        row, source = draw(st.integers(1, 99)), draw(st.integers(0, 2))
        examples.append(example(*pairs, row=row, source=source))
    return examples


@st.composite
def planners(draw: st.DrawFn, layouts: Sequence[Layout] = ("shared", "packed", "padded")) -> Planner:
    """A planner of any layout, budget and cost."""
    return Planner(
        token_budget=draw(st.integers(1, 60)),
        layout=draw(st.sampled_from(layouts)),
        cost=draw(st.builds(SharingCost, tokens_per_pair=st.sampled_from([0.0, 0.01, 0.5]), min_tokens=st.just(1))),
        position_threshold=draw(st.none() | st.integers(1, 8)),
    )


@st.composite
def trees(draw: st.DrawFn, examples: Sequence[TokenizedExample]) -> list[Tree]:
    """The examples' leaves in any trees that a planner might make, sharing all or less of what they could."""
    found: list[Tree] = []
    for leaf in sorted(build_leaves(examples), key=lambda leaf: leaf.sort_key):
        common = shared_length(found[-1].leaves[-1], leaf) if found else 0
        shared = draw(st.integers(0, common))
        if shared:
            found[-1].leaves.append(leaf)
            found[-1].shared.append(shared)
        else:
            found.append(Tree([leaf], [0]))
    return draw(st.permutations(found))


EXAMPLES = forests()
