"""Keys that tell pictures apart, and positions that are the model's own."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loralab.data.example import ImageFile, PlacedImage
from loralab.layout.paths import token_keys, token_positions
from support.tiny_vision import build_vision_model
from unit.layout.pictures import SIZES, TOKEN, features_of, picture, place

SHAS = st.binary(min_size=32, max_size=32).map(bytes.hex)


@pytest.fixture(scope="module")
def qwen():
    return build_vision_model("qwen2_vl")[0].model


def test_keys_are_ids_outside_pictures() -> None:
    ids, images = place([5, (0,), 6, 7, (2,), 5])
    keys = token_keys(np.asarray(ids), images)
    inside = [n for image in images for n in range(image.start, image.end)]
    assert [int(keys[n]) for n in range(len(ids)) if n not in inside] == [5, 6, 7, 5]
    assert len({int(keys[n]) for n in inside}) == len(inside) == features_of(0) + features_of(2)
    assert ids == place([5, (1,), 6, 7, (2,), 5])[0]  # only the keys know which picture it is


@given(first=SHAS, second=SHAS, length=st.integers(1, 40))
def test_pictures_of_one_size_differ_from_their_first_token_on(first: str, second: str, length: int) -> None:
    ids = np.full(length, TOKEN, dtype=np.int64)
    one, two = (token_keys(ids, [PlacedImage(ImageFile("/x", sha, 8, 8, 1, 1), 0, length)]) for sha in (first, second))
    assert bool((one == two).all()) is (first[:16] == second[:16])
    assert bool((one == two).any()) is (first[:16] == second[:16])
    # No token id is as large, and as bytes they sort as numbers do.
    assert min(one) >= 2**62
    assert one.dtype == np.int64


def test_keys_of_a_picture_are_the_same_wherever_it_stands() -> None:
    (early, late), ((first,), (second,)) = zip(*(place([1] * n + [(3,)]) for n in (1, 4)), strict=True)
    found = [
        token_keys(np.asarray(ids), [image])[image.start : image.end].tolist()
        for ids, image in ((early, first), (late, second))
    ]
    assert found[0] == found[1]


def test_without_pictures_nothing_is_copied() -> None:
    ids = np.asarray([1, 2, 3])
    assert token_keys(ids, ()) is ids
    assert token_positions(3, (), axes=3).tolist() == [[0, 1, 2]] * 3


def test_positions_by_hand() -> None:
    _, images = place([5, 6, (2,), 7, (3,), 8])
    assert token_positions(11, images, axes=1).tolist() == [list(range(11))]
    assert token_positions(12, images, axes=3).tolist() == [
        [0, 1, 2, 2, 2, 2, 4, 5, 5, 5, 8, 9],
        [0, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9],
        [0, 1, 2, 3, 2, 3, 4, 5, 5, 5, 8, 9],
    ]


PARTS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)), max_size=4)


@given(parts=PARTS, behind=st.integers(1, 5), starts_with_picture=st.booleans())
def test_positions_are_those_of_transformers(qwen, parts, behind, starts_with_picture) -> None:
    images: list[PlacedImage] = []
    kinds: list[int] = []
    for number, (text, rows, columns) in enumerate(parts):
        kinds += [0] * (0 if starts_with_picture and not number else text)
        images.append(PlacedImage(picture(number), len(kinds), rows * columns, rows, columns))
        kinds += [1] * (rows * columns)
    kinds += [0] * behind
    grids = torch.tensor([[1, 2 * rows, 2 * columns] for _, rows, columns in parts]).reshape(-1, 3)
    own, _ = qwen.get_rope_index(
        torch.zeros(1, len(kinds), dtype=torch.long), torch.tensor([kinds]), image_grid_thw=grids
    )
    np.testing.assert_array_equal(token_positions(len(kinds), images, axes=3), own[:, 0].numpy())


def test_the_pictures_of_these_tests_are_told_apart() -> None:
    assert SIZES[0] == SIZES[1]
    assert all(a.sha256 != b.sha256 for a, b in itertools.combinations(map(picture, range(4)), 2))
