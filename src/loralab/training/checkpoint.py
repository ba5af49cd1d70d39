"""Checkpoints: complete and verified, or absent.

Owns sealing (hashes of all files in a manifest that is written last, then one rename), finding
the newest valid one, and rotation. Does not own what the contract in the manifest holds.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.run import file_sha256, write_json

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STAGING = ".staging"
# transformers' own name; its Trainer reads and writes it.
TRAINER_STATE_FILE = "trainer_state.json"
_PREFIX = "checkpoint-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A sealed checkpoint.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        contract: what a resume must not change.
    """

    path: Path
    step: int
    contract: dict[str, Any]


def seal_checkpoint(staged: Path, folder: Path, *, contract: Mapping[str, Any]) -> Path:
    """Move a staged checkpoint into `folder` with a manifest of its files.

    Args:
        staged: folder `checkpoint-N` as the trainer wrote it.
        folder: the run's checkpoints.
        contract: what a resume must not change.

    Returns:
        The sealed checkpoint's folder.
    """
    files = {}
    for path in sorted(p for p in staged.rglob("*") if p.is_file() and p.name != MANIFEST):
        _sync_file(path)
        files[str(path.relative_to(staged))] = file_sha256(path)
    step = int(staged.name.removeprefix(_PREFIX))
    write_json(staged / MANIFEST, {"step": step, "files": files, "contract": dict(contract)})
    target, replaced = folder / staged.name, staged.with_name(f"replaced-{staged.name}")
    if target.exists():  # saved again at the same step; set aside, so that a kill here costs next to nothing
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(target, replaced)
    os.replace(staged, target)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def _sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def read_checkpoint(path: Path) -> Checkpoint | None:
    """Return a checkpoint whose files match its manifest, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, str] = manifest["files"]
        if all(file_sha256(path / name) == digest for name, digest in files.items()):
            return Checkpoint(path, int(manifest["step"]), dict(manifest["contract"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return None


def list_checkpoints(folder: Path) -> list[Path]:
    """Return all checkpoint folders, oldest first, valid or not."""
    found = [p for p in folder.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(_PREFIX)))


def find_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest valid checkpoint; damaged ones are passed over with a message."""
    for path in reversed(list_checkpoints(folder)):
        checkpoint = read_checkpoint(path)
        if checkpoint is not None:
            return checkpoint
        logger.warning("%s is incomplete or damaged and is passed over", path)
    return None


def rotate_checkpoints(folder: Path, *, keep: int | None, best_step: int | None) -> None:
    """Remove the oldest checkpoints beyond `keep`; the one of `best_step` stays."""
    if keep is None:
        return
    for path in list_checkpoints(folder)[:-keep]:
        if best_step is None or path.name != f"{_PREFIX}{best_step}":
            shutil.rmtree(path, ignore_errors=True)
