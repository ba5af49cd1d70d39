"""The first stage of teaching the vision base: its tower learns to tell what lies where.

Each image token is asked, through a linear layer that is thrown away at the end, what the shape in
its part of the picture is.  Captions alone took far longer to teach the kinds of shapes: a word
about a whole picture says little about which of its pixels matter.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import Qwen2VLForConditionalGeneration

from vision_base import HIDDEN, IMAGE_TOKENS, MERGE, PATCH
from vision_world import COLORS, KINDS, SIDE, SIZES, Scene, Shape

CELL = PATCH * MERGE
# A shape counts for a cell when it covers this part of it; most cells are empty and weigh less.
LEAST_COVER, EMPTY_WEIGHT = 0.12, 0.25
ANSWERS = (("", *KINDS), ("", *COLORS), ("", *SIZES))
UNTOLD = -100
GRID = SIDE // PATCH


def _cover(shape: Shape, left: float, top: float) -> float:
    """Pixels of a cell inside the square around a shape."""
    half = shape.side / 2
    across = min(left + CELL, shape.x + half) - max(left, shape.x - half)
    down = min(top + CELL, shape.y + half) - max(top, shape.y - half)
    return max(0.0, across) * max(0.0, down)


def cell_labels(scene: Scene) -> list[list[int]]:
    """Kind, colour and size of the shape in each cell, as numbers; 0 where there is none."""
    labels = []
    for cell in range(IMAGE_TOKENS):
        row, column = divmod(cell, SIDE // CELL)
        covers = [(_cover(shape, column * CELL, row * CELL), shape) for shape in scene.shapes]
        cover, shape = max(covers, key=lambda pair: pair[0])
        if cover < LEAST_COVER * CELL * CELL:
            labels.append([0, 0, 0])
            continue
        size = ANSWERS[2].index(shape.size) if shape.size else UNTOLD
        labels.append([ANSWERS[0].index(shape.kind), ANSWERS[1].index(shape.color), size])
    return labels


def features(model: Qwen2VLForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Image tokens (B, tokens, hidden) of pictures of one size."""
    rows = len(pixels) // GRID**2
    grid = torch.tensor([[1, GRID, GRID]] * rows)
    return model.model.visual(pixels, grid_thw=grid).pooler_output.view(rows, IMAGE_TOKENS, HIDDEN)


class Sight(nn.Module):
    """The linear layer that reads kind, colour and size from each image token."""

    def __init__(self) -> None:
        """Makes it with random weights."""
        super().__init__()
        self.read = nn.Linear(HIDDEN, sum(map(len, ANSWERS)))

    def judge(self, seen: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
        """The loss of image tokens against labels, and the share right of what lies in full cells.

        Args:
            seen: (B, tokens, hidden) image tokens.
            labels: (B, tokens, 3) of ``cell_labels``.
        """
        parts = self.read(seen).float().flatten(0, 1).split([len(a) for a in ANSWERS], dim=1)
        wanted = labels.flatten(0, 1)
        loss, right = torch.zeros(()), []
        for column, part in enumerate(parts):
            weights = torch.ones(part.shape[1])
            weights[0] = EMPTY_WEIGHT
            loss = loss + functional.cross_entropy(part, wanted[:, column], weights, ignore_index=UNTOLD)
            full = wanted[:, column] > 0
            right.append((part.argmax(1) == wanted[:, column])[full].float().mean().item())
        return loss, right
