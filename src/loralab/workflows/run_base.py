"""The base of a training run: loaded, grown for new tokens, checked against the rows, activations settled.

Owns the order of that; nothing of it knows the adapter's weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from loralab.config.schema import Config, LoraConfig
from loralab.data.dataset import PreparedData
from loralab.models.blueprint import Blueprint
from loralab.models.device_map import tightest_free_bytes
from loralab.models.layer_stack import enable_recomputation
from loralab.models.load import check_vocabulary, count_parameters, load_base_model
from loralab.models.new_tokens import grow_vocabulary
from loralab.models.placement import describe_placement
from loralab.models.precision import Resolved
from loralab.models.trainable_tokens import new_tokens_of
from loralab.models.variants import residual_rank
from loralab.training.distributed import Processes
from loralab.training.sharding import loading_device
from loralab.workflows.base_share import held_base
from loralab.workflows.recomputation import Recomputation, settle_recomputation
from loralab.workflows.step_layout import sketch_blueprint


@dataclass(frozen=True, slots=True)
class RunBase:
    """A base that is ready for its adapter.

    Attributes:
        recomputation: whether activations are recomputed; configuration and blueprint under that.
        model: the base.
        own_parameters: of the base as it is stored.
        choices: what was chosen, with reasons.
    """

    recomputation: Recomputation
    model: PreTrainedModel
    own_parameters: int
    choices: dict[str, Resolved[Any]]


def load_run_base(
    config: Config,
    lora: LoraConfig,
    data: PreparedData,
    *,
    dtype: torch.dtype,
    device: torch.device,
    processes: Processes,
    keeps_residual: bool,
    recomputes: bool | None,
) -> RunBase:
    """Load the base of a run.

    Args:
        config: the configuration.
        lora: its adapter section, tokens by id.
        data: what the run trains on.
        dtype: compute type.
        device: where the run computes.
        processes: those that share the run.
        keeps_residual: whether first weights are computed from what quantization changes.
        recomputes: whether the run that goes on recomputed activations so far, or None.

    Raises:
        UserError: the base cannot be loaded, or is not that of the rows.
    """
    blueprint = sketch_blueprint(config, lora, dtype=dtype, device=device)
    kept = residual_rank(config.lora) if keeps_residual else None
    where = loading_device(device, processes)
    base, choices = load_base_model(config.model, dtype=dtype, device=where, residual_rank=kept)
    grown = grow_vocabulary(base, new_tokens_of(lora))
    own_parameters, _ = count_parameters(base)
    largest = max(*(split.largest_id for split in data.splits.values()), *data.prompter.stop.ids)
    check_vocabulary(base, largest)
    free = tightest_free_bytes(base, device)
    if where != device and isinstance(blueprint, Blueprint):  # its part is still to come there
        free = max(free - held_base(config, blueprint, processes).own, 0)
    recomputation = settle_recomputation(
        config,
        lora,
        blueprint,
        base=base.config,
        dtype=dtype,
        device=device,
        rows=data.splits["train"],
        free=free,
        processes=processes,
        recorded=recomputes,
    )
    if recomputation.choice.value:
        enable_recomputation(base)
    chosen: dict[str, Resolved[Any]] = {**grown, **choices, **describe_placement(config.lora, lora, base)}
    chosen["gradient_checkpointing"] = recomputation.choice
    return RunBase(recomputation, base, own_parameters, chosen)
