"""Checkpoints: complete and verified, or absent."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loralab.run import file_sha256
from loralab.training.checkpoint import (
    MANIFEST,
    STAGING,
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
    rotate_checkpoints,
    seal_checkpoint,
)

CONTRACT = {"seed": 1, "data": "abc"}


def seal(folder: Path, step: int) -> Path:
    staged = folder / STAGING / f"checkpoint-{step}"
    (staged / "deep").mkdir(parents=True)
    (staged / "weights").write_bytes(bytes([step]) * 100)
    (staged / "deep" / "state.json").write_text(f'{{"step": {step}}}')
    return seal_checkpoint(staged, folder, contract=CONTRACT)


def steps(folder: Path) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in list_checkpoints(folder)]


def test_sealed_checkpoint_reads_back(tmp_path: Path) -> None:
    path = seal(tmp_path, 12)
    assert path == tmp_path / "checkpoint-12"
    assert read_checkpoint(path) == Checkpoint(path, 12, CONTRACT)
    assert not (tmp_path / STAGING / "checkpoint-12").exists()
    manifest = json.loads((path / MANIFEST).read_text())
    files = {str(p.relative_to(path)): p for p in path.rglob("*") if p.is_file() and p.name != MANIFEST}
    assert manifest["files"] == {name: file_sha256(p) for name, p in files.items()}
    assert set(files) == {"weights", "deep/state.json"}


def test_sealing_again_replaces_the_older_one(tmp_path: Path) -> None:
    (seal(tmp_path, 3) / "stale").write_text("")
    path = seal(tmp_path, 3)
    assert not (path / "stale").exists()
    assert read_checkpoint(path) is not None


def _flip(path: Path) -> None:
    content = bytearray((path / "weights").read_bytes())
    content[50] ^= 1
    (path / "weights").write_bytes(content)


def _manifest(text: str) -> Callable[[Path], None]:
    return lambda path: (path / MANIFEST).write_text(text) and None


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flipped bit": _flip,
    "file cut": lambda path: (path / "weights").write_bytes(b"\2" * 99),
    "file missing": lambda path: (path / "deep" / "state.json").unlink(),
    "no manifest": lambda path: (path / MANIFEST).unlink(),
    "manifest cut": _manifest('{"step": 2, "fil'),
    "manifest empty": _manifest(""),
    "manifest a list": _manifest("[]"),
    "manifest without step": _manifest('{"files": {}, "contract": {}}'),
    "manifest without contract": _manifest('{"files": {}, "step": 2}'),
    "files a list": _manifest('{"files": [], "step": 2, "contract": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_does_not_exist(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, damaged = seal(tmp_path, 1), seal(tmp_path, 2)
    DAMAGES[damage](damaged)
    assert read_checkpoint(damaged) is None
    with caplog.at_level(logging.WARNING):
        found = find_checkpoint(tmp_path)
    assert found is not None
    assert found.path == good
    assert f"{damaged} is incomplete or damaged" in caplog.text


def test_newest_is_found_by_number(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        seal(tmp_path, step)
    assert steps(tmp_path) == [9, 20, 100]
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 100


def test_other_things_in_the_folder_are_no_checkpoints(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path / "gone") is None
    seal(tmp_path, 5)
    for name in ("checkpoint-last", "checkpoint-", "checkpoint-6.tmp", "6"):
        (tmp_path / name).mkdir()
    (tmp_path / STAGING / "checkpoint-7").mkdir(parents=True)
    (tmp_path / "checkpoint-8").write_text("a file")
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 5


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, None, [3, 4]),
        (2, 1, [1, 3, 4]),
        (1, 4, [4]),
        (1, 2, [2, 4]),
        (9, None, [1, 2, 3, 4]),
        (None, None, [1, 2, 3, 4]),
        (2, 99, [3, 4]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(
    keep: int | None, best: int | None, left: list[int], tmp_path: Path
) -> None:
    for step in (1, 2, 3, 4):
        seal(tmp_path, step)
    rotate_checkpoints(tmp_path, keep=keep, best_step=best)
    assert steps(tmp_path) == left
