"""Tokenized examples with pictures, and a reader of pictures that knows them by their numbers."""

import hashlib
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from loralab.data.example import Branch, ImageFile, PlacedImage, TokenizedExample
from loralab.layout.tree import Leaf, Tree, build_leaves, shared_length

# The token that takes a feature, and one that stands inside a picture without one.
TOKEN, FRAME = 9, 8
# Rows and columns of features of each picture; the first two are of one size.
SIZES = ((1, 2), (1, 2), (2, 2), (3, 1))
# A token, or the number of a picture.
Item: TypeAlias = int | tuple[int]


def picture(number: int) -> ImageFile:
    return ImageFile(f"/{number}.png", hashlib.sha256(bytes([number])).hexdigest(), 8, 8, 100, number)


def features_of(number: int) -> int:
    rows, columns = SIZES[number % len(SIZES)]
    return rows * columns


def place(items: Sequence[Item], *, framed: bool = False) -> tuple[list[int], tuple[PlacedImage, ...]]:
    """Return tokens and pictures; framed ones have a token without a feature before each row of features."""
    ids: list[int] = []
    placed: list[PlacedImage] = []
    for item in items:
        if isinstance(item, int):
            ids.append(item)
            continue
        rows, columns = SIZES[item[0] % len(SIZES)]
        inside = [FRAME, *[TOKEN] * columns] * rows if framed else [TOKEN] * (rows * columns)
        shape = (0, 0) if framed else (rows, columns)
        placed.append(PlacedImage(picture(item[0]), len(ids), len(inside), *shape))
        ids += inside
    return ids, tuple(placed)


def shown_branch(items: Sequence[Item], answer: Sequence[int], *, framed: bool = False) -> Branch:
    ids, placed = place(items, framed=framed)
    return Branch(np.asarray(ids, dtype=np.int32), np.asarray(answer, dtype=np.int32), placed)


def shown_example(*pairs: tuple[Sequence[Item], Sequence[int]], framed: bool = False) -> TokenizedExample:
    return TokenizedExample(1, 0, tuple(shown_branch(*pair, framed=framed) for pair in pairs))


@st.composite
def shown_forests(draw: st.DrawFn, most: int = 6) -> list[TokenizedExample]:
    """Examples whose prompts meet at any depth, with pictures anywhere in them; some pictures stand there twice."""
    framed = draw(st.booleans())
    item = st.integers(0, 2) | st.tuples(st.integers(0, 3))
    known: list[list[Item]] = [[]]
    examples = []
    for _ in range(draw(st.integers(1, most))):
        pairs: list[tuple[list[Item], list[int]]] = []
        for _ in range(draw(st.integers(1, 2))):
            before = draw(st.sampled_from(known))
            prompt = before[: draw(st.integers(0, len(before)))] + draw(st.lists(item, max_size=3))
            prompt = prompt or [draw(item)]
            known.append(prompt)
            pairs.append((prompt, draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))))
        examples.append(shown_example(*pairs, framed=framed))
    return examples


@st.composite
def shown_trees(draw: st.DrawFn, examples: Sequence[TokenizedExample]) -> list[Tree]:
    """The examples' leaves in any trees that a planner might make; no picture is shared in part."""
    found: list[Tree] = []
    for leaf in sorted(build_leaves(examples), key=lambda leaf: leaf.sort_key):
        common = shared_length(found[-1].leaves[-1], leaf) if found else 0
        shared = draw(st.sampled_from([n for n in range(common + 1) if not _inside(leaf, n)]))
        if shared:
            found[-1].leaves.append(leaf)
            found[-1].shared.append(shared)
        else:
            found.append(Tree([leaf], [0]))
    return draw(st.permutations(found))


def _inside(leaf: Leaf, border: int) -> bool:
    return any(image.start < border < image.end for image in leaf.images)


def axes_of(examples: Sequence[TokenizedExample]) -> int:
    """Return how many axes positions can have: framed pictures, as some families have, have no rows and columns."""
    return 3 if all(i.rows for example in examples for b in example.branches for i in b.images) else 1


def expected_features(branch: Branch) -> dict[int, tuple[str, int]]:
    """Return for each place of a prompt that takes a feature: whose, and which of it."""
    found = {}
    for image in branch.images:
        inside = [n for n in range(image.start, image.end) if branch.prompt_ids[n] == TOKEN]
        found |= {place: (image.file.sha256, number) for number, place in enumerate(inside)}
    return found


class NumberedReader:
    """Gives two numbers as each feature: which picture it is of, and which feature of it."""

    token = TOKEN

    def __init__(self, *, axes: int = 3) -> None:
        self.axes = axes
        self.asked: list[list[ImageFile]] = []

    def read(self, files: Sequence[ImageFile]) -> dict[str, Tensor]:
        self.asked.append(list(files))
        rows = [(file.modified_ns, k) for file in files for k in range(features_of(file.modified_ns))]
        return {"features": torch.tensor(rows)}
