"""How the rows of a step lie in memory: chosen once per run, by what model and machine can do.

Owns the choice of layout, attention kernel, token budget and sampling, each with its reason.
None of them changes the maths of a step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch

from loralab.config.schema import Config, LoraConfig, ModelConfig
from loralab.data.example import TokenizedExample
from loralab.errors import ConfigError, LoralabError
from loralab.layout.grouping import find_prefix_groups, groups_per_step
from loralab.layout.planner import Layout, Planner, SharingCost
from loralab.models.blueprint import Blueprint, Untraceable, draw_blueprint, expect_tree_kernel
from loralab.models.device_map import tightest_free_bytes
from loralab.models.families import check_positions, find_positions
from loralab.models.memory import TokenMemory, resolve_token_budget
from loralab.models.picture_features import trains_vision
from loralab.models.precision import Resolved
from loralab.models.self_check import find_training_noise, resolve_tree_kernel
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.vision import vision_family
from loralab.models.vision_memory import tower_memory
from loralab.training.distributed import ALONE, Processes
from loralab.training.sampler import Share, StepSampler
from loralab.workflows.step_memory import StepMeter


def build_blueprint(config: Config, lora: LoraConfig, *, dtype: torch.dtype, device: torch.device) -> Blueprint:
    """Build a run's model without numbers; see `draw_blueprint`.

    Args:
        config: the configuration; where `gradient_checkpointing` is still auto, activations are kept.
        lora: its adapter section, tokens by id.
        dtype: compute type.
        device: where the run computes.
    """
    return draw_blueprint(
        config.model,
        lora,
        dtype=dtype,
        device=device,
        checkpointing=config.training.gradient_checkpointing is True,
        seed=config.training.seed,
    )


def sketch_blueprint(config: Config, lora: LoraConfig, *, dtype: torch.dtype, device: torch.device) -> Blueprint | str:
    """Return a run's model without numbers, or why there is none: a run goes on without it.

    Args:
        config: the configuration.
        lora: its adapter section, tokens by id.
        dtype: compute type.
        device: where the run computes.
    """
    try:
        return build_blueprint(config, lora, dtype=dtype, device=device)
    except LoralabError as error:  # loading says it too, in its own place
        return error.problems[0].what
    except Untraceable as error:
        return str(error)


def resolve_planner(
    model: SupervisedPeftModel,
    config: Config,
    *,
    max_length: int,
    device: torch.device,
    sharing: int = 1,
    blueprint: Blueprint | str = "not drawn",
    known: Mapping[Layout, TokenMemory] = MappingProxyType({}),
) -> tuple[Planner, dict[str, Resolved[Any]]]:
    """Choose how steps are laid out, and let the model's attention follow.

    Args:
        model: base with adapter, on its device; its `tree_kernel` is set.
        config: the configuration.
        max_length: longest example, in tokens.
        device: where the model is.
        sharing: processes of this run on this machine.
        blueprint: what counts the memory of a token, or why there is none; the rule of thumb stands in then.
        known: what was counted before on that blueprint, by layout.

    Returns:
        The planner, and the choices with their reasons.

    Raises:
        ConfigError: a layout that was asked for and the model cannot take.
        ModelError: rows so long that the model's positions would depend on other rows.
    """
    check_positions(model.language_model.config, max_length)
    kernel = _resolve_kernel(model, config.model, config.training.layout)
    model.tree_kernel = kernel.value
    layout = resolve_layout(config.training.layout, kernel)
    counted = count_token_memory(config, blueprint, layout.value, known)
    planner, budget = build_planner(
        model,
        config,
        layout=layout.value,
        device=device,
        sharing=sharing,
        counted=counted,
        free=tightest_free_bytes(model, device),
    )
    shown = Resolved(kernel.value or model.stock_attention, kernel.reason)
    noise = find_training_noise(model)
    if noise is not None:
        layout = Resolved(layout.value, f"{layout.reason}; but {noise}")
    return planner, {"layout": layout, "attention": shown, "token_budget": budget}


def expect_planner(
    blueprint: Blueprint,
    config: Config,
    *,
    free: int,
    sharing: int = 1,
    known: Mapping[Layout, TokenMemory] = MappingProxyType({}),
) -> tuple[Planner, dict[str, Resolved[Any]]]:
    """Choose how steps are laid out as far as that can be told without weights; see `resolve_planner`.

    Args:
        blueprint: the model without numbers.
        config: the configuration.
        free: bytes that are free once the model is there.
        sharing: processes of this run on this machine.
        known: what was counted before on that blueprint, by layout.
    """
    model = blueprint.model
    check_positions(model.language_model.config, config.data.max_length)
    layout, kernel = expect_layout(blueprint, config)
    counted = count_token_memory(config, blueprint, layout.value, known)
    planner, budget = build_planner(
        model, config, layout=layout.value, device=blueprint.device, sharing=sharing, counted=counted, free=free
    )
    shown = Resolved(kernel.value or model.stock_attention, kernel.reason)
    return planner, {"layout": layout, "attention": shown, "token_budget": budget}


def expect_layout(blueprint: Blueprint, config: Config) -> tuple[Resolved[Layout], Resolved[str | None]]:
    """Choose how rows lie and what computes attention over trees, as far as that can be told without weights.

    Args:
        blueprint: the model without numbers.
        config: the configuration.

    Raises:
        ConfigError: a layout that was asked for and the model cannot take.
    """
    kernel = _kernel_by_settings(config.model, config.training.layout) or expect_tree_kernel(blueprint)
    return resolve_layout(config.training.layout, kernel), kernel


def count_token_memory(
    config: Config, blueprint: Blueprint | str, layout: Layout, known: Mapping[Layout, TokenMemory]
) -> TokenMemory | None:
    """Return what a micro-batch takes by its tokens where `token_budget` goes by it, and where it can be counted.

    Args:
        config: the configuration.
        blueprint: the model without numbers, or why there is none.
        layout: how rows lie.
        known: what was counted before on that blueprint.
    """
    if isinstance(blueprint, str) or isinstance(config.training.token_budget, int):
        return None
    if layout in known:
        return known[layout]
    counted = StepMeter(blueprint, layout).count_tokens(config.data.max_length)
    return None if isinstance(counted, str) else _with_tower(counted, blueprint)


def _with_tower(counted: TokenMemory, blueprint: Blueprint) -> TokenMemory:
    """Return what a token takes where it may be a picture's, which is the most that any takes."""
    base = blueprint.model.language_model
    if vision_family(base.config) is None:
        return counted
    dtype, trained = blueprint.model.embedding.weight.dtype, trains_vision(base)
    tower = tower_memory(base.config, dtype=dtype, trained=trained, checkpointing=blueprint.checkpointing)
    return replace(counted, per_token=counted.per_token + tower.per_token)


