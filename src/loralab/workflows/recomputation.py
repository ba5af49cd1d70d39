"""Whether a run recomputes activations in the backward sweep.

Owns the choice behind `training.gradient_checkpointing: auto`, which `plan` and `train` share, and what follows
from it for the model. Losses and gradients are the same either way.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from transformers.configuration_utils import PreTrainedConfig

from loralab.config.schema import Config, LoraConfig
from loralab.config.training_schema import TrainingConfig
from loralab.data.tokens.store import TokenStore
from loralab.layout.planner import Layout
from loralab.models.blueprint import Blueprint, describe_weights
from loralab.models.memory import TokenMemory, activation_bytes, micro_batch_bytes, pair_bytes, usable_bytes
from loralab.models.precision import Resolved
from loralab.training.distributed import ALONE, Processes
from loralab.workflows.step_layout import expect_layout, sketch_blueprint
from loralab.workflows.step_memory import StepMeter, optimizer_bytes, trained_shapes

# Smaller micro-batches may be slower than recomputation, which costs about a third more time: below about this many
# tokens reading the weights, and starting kernels on a GPU, takes longer than the products do. On a CPU with bf16
# instructions 256 tokens were as quick as any number; on GPUs it was not measured.
_EFFICIENT_TOKENS = {"cuda": 2_048, "cpu": 256, "mps": 512}


@dataclass(frozen=True, slots=True)
class Recomputation:
    """What a run goes on with.

    Attributes:
        config: the configuration, with the choice in the place of auto.
        blueprint: the model without numbers under it, or why there is none.
        choice: whether activations are recomputed.
        counted: what tokens of that blueprint take, by layout, as far as it was counted.
    """

    config: Config
    blueprint: Blueprint | str
    choice: Resolved[bool]
    counted: Mapping[Layout, TokenMemory]


def settle_recomputation(
    config: Config,
    lora: LoraConfig,
    blueprint: Blueprint | str,
    *,
    base: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    rows: TokenStore,
    free: int,
    processes: Processes = ALONE,
    recorded: bool | None = None,
) -> Recomputation:
    """Choose whether activations are recomputed, for all processes alike.

    Args:
        config: the configuration.
        lora: its adapter section, tokens by id.
        blueprint: the model without numbers, activations kept where the setting is auto; or why there is none.
        base: configuration of the base model.
        dtype: compute type.
        device: where the run computes.
        rows: the training split.
        free: bytes that are free once the base is there.
        processes: those that share the run.
        recorded: what the run that goes on took so far, or None.
    """
    counted: dict[Layout, TokenMemory] = {}
    choice = _without_counting(config.training, recorded)
    if choice is None:
        kept = _count_kept(config, blueprint, counted, longest=int(rows.lengths().max()))
        if isinstance(blueprint, Blueprint):
            moments = optimizer_bytes(config.training.optim, trained_shapes(blueprint))
            free = max(free - describe_weights(blueprint.model)["trainable_bytes"] - moments, 0)
        choice = resolve_checkpointing(
            config.training,
            kept,
            base=base,
            dtype=dtype,
            device=device,
            rows=rows,
            free=free,
            sharing=processes.local_count,
        )
    if processes.largest(int(choice.value)) > choice.value:
        choice = Resolved(True, "another process of the run has no room for its activations")
    training = config.training.model_copy(update={"gradient_checkpointing": choice.value})
    config = config.model_copy(update={"training": training})
    if isinstance(blueprint, Blueprint) and blueprint.checkpointing != choice.value:
        blueprint, counted = sketch_blueprint(config, lora, dtype=dtype, device=device), {}
    return Recomputation(config, blueprint, choice, counted)


def _without_counting(training: TrainingConfig, recorded: bool | None) -> Resolved[bool] | None:
    """Return the choice where the configuration makes it, or the run that goes on."""
    if isinstance(training.gradient_checkpointing, bool):
        return Resolved(training.gradient_checkpointing, "set in training.gradient_checkpointing")
    if recorded is not None:
        return Resolved(recorded, "as when the run began, which its token budget goes by")
    return None


def _count_kept(
    config: Config, blueprint: Blueprint | str, counted: dict[Layout, TokenMemory], *, longest: int
) -> TokenMemory | str:
    """Return what tokens take whose activations are kept, noted in `counted` too; or why that cannot be told."""
    if isinstance(blueprint, str):
        return blueprint
    layout, _ = expect_layout(blueprint, config)
    found = StepMeter(blueprint, layout.value).count_tokens(longest)
    if not isinstance(found, str):
        counted[layout.value] = found
    return found


def resolve_checkpointing(
    training: TrainingConfig,
    counted: TokenMemory | str,
    *,
    base: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    rows: TokenStore,
    free: int,
    sharing: int = 1,
) -> Resolved[bool]:
    """Choose whether activations are recomputed: only where memory cannot hold those of the micro-batches that matter.

    Args:
        training: the training section, where the choice is left to this.
        counted: what tokens take whose activations are kept, or why that cannot be told; a rule of thumb stands in.
        base: configuration of the base model.
        dtype: compute type.
        device: where the run computes.
        rows: the training split.
        free: bytes that are free once the model is there.
        sharing: processes that share a CPU's memory.
    """
    tokens, what = _tokens_that_matter(training, rows, device.type)
    thumb = ""
    if isinstance(counted, str):
        thumb = f", by a rule of thumb, since {counted}"
        counted = TokenMemory(activation_bytes(base, dtype=dtype, checkpointing=False), 0.0)
    needed = micro_batch_bytes(tokens, counted, per_pair=pair_bytes(base, dtype=dtype))
    usable = usable_bytes(device, free=free, sharing=sharing)
    figures = f"{what} takes about {needed / 2**30:.2f} GiB without recomputation, {usable / 2**30:.2f} GiB may be used"
    return Resolved(needed > usable, figures + thumb)


def _tokens_that_matter(training: TrainingConfig, rows: TokenStore, device_type: str) -> tuple[int, str]:
    """Return the tokens of the largest micro-batch that a run must or should have, and what it is, in words."""
    longest = int(rows.lengths().max())
    count = min(training.per_device_train_batch_size * training.gradient_accumulation_steps, len(rows))
    fullest = int(np.partition(rows.tokens_alone(), -count)[-count:].sum())
    if isinstance(training.token_budget, int):
        least, name = training.token_budget, "training.token_budget"
    else:
        least, name = _EFFICIENT_TOKENS.get(device_type, 512), "a micro-batch that the device is quick with"
    tokens = min(least, fullest)
    if longest >= tokens:
        return longest, f"the longest row, {longest:,} tokens,"
    return tokens, f"{name}, {tokens:,} tokens," if tokens == least else f"a step of {tokens:,} tokens"
