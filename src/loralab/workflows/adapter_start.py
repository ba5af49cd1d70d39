"""What an adapter starts from: saved weights of its own run, or training rows.

Owns which checkpoint takes the place of first weights, which rows variant eva looks at, which
variants can begin from another adapter, and which new tokens the data does not hold.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from loralab.config.schema import Config
from loralab.data.dataset import PreparedData
from loralab.errors import ConfigError
from loralab.layout.planner import Planner
from loralab.models.new_tokens import NewToken
from loralab.models.variants import VARIANTS, needs_activations
from loralab.progress import Reporter
from loralab.run import RunFolder
from loralab.training.checkpoint import find_checkpoint

# Tokens that go through the base at once while eva looks at rows; no gradients, so it is no matter of memory.
_TOKENS_AT_ONCE = 2048
# Tokens of the data that are looked through at once.
_BLOCK_TOKENS = 1 << 22


def find_saved_start(config: Config, folder: RunFolder) -> Path | None:
    """Return the checkpoint whose weights come next, for variants that compute first weights; None without one."""
    if VARIANTS[config.lora.variant].start is None:
        return None
    checkpoint = find_checkpoint(folder.checkpoints)
    return checkpoint.path if checkpoint is not None else None


def activation_batches(config: Config, data: PreparedData) -> list[Mapping[str, Tensor]]:
    """Return the rows that variant eva looks at, drawn by `training.seed`, padded; nothing for other variants."""
    if not needs_activations(config.lora):
        return []
    rows = data.splits["train"]
    if rows.has_images:
        raise ConfigError(
            "variant eva computes its first weights from activations of text, and these rows have pictures",
            where="key lora.variant",
            fix="choose another variant, such as lora or rslora",
        )
    draw = np.random.default_rng(config.training.seed)
    chosen = draw.permutation(len(rows))[: config.lora.eva_rows]
    step = Planner(max(_TOKENS_AT_ONCE, config.data.max_length), layout="padded")([rows[int(i)] for i in chosen])
    return [
        {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "position_ids": batch.position_ids[0],
        }
        for batch in step.micro_batches
    ]


def warn_of_absent_tokens(tokens: Sequence[NewToken], data: PreparedData, reporter: Reporter) -> None:
    """Say which new tokens stand nowhere in the data, as one that is misspelled."""
    left = {token.id: token.text for token in tokens}
    stored = data.splits["train"].tokens
    for start in range(0, len(stored), _BLOCK_TOKENS):
        if not left:
            return
        block = stored[start : start + _BLOCK_TOKENS]
        for number in np.unique(block[block >= min(left)]).tolist():
            left.pop(number, None)
    for text in left.values():
        reporter.say(f"warning: the new token {text!r} stands nowhere in the data: nothing teaches it")


def check_warm_start(config: Config) -> None:
    """Check that a run may begin from the weights of another adapter.

    Raises:
        ConfigError: first weights of its own are what makes its variant.
    """
    variant = config.lora.variant
    if VARIANTS[variant].is_a_start:
        raise ConfigError(
            f"--warm-start with variant {variant}, which is a choice of first weights",
            where="option --warm-start, key lora.variant",
            fix="set lora.variant: lora and the lora.r and lora.alpha of that adapter's adapter_config.json "
            "(a saved pissa or olora adapter is a plain LoRA of twice the r and alpha)",
        )
