"""Prompts with one marker in the place of each picture's tokens, as a template writes them.

Owns the way back from stored ids to what was rendered; the way there is `processor.py`'s.
"""

from collections.abc import Sequence

from loralab.data.example import PlacedImage


def fold_pictures(ids: Sequence[int], images: Sequence[PlacedImage], token: int) -> list[int]:
    """Return a prompt's ids with one token for each picture.

    Args:
        ids: of the prompt, with all tokens of its pictures.
        images: pictures in it, in order.
        token: id that stands for a picture in a rendered prompt.
    """
    folded: list[int] = []
    last = 0
    for image in images:
        folded += [*ids[last : image.start], token]
        last = image.end
    return [*folded, *ids[last:]]