def build_planner(
    model: SupervisedPeftModel,
    config: Config,
    *,
    layout: Layout,
    device: torch.device,
    sharing: int,
    counted: TokenMemory | None,
    free: int | None = None,
) -> tuple[Planner, Resolved[int]]:
    """Return the planner and its token budget.

    Args:
        model: base with adapter.
        config: the configuration.
        layout: how rows lie.
        device: where the run computes.
        sharing: processes of this run on this machine.
        counted: what a micro-batch takes, or None for the rule of thumb.
        free: bytes that are free once the model is there; None for what is free now.
    """
    base = model.language_model
    budget = resolve_token_budget(
        config.training.token_budget,
        config=base.config,
        dtype=model.embedding.weight.dtype,
        device=device,
        checkpointing=config.training.gradient_checkpointing is True,
        sharing=sharing,
        counted=counted,
        free=free,
    )
    planner = Planner(
        token_budget=budget.value,
        layout=layout,
        cost=SharingCost(tokens_per_pair=_pair_cost(model)),
        position_threshold=find_positions(base.config).threshold,
    )
    return planner, budget


def _resolve_kernel(model: SupervisedPeftModel, section: ModelConfig, layout: str) -> Resolved[str | None]:
    return _kernel_by_settings(section, layout) or resolve_tree_kernel(model)


def _kernel_by_settings(section: ModelConfig, layout: str) -> Resolved[str | None] | None:
    """Return the answer where settings alone give it."""
    if layout == "padded":
        return Resolved(None, "training.layout is padded")
    if section.attn_implementation != "auto":
        return Resolved(None, f"model.attn_implementation is set to {section.attn_implementation}")
    return None


def resolve_layout(setting: str, kernel: Resolved[str | None]) -> Resolved[Layout]:
    """Choose how rows lie.

    Args:
        setting: `training.layout`.
        kernel: what computes attention over trees, or None.

    Raises:
        ConfigError: a layout that was asked for and the model cannot take.
    """
    if setting == "padded":
        return Resolved("padded", "set in training.layout")
    if kernel.value is None and setting != "auto":
        raise ConfigError(
            f"this model cannot take the layout {setting!r}: {kernel.reason}",
            where="key training.layout",
            fix="set training.layout: auto; losses and gradients are the same",
        )
    if kernel.value is None:
        return Resolved("padded", kernel.reason)
    if setting == "packed":
        return Resolved("packed", "set in training.layout")
    return Resolved("shared", "shared prefixes are computed once; losses and gradients are the same")


def _pair_cost(model: SupervisedPeftModel) -> float:
    """Return the cost of one query-key pair in tokens through the linear layers.

    A pair costs two products of the hidden size in each layer, a token two per weight; what the
    backward sweep adds to both is about the same share.
    """
    text = model.language_model.config.get_text_config()
    hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
    weights = sum(p.numel() for p in model.language_model.parameters()) - model.embedding.weight.numel()
    return 2 * hidden * layers / max(weights, 1)


def build_sampler(
    config: Config,
    examples: Sequence[TokenizedExample],
    *,
    shares: Sequence[Share] | None = None,
    processes: Processes = ALONE,
) -> tuple[StepSampler, dict[str, Any]]:
    """Build what chooses the rows of each step.

    Args:
        config: the configuration.
        examples: the training split.
        shares: rows of each source and passes over them in one epoch, or None for one pass over all.
        processes: those that share each step.

    Returns:
        The sampler, and what the record of the run says of it.
    """
    training = config.training
    rows_per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * processes.count
    groups = find_prefix_groups(examples, largest=rows_per_step) if training.sampling == "grouped" else None
    sampler = StepSampler(
        rows=len(examples),
        rows_per_step=rows_per_step,
        seed=training.seed,
        groups=groups,
        shares=shares,
        rank=processes.rank,
        world_size=processes.count,
    )
    facts: dict[str, Any] = {"value": training.sampling, "rows_per_step": sampler.rows_per_step}
    if shares is not None:
        facts["rows_per_epoch"] = sampler.rows_per_epoch
    if groups is not None:
        facts |= {
            "groups": len(groups),
            "largest_group": max(map(len, groups)),
            "distinct_groups_per_step": round(groups_per_step(groups, sampler.steps()), 3),
        }
    return sampler, facts
