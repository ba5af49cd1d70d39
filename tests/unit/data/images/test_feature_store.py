"""Features on disk: whole or not at all, told apart by picture, bounded over all folders."""

import os
from pathlib import Path

import pytest
import torch

from loralab.data.example import ImageFile
from loralab.data.images.feature_store import FeatureStore
from loralab.errors import DataError


def picture(number: int) -> ImageFile:
    return ImageFile(f"/pictures/{number}.png", f"{number:064x}", 8, 8, 10, 0)


def store(folder: Path, dtype: torch.dtype = torch.bfloat16) -> FeatureStore:
    return FeatureStore(folder, 6, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_saved_comes_back_bit_by_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    kept, features = store(tmp_path / "a", dtype), torch.randn(4, 6).to(dtype)
    kept.save(picture(1), features)
    assert torch.equal(kept.load(picture(1)), features)
    assert kept.load(picture(1)).dtype == dtype
    assert kept.holds(picture(1), 4)


def test_a_picture_that_is_not_there_or_has_other_features_is_not_held(tmp_path: Path) -> None:
    kept = store(tmp_path / "a")
    kept.save(picture(1), torch.zeros(4, 6))
    assert not kept.holds(picture(2), 4)
    assert not kept.holds(picture(1), 5)
    with pytest.raises(DataError, match=r"kept features of the picture '/pictures/2\.png'"):
        kept.load(picture(2))


def test_damage_is_seen_and_removed(tmp_path: Path) -> None:
    kept = store(tmp_path / "a")
    kept.save(picture(1), torch.ones(4, 6))
    (path,) = (tmp_path / "a").rglob("*.bin")
    raw = bytearray(path.read_bytes())
    raw[5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match="damaged"):
        kept.load(picture(1))
    assert not kept.holds(picture(1), 4)


def test_room_is_made_by_removing_the_oldest_folders_of_others(tmp_path: Path) -> None:
    for age, name in enumerate(["oldest", "older", "own"]):
        store(tmp_path / name).save(picture(1), torch.zeros(4, 6))
        os.utime(tmp_path / name, (1000 + age, 1000 + age))
    own, each = store(tmp_path / "own"), store(tmp_path / "own").bytes_of(4)
    own.make_room(each, most=4 * each)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["older", "oldest", "own"]
    own.make_room(each, most=3 * each)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["older", "own"]
    own.make_room(each, most=each)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]  # never its own
