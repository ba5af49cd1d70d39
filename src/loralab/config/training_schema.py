"""The section `training` of the configuration: the optimizer's steps."""

from typing import Annotated, Literal

from pydantic import Field

from loralab.config.section import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class EarlyStopping(Section):
    """When to stop before the last step."""

    metric: str = Field(
        "eval_loss",
        description="What must improve: loss (mean of the logged window), eval_loss, perplexity, or a figure of "
        "evaluation.metrics, such as yes_no_macro_f1.",
    )
    mode: Literal["auto", "min", "max"] = Field(
        "auto", description="Which direction is better; auto knows it of every metric but a function of your own."
    )
    patience: PositiveInt = Field(3, description="Logged windows or evaluations without improvement before stopping.")
    min_delta: NonNegativeFloat = Field(0.0, description="Smallest change that counts as an improvement.")


class TrainingConfig(Section):
    """The optimizer's steps: B x K x D rows each."""

    num_train_epochs: PositiveFloat = Field(3.0, description="Passes over the training rows.")
    max_steps: PositiveInt | None = Field(None, description="Optimizer steps; overrides num_train_epochs when set.")
    per_device_train_batch_size: PositiveInt = Field(8, description="Rows per device and micro-step (B).")
    gradient_accumulation_steps: PositiveInt = Field(1, description="Micro-steps per optimizer step (K).")
    sampling: Literal["random", "grouped"] = Field(
        "random",
        description="Order of rows: random, or grouped so that rows with a long common prefix meet in a step.",
    )
    layout: Literal["auto", "shared", "packed", "padded"] = Field(
        "auto",
        description="How the rows of a step lie in memory: shared (common prefixes once), packed or padded; losses and "
        "gradients are the same, auto takes shared where the model can.",
    )
    distributed: Literal["ddp", "fsdp2", "zero2", "zero3"] = Field(
        "ddp",
        description="How several processes share a run: ddp (each holds the whole base), fsdp2 (each holds a part "
        "of every frozen decoder layer, for a base larger than one GPU), or DeepSpeed's zero2 (the adapter's gradients "
        "and moments in parts) and zero3 (the base in parts).",
    )
    token_budget: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="Most tokens that go through the model at once; auto goes by free memory. A step is cut "
        "accordingly, its loss is the same.",
    )
    learning_rate: PositiveFloat = Field(2e-4, description="Peak learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = (
        Field("linear", description="Learning-rate schedule after warm-up.")
    )
    warmup_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="Share of the steps in which the learning rate rises from 0."
    )
    warmup_steps: NonNegativeInt = Field(0, description="Steps of warm-up; an alternative to warmup_ratio.")
    weight_decay: NonNegativeFloat = Field(0.0, description="Decoupled weight decay of the adapter weights.")
    max_grad_norm: NonNegativeFloat = Field(
        1.0, description="Gradients are scaled down to this norm, after normalisation; 0 never clips."
    )
    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "sgd",
        "adafactor",
        "adamw_8bit",
        "adamw_bnb_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
    ] = Field(
        "adamw_torch_fused",
        description="Optimizer, by its transformers name; those with 8bit hold their moments in 8 bits, paged ones "
        "move theirs to main memory when a GPU's runs out.",
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description="Recompute activations in the backward pass: less memory, about a third more time, same gradients; "
        "auto does it where free memory cannot hold them.",
    )
    cache_frozen_trunk: Literal["auto", "off"] = Field(
        "auto",
        description="Where only upper layers have an adapter: keep on disk what the layers below give for each row, "
        "and start behind them; auto does it where rows come again and there is room, loss and gradients are the same.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        42, description="Seed of adapter weights, order of rows and dropout."
    )
    logging_steps: PositiveInt = Field(10, description="Steps between two lines of metrics.jsonl.")
    save_strategy: Literal["epoch", "steps", "no"] = Field(
        "epoch", description="When a checkpoint is written, besides at the last step and on SIGINT and SIGTERM."
    )
    save_steps: PositiveInt = Field(500, description="Steps between two checkpoints when save_strategy is steps.")
    save_total_limit: PositiveInt | None = Field(
        2, description="Checkpoints kept, the newest and the best; null keeps all."
    )
    load_best_model_at_end: bool = Field(
        False, description="End with the adapter of the best evaluation, not of the last step."
    )
    metric_for_best_model: str | None = Field(
        None,
        description="What the best evaluation is told by, named as in early_stopping.metric; null takes that one, else "
        "eval_loss.",
    )
    early_stopping: EarlyStopping | None = Field(None, description="Stop early when a metric no longer improves.")
