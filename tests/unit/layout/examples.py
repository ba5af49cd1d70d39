"""Tokenized examples by hand, and a hypothesis strategy for them."""

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from loralab.data.example import Branch, TokenizedExample

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
        found += [(tuple(whole[:i]), whole[i]) for i in range(len(prompt), len(whole))]
    return found


_IDS = st.lists(st.integers(0, 5), min_size=1, max_size=4)


@st.composite
def _conversations(draw: st.DrawFn) -> TokenizedExample:
    """Turns that extend each other, with now and then one that does not."""
    pairs: list[Pair] = []
    path: list[int] = []
    for _ in range(draw(st.integers(1, 3))):
        prompt = [*(path if draw(st.booleans()) else []), *draw(_IDS)]
        answer = draw(_IDS)
        pairs.append((prompt, answer))
        path = [*prompt, *answer]
    return example(*pairs, row=draw(st.integers(1, 99)), source=draw(st.integers(0, 2)))


EXAMPLES = st.lists(_conversations(), min_size=1, max_size=7)
