"""Hidden states by path: what is appended is read again, and only what was committed under the same key counts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loralab.models.trunk_store import PATHS, STATES, PathCollision, TrunkStore

KEY: dict[str, Any] = {"model": "abc", "splits": ["train"]}


def numbers(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def opened(folder: Path | None, *, key: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32) -> TrunkStore:
    return TrunkStore(width=3, dtype=dtype, folder=folder, key=KEY if key is None else key)


def fill(store: TrunkStore, hashes: np.ndarray) -> torch.Tensor:
    states = torch.randn(len(hashes), 3).to(store.dtype)
    store.append(hashes, hashes % 7, states)
    return states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_memory", [True, False])
def test_rows_come_back_in_any_order(dtype: torch.dtype, in_memory: bool, tmp_path: Path) -> None:
    store = opened(None if in_memory else tmp_path, dtype=dtype)
    first = fill(store, numbers(9, -5, 2**62, 3))
    second = fill(store, numbers(-(2**63), 4))
    rows = store.find(numbers(4, 9, -5, 3, 9, -(2**63)))
    assert rows is not None
    expected = torch.stack([second[1], first[0], first[1], first[3], first[0], second[0]])
    assert torch.equal(store.read(rows), expected)
    assert (len(store), store.bytes) == (6, 6 * 3 * dtype.itemsize)
    assert store.find(numbers(4, 5)) is None


def test_only_new_paths_are_missing_each_once() -> None:
    store = opened(None)
    hashes = numbers(8, 3, 8, 5)
    assert store.missing(hashes, hashes % 7).tolist() == [0, 1, 3]
    fill(store, numbers(3))
    assert store.missing(hashes, hashes % 7).tolist() == [0, 3]


def test_one_hash_of_two_paths_is_seen() -> None:
    store = opened(None)
    with pytest.raises(PathCollision):
        store.missing(numbers(8, 8), numbers(1, 2))
    store.append(numbers(8), numbers(1), torch.zeros(1, 3))
    with pytest.raises(PathCollision):
        store.missing(numbers(5, 8), numbers(1, 2))
    assert store.missing(numbers(5, 8), numbers(1, 1)).tolist() == [0]


def test_what_was_committed_is_taken_up(tmp_path: Path) -> None:
    store = opened(tmp_path)
    states = fill(store, numbers(9, 5))
    store.commit(portions=4)
    fill(store, numbers(6))  # a kill comes here
    (tmp_path / STATES).write_bytes((tmp_path / STATES).read_bytes() + b"half a row")
    again = opened(tmp_path)
    assert again.resume() == {"portions": 4}
    assert len(again) == 2
    assert again.find(numbers(6)) is None
    later = fill(again, numbers(7))
    rows = again.find(numbers(5, 7))
    assert rows is not None
    assert torch.equal(again.read(rows), torch.stack([states[1], later[0]]))


@pytest.mark.parametrize("change", ["key", "states", "paths", "manifest", "no commit"])
def test_what_is_not_whole_or_of_another_base_is_dropped(change: str, tmp_path: Path) -> None:
    store = opened(tmp_path)
    fill(store, numbers(9, 5))
    if change != "no commit":
        store.commit(portions=1)
    if change in ("states", "paths"):
        path = tmp_path / {"states": STATES, "paths": PATHS}[change]
        path.write_bytes(path.read_bytes()[:-1])
    if change == "manifest":
        (tmp_path / "manifest.json").write_text("{")
    again = opened(tmp_path, key=KEY | {"model": "abd"} if change == "key" else None)
    assert again.resume() is None
    assert len(again) == 0
    assert (tmp_path / STATES).stat().st_size == 0
    fill(again, numbers(5))


def test_rows_can_be_dropped_again() -> None:
    store = opened(None)
    states = fill(store, numbers(9, 5))
    fill(store, numbers(1, 7))
    store.keep(2)
    assert store.find(numbers(1)) is None
    newer = fill(store, numbers(7))
    rows = store.find(numbers(7, 9))
    assert rows is not None
    assert torch.equal(store.read(rows), torch.stack([newer[0], states[0]]))
