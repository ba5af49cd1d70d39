"""The configuration in the words of transformers' `TrainingArguments`.

Owns the translation, and what must not be left to Trainer: accumulation, rotation, logging
filters and progress bars.
"""

import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from loralab.config.checks import UNPAGED
from loralab.config.schema import EvaluationConfig
from loralab.config.training_schema import TrainingConfig
from loralab.errors import ConfigError

_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
_NEEDS_BITSANDBYTES = {*UNPAGED, "adamw_8bit", "adamw_bnb_8bit"}


def build_arguments(
    training: TrainingConfig,
    *,
    evaluation: EvaluationConfig,
    staging: Path,
    steps_per_epoch: int,
    device: torch.device,
    further: Mapping[str, Any],
) -> TrainingArguments:
    """Return Trainer's arguments.

    Args:
        training: the training section.
        evaluation: the evaluation section, with its strategy resolved.
        staging: folder where Trainer writes checkpoints before they are sealed.
        steps_per_epoch: optimizer steps of an epoch.
        device: where to compute.
        further: `advanced.trainer_args`, by its allow-list.

    Raises:
        ConfigError: the optimizer does not run on this device.
    """
    check_optimizer(training.optim, device)
    total = count_steps(training, steps_per_epoch)
    return TrainingArguments(
        output_dir=str(staging),
        use_cpu=device.type == "cpu",
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=1,  # a dataloader item is a whole step already
        num_train_epochs=training.num_train_epochs,
        max_steps=training.max_steps or -1,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_steps or math.ceil(training.warmup_ratio * total),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optim,
        seed=training.seed,
        logging_strategy="steps",
        logging_steps=training.logging_steps,
        logging_nan_inf_filter=False,  # it would hide a diverged loss
        eval_strategy=evaluation.strategy,
        eval_steps=evaluation.steps,
        save_strategy=training.save_strategy,
        save_steps=training.save_steps,
        save_total_limit=None,  # rotation is ours
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to=[],
        **further,
    )


def check_optimizer(optim: str, device: torch.device) -> None:
    """Check that an optimizer runs on a device.

    Args:
        optim: `training.optim`.
        device: where the adapter's weights are.

    Raises:
        ConfigError: it does not; the nearest one that does is named.
    """
    if optim in UNPAGED and device.type != "cuda":
        what, other = f"{optim} on {device.type}: only the memory of a CUDA device is paged", UNPAGED[optim]
    elif optim in _NEEDS_BITSANDBYTES and not _BITSANDBYTES:
        what, other = f"{optim} needs the package bitsandbytes, which is not installed", "adamw_torch"
    elif optim in _NEEDS_BITSANDBYTES and device.type not in ("cuda", "cpu"):
        what, other = f"{optim} on {device.type}: bitsandbytes has it for cuda and cpu", "adamw_torch"
    else:
        return
    raise ConfigError(what, where="key training.optim", fix=f"set training.optim: {other}")


def count_steps(training: TrainingConfig, steps_per_epoch: int) -> int:
    """Return the optimizer steps of a run."""
    return training.max_steps or math.ceil(steps_per_epoch * training.num_train_epochs)


def raise_rates(optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], ratio: float) -> None:
    """Give some weights of a fresh optimizer groups of their own, with a multiple of the learning rate.

    Args:
        optimizer: has made no step.
        weights: those with the higher rate.
        ratio: of their rate to that of their group.
    """
    chosen = {id(weight) for weight in weights}
    for group in list(optimizer.param_groups):
        raised = [weight for weight in group["params"] if id(weight) in chosen]
        if not raised:
            continue
        group["params"] = [weight for weight in group["params"] if id(weight) not in chosen]
        optimizer.add_param_group({**group, "params": raised, "lr": group["lr"] * ratio})


@contextmanager
def expecting_other_intervals() -> Iterator[None]:
    """Keep Trainer from warning that the intervals in a checkpoint are not those of now: ours act."""
    logger = logging.getLogger("transformers.trainer_utils")
    logger.addFilter(_is_no_interval_warning)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_interval_warning)


def _is_no_interval_warning(record: logging.LogRecord) -> bool:
    return "do not match the ones in the `trainer_state.json`" not in record.getMessage()
