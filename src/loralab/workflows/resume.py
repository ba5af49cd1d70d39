"""Where a resumed run goes on, and what must be unchanged for that.

Owns the contract of a resume: everything that changes the maths of a run.
"""

import shutil
from collections.abc import Mapping
from typing import Any

import torch

from loralab.config.schema import Config
from loralab.data.dataset import PreparedData
from loralab.models.precision import Resolved
from loralab.progress import Reporter
from loralab.run import RunFolder
from loralab.training.checkpoint import (
    Checkpoint,
    check_contract,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
)


def resume_contract(
    config: Config,
    *,
    data: PreparedData,
    choices: Mapping[str, Resolved[Any]],
    device: torch.device,
    model: Mapping[str, Any],
) -> dict[str, Any]:
    """Return everything that changes the maths of a run; a resume must find it unchanged."""
    training = config.training
    free = {"logging_steps", "save_strategy", "save_steps", "save_total_limit", "gradient_checkpointing"}
    return {
        "data": data.fingerprint,
        "template": data.template.text,
        "model": model["sha256"] or f"{model['name']}@{model['revision']}",
        "precision": str(choices["precision"].value),
        "attn_implementation": str(choices["attn_implementation"].value),
        "device": device.type,
        "base_dropout": str(choices["base_dropout"].value),
        **{f"lora.{key}": value for key, value in config.lora.model_dump(mode="json").items()},
        **{f"training.{k}": v for k, v in training.model_dump(mode="json").items() if k not in free},
        "advanced.trainer_args": dict(config.advanced.trainer_args),
        **(_evaluation_contract(config) if training.early_stopping or training.load_best_model_at_end else {}),
    }


def _evaluation_contract(config: Config) -> dict[str, Any]:
    """Return what decides when the watched metric is measured."""
    return {"evaluation.strategy": config.evaluation.strategy, "evaluation.steps": config.evaluation.steps}


def find_start(folder: RunFolder, contract: Mapping[str, Any], *, reporter: Reporter) -> Checkpoint | None:
    """Return the checkpoint that a resumed run goes on from, or None where there is none.

    Damaged checkpoints are removed: they would count in the rotation.

    Raises:
        RunFolderError: the run has changed since.
    """
    checkpoint = find_checkpoint(folder.checkpoints)
    if checkpoint is None:
        reporter.say("no checkpoint was written before: starting from step 0")
        return None
    check_contract(checkpoint, contract)
    for path in list_checkpoints(folder.checkpoints):
        if read_checkpoint(path) is None:
            shutil.rmtree(path, ignore_errors=True)
    reporter.say(f"resuming from step {checkpoint.step}")
    return checkpoint
