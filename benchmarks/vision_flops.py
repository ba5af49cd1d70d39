"""Floating-point operations of a step with pictures, from shapes alone, and the vision tower's share of them.

Counted: 2 for each weight of a linear layer and token, and the two products of attention (4 for each channel and pair
of a query and a key that it may see). Frozen text layers go backward to their inputs and never to their weights, so the
way back costs as much as the way forward, and twice as much for attention's products. The tower is frozen and nothing
below it learns: it goes forward alone. Left out: norms, activations, softmax, the adapter, and what a kernel computes
beyond the pairs that are visible.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Qwen2-VL.

    Attributes:
        vision_depth: blocks of the tower.
        vision_width: their width.
        vision_heads: heads in them.
        vision_mlp: width of their MLP.
        hidden: width of the text model.
        layers: its layers.
        heads: query heads.
        key_heads: key heads.
        mlp: width of its MLP, with three matrices.
        vocabulary: rows of the head.
        patch: side of a patch in pixels.
        merge: patches of a side that become one token.
        frames: pictures in a patch; a still picture is repeated.
    """

    vision_depth: int
    vision_width: int
    vision_heads: int
    vision_mlp: int
    hidden: int
    layers: int
    heads: int
    key_heads: int
    mlp: int
    vocabulary: int
    patch: int = 14
    merge: int = 2
    frames: int = 2

    def patches(self, side: int) -> int:
        """Return the patches of a square picture, whose side is rounded to whole tokens."""
        unit = self.patch * self.merge
        return (round(side / unit) * self.merge) ** 2

    def text_weights(self) -> int:
        """Return the weights of the linear layers of the text model, without the head."""
        head = self.hidden // self.heads
        attention = 2 * self.hidden**2 + 2 * self.hidden * head * self.key_heads
        return self.layers * (attention + 3 * self.hidden * self.mlp)


# Read from Qwen/Qwen2-VL-2B's published configuration.
QWEN2_VL_2B = Shape(
    vision_depth=32,
    vision_width=1280,
    vision_heads=16,
    vision_mlp=5120,
    hidden=1536,
    layers=28,
    heads=12,
    key_heads=2,
    mlp=8960,
    vocabulary=151_936,
)


def tower_flops(shape: Shape, side: int) -> float:
    """Return the operations of one picture's forward through patch embedding, blocks and merger."""
    patches, width = shape.patches(side), shape.vision_width
    embedding = 3 * shape.frames * shape.patch**2 * width
    block = 4 * width**2 + 2 * width * shape.vision_mlp
    attention = 4 * patches**2 * width * shape.vision_depth
    wide = width * shape.merge**2
    merger = (wide**2 + wide * shape.hidden) * patches // shape.merge**2
    return 2.0 * (patches * (embedding + block * shape.vision_depth) + merger) + attention


def text_flops(shape: Shape, *, tokens: int, pairs: int, labels: int) -> float:
    """Return the operations of the text model, forward and backward.

    Args:
        shape: the model's.
        tokens: that are laid out.
        pairs: of a query and a key it sees, itself included.
        labels: positions that go through the head.
    """
    linear = 2.0 * 2 * (tokens * shape.text_weights() + labels * shape.hidden * shape.vocabulary)
    return linear + 3.0 * 4 * pairs * shape.hidden * shape.layers


def chain_pairs(tokens: int) -> int:
    """Return the pairs of a causal chain."""
    return tokens * (tokens + 1) // 2


def step_flops(shape: Shape, *, side: int, questions: int, own: int, labels: int) -> dict[str, Any]:
    """Return the operations of one picture's step in each way of doing it, and the tower's share of it.

    Args:
        shape: the model's.
        side: of the picture, in pixels.
        questions: about the picture.
        own: tokens of a row behind the picture: question, template, answer.
        labels: tokens of a row that carry loss.
    """
    picture = shape.patches(side) // shape.merge**2
    alone = chain_pairs(picture + own) - chain_pairs(picture)
    answers = questions * labels
    shared = text_flops(
        shape, tokens=picture + questions * own, pairs=chain_pairs(picture) + questions * alone, labels=answers
    )
    rows = text_flops(
        shape,
        tokens=questions * (picture + own),
        pairs=questions * chain_pairs(picture + own),
        labels=answers,
    )
    tower = tower_flops(shape, side)
    ways = {
        "loralab": (tower, shared),
        "loralab_kept": (0.0, shared),
        "loralab_unshared": (tower, rows),
        "every example on its own": (questions * tower, rows),
    }
    return {
        name: {
            "tower_gflop": round(of_tower / 1e9, 1),
            "text_gflop": round(of_text / 1e9, 1),
            "tower_share": round(of_tower / (of_tower + of_text), 4),
            "times_loralab": round((of_tower + of_text) / (tower + shared), 2),
        }
        for name, (of_tower, of_text) in ways.items()
    }
