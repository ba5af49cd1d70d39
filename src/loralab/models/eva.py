"""EVA's directions and ranks, from activations of the base on training rows.

Owns the bounds around PEFT's computation and the configuration that its ranks need.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig, get_eva_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from loralab.errors import ConfigError, ModelError, excerpt

Batches = Sequence[Mapping[str, Tensor]]
# PEFT goes round until directions stand still; data without structure never do.
_FIRST_PASSES, _PASSES_PER_BATCH = 100, 10


class _NotSettled(Exception):
    """The directions still turn when all passes are done."""


def find_directions(base: PreTrainedModel, config: Any, batches: Batches) -> dict[str, Tensor]:
    """Return the leading directions of the inputs of each target layer; a layer may get none (0, in).

    Args:
        base: the frozen base.
        config: PEFT's for LoRA, with `eva_config`.
        batches: padded `input_ids`, `attention_mask` and `position_ids` (R, L) each.

    Raises:
        ConfigError: too few tokens for the rank.
        ModelError: PEFT cannot follow this model's activations.
    """
    rho = config.eva_config.rho
    components = round(config.r * rho)
    enough = [batch for batch in batches if int(batch["attention_mask"].sum()) >= components]
    if not enough:
        most = max((int(batch["attention_mask"].sum()) for batch in batches), default=0)
        raise ConfigError(
            f"r {config.r} times eva_rho {rho:g} is {components} directions, from rows of {most} tokens in all",
            where="keys lora.r, lora.eva_rho, lora.eva_rows",
            fix="lower lora.r or lora.eva_rho, or raise lora.eva_rows",
        )
    passes = _FIRST_PASSES + _PASSES_PER_BATCH * len(enough)
    body: Any = base.base_model
    done = 0

    def forward(_: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        nonlocal done
        if done == passes:
            raise _NotSettled
        done += 1
        body(**inputs, use_cache=False)

    try:
        with torch.no_grad():
            found: dict[str, Tensor] = get_eva_state_dict(
                base,
                enough,
                peft_config=config,
                forward_fn=forward,
                show_progress_bar=False,
                gather_distributed_inputs=False,
            )
    except _NotSettled:
        raise ConfigError(
            f"the directions of the activations did not settle in {passes} passes",
            where="keys lora.variant, lora.r, lora.eva_rho",
            fix="lower lora.r or set lora.eva_rho: 1, raise lora.eva_rows, or set lora.variant: lora",
        ) from None
    except (ValueError, RuntimeError, IndexError, KeyError, TypeError) as error:
        raise ModelError(
            f"EVA cannot follow the activations of {type(base).__name__}: {excerpt(error)}",
            where="key lora.variant",
            fix="set lora.variant: lora",
        ) from error
    return found


def with_ranks(config: Any, directions: Mapping[str, Tensor]) -> PeftConfig:
    """Return the configuration of a plain LoRA adapter with one rank per layer; alpha / rank stays the same.

    Args:
        config: PEFT's for LoRA; it is changed.
        directions: of `find_directions`.
    """
    adapted: PeftConfig = config
    ranks = {name: len(each) for name, each in directions.items() if len(each)}
    config.target_modules = list(ranks)
    config.layers_to_transform = config.layers_pattern = None  # the names are whole
    config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {name: config.lora_alpha * rank / config.r for name, rank in config.rank_pattern.items()}
    config.init_lora_weights, config.eva_config = True, None
    return adapted
