"""Rows on one picture stay in one part, or a picture would stand in training and validation."""

import numpy as np
import pytest

from loralab.config.schema import DataConfig
from loralab.data.splits import split_groups
from loralab.errors import DataError

OWNERS = np.repeat(np.arange(20), 3)


@pytest.mark.parametrize("method", ["random", "first"])
def test_owners_are_never_divided_and_parts_are_as_large_as_asked_for(method: str) -> None:
    data = DataConfig(train="x", validation=7, test=0.1, split_method=method)
    parts = split_groups(OWNERS, data)
    assert {name: len(units) for name, units in parts.items()} == {"validation": 9, "test": 6, "train": 45}
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(60))
    whose = [set(OWNERS[units].tolist()) for units in parts.values()]
    assert sum(map(len, whose)) == len(set().union(*whose))


def test_the_seed_decides() -> None:
    drawn = [split_groups(OWNERS, DataConfig(train="x", validation=6, split_seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0]["validation"].tolist() == drawn[1]["validation"].tolist() != drawn[2]["validation"].tolist()


def test_nothing_left_for_training_is_refused() -> None:
    with pytest.raises(DataError, match="rows stay together"):
        split_groups(np.zeros(10, dtype=np.int64), DataConfig(train="x", validation=1))
