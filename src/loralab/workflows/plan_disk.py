"""What a run writes: its adapter, checkpoints and caches, in bytes, and what the disk has."""

import shutil
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict

from loralab.config.schema import Config
from loralab.data.dataset import PreparedData
from loralab.models.supervised import SupervisedPeftModel


def predict_disk(
    config: Config, data: PreparedData, *, optimizer: int, model: SupervisedPeftModel, checkpoints: int, folder: Path
) -> dict[str, Any]:
    """Return what a run writes and what is free where it writes.

    Args:
        config: the configuration.
        data: its data; the tokenized rows are cached already.
        optimizer: bytes of the optimizer's moments.
        model: base with adapter; what PEFT saves of it may be more than what is trained.
        checkpoints: how many are written.
        folder: of the run.
    """
    adapter = sum(tensor.numel() * tensor.element_size() for tensor in get_peft_model_state_dict(model).values())
    checkpoint = adapter + optimizer
    limit = config.training.save_total_limit
    # One more while the newest is written, and the best beside the newest.
    kept = checkpoints if limit is None else min(checkpoints, limit)
    most = min(checkpoints, kept + 1)
    folders = {store.folder for store in data.splits.values()}
    cached = sum(file.stat().st_size for each in folders for file in each.iterdir() if file.is_file())
    place = next((parent for parent in (folder, *folder.absolute().parents) if parent.exists()), Path())
    return {
        "adapter_bytes": adapter,
        "checkpoint_bytes": checkpoint,
        "checkpoints_written": checkpoints,
        "checkpoints_kept": kept,
        "run_folder_bytes": adapter + most * checkpoint,
        "token_cache_bytes": cached,
        "free_bytes": shutil.disk_usage(place).free,
    }
