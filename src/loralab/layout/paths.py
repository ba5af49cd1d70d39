"""What the tokens of a path are, beyond their ids: keys that tell pictures apart, and positions.

Owns two facts of prompts with pictures. All pictures of a size have the same token ids, so what rows have in
common goes by keys; and some models give a picture's tokens positions by rows and columns.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from loralab.data.example import PlacedImage

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]
GOLDEN, _FIRST, _SECOND = (np.uint64(number) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
# Set in every key of a picture's token and in no token id.
_PICTURE = np.int64(1 << 62)


def mixed(values: UInt64Array) -> UInt64Array:
    """Scatter numbers over all 64 bits.

    Source: SplitMix64's finalizer (Steele, Lea & Flood 2014, Fast splittable pseudorandom number
    generators, fig. 13).
    """
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))


def token_keys(ids: Int64Array, images: Sequence[PlacedImage]) -> Int64Array:
    """Return what tells tokens apart: their ids, and inside a picture numbers drawn from its bytes.

    Args:
        ids: token ids (L).
        images: pictures among them, in order.

    Returns:
        At least 0 (L); `ids` itself where there are no pictures.
    """
    if not images:
        return ids
    keys = ids.copy()
    for image in images:
        place = np.arange(image.length, dtype=np.uint64)
        drawn = mixed(np.uint64(int(image.file.sha256[:16], 16)) + place * GOLDEN).view(np.int64)
        keys[image.start : image.end] = (drawn & (_PICTURE - 1)) | _PICTURE
    return keys


def token_positions(length: int, images: Sequence[PlacedImage], *, axes: int) -> Int64Array:
    """Return the positions of a path from the root (A, L).

    With one axis they are depths. With three, as Qwen2-VL has them, a text token has its place on all; a
    picture's tokens stay at one place on the first and go by rows and columns on the others, and the text
    behind it goes on at the larger of its two sides.

    Source: Wang et al. 2024, Qwen2-VL, section 2.1 (multimodal rotary position embedding).

    Args:
        length: L.
        images: pictures among the tokens, in order.
        axes: A.
    """
    if axes == 1 or not images:
        return np.broadcast_to(np.arange(length, dtype=np.int64), (axes, length))
    positions = np.empty((axes, length), dtype=np.int64)
    last, now = 0, 0
    for image in images:
        text = image.start - last
        positions[:, last : image.start] = np.arange(now, now + text)
        now += text
        grid = np.indices((image.rows, image.columns)).reshape(2, -1)
        positions[0, image.start : image.end] = now
        positions[1:, image.start : image.end] = now + grid
        now, last = now + max(image.rows, image.columns), image.end
    positions[:, last:] = np.arange(now, now + length - last)
    return positions
