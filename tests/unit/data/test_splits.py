"""Splits: disjoint, whole, of the right size, and the same for the same seed."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralab.config.schema import DataConfig
from loralab.data.splits import split_units
from loralab.errors import DataError


def split(total: int, **chosen: Any) -> dict[str, list[int]]:
    return {name: part.tolist() for name, part in split_units(total, DataConfig(train="f", **chosen)).items()}


@given(
    total=st.integers(20, 200),
    validation=st.one_of(st.none(), st.integers(1, 9), st.floats(0.05, 0.4)),
    test=st.one_of(st.none(), st.integers(1, 9), st.floats(0.05, 0.4)),
    method=st.sampled_from(["random", "first"]),
)
def test_parts_are_disjoint_whole_and_ascending(total: int, validation: Any, test: Any, method: Any) -> None:
    parts = split(total, validation=validation, test=test, split_method=method)
    assert sorted(unit for part in parts.values() for unit in part) == list(range(total))
    assert all(part == sorted(part) for part in parts.values())
    wanted = {"validation": validation, "test": test}
    assert set(parts) == {"train", *(name for name, amount in wanted.items() if amount is not None)}
    for name, amount in wanted.items():
        if amount is not None:
            assert len(parts[name]) == (amount if isinstance(amount, int) else round(amount * total))


def test_first_takes_the_first_rows() -> None:
    assert split(10, validation=2, test=0.3, split_method="first") == {
        "validation": [0, 1],
        "test": [2, 3, 4],
        "train": [5, 6, 7, 8, 9],
    }


def test_random_depends_on_the_seed_alone() -> None:
    parts = split(100, validation=0.1)
    assert parts == split(100, validation=10)
    assert parts != split(100, validation=0.1, split_seed=7)
    assert parts["validation"] != list(range(10))


def test_validation_stays_when_a_test_part_is_added() -> None:
    assert split(50, validation=5)["validation"] == split(50, validation=5, test=5)["validation"]


@pytest.mark.parametrize("spec", [None, "held-out.json", ["a.json", "b.json"]])
def test_parts_from_files_take_nothing(spec: Any) -> None:
    assert split(5, validation=spec) == {"train": [0, 1, 2, 3, 4]}


@pytest.mark.parametrize(("validation", "test", "taken"), [(5, None, 5), (3, 2, 5), (0.5, 0.5, 4), (99, None, 99)])
def test_nothing_left_for_training(validation: Any, test: Any, taken: int) -> None:
    total = 4 if validation == 0.5 else 5
    with pytest.raises(DataError) as caught:
        split(total, validation=validation, test=test)
    assert caught.value.problems[0].what == (
        f"validation and test would take {taken} of {total} rows and leave none for training"
    )


@pytest.mark.parametrize("name", ["validation", "test"])
def test_fraction_that_is_no_row(name: str) -> None:
    with pytest.raises(DataError) as caught:
        split(10, **{name: 0.04})
    assert caught.value.problems[0].what == f"{name} 0.04 of 10 rows is no row"
    assert caught.value.problems[0].where == f"key data.{name}"


def test_parts_are_indices() -> None:
    assert split_units(4, DataConfig(train="f"))["train"].dtype == np.int64
