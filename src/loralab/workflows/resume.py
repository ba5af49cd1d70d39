"""Where a resumed run goes on, and what must be unchanged for that.

Owns the contract of a resume: everything that changes the maths of a run, part by part, and the
words in which a change is refused.
"""

import re
import shutil
from collections.abc import Mapping
from typing import Any

import torch

from loralab.config.metric_checks import watched_metric
from loralab.config.metric_facts import ALWAYS, owner_of
from loralab.config.schema import Config
from loralab.data.dataset import PreparedData
from loralab.errors import RunFolderError
from loralab.models.dropout import MASKS
from loralab.models.precision import Resolved
from loralab.progress import Reporter
from loralab.run import RunFolder
from loralab.training.checkpoint import (
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
)

# Settings that decide on what is written or how memory is used, not on the adapter.
_FREE = {"logging_steps", "save_strategy", "save_steps", "save_total_limit", "gradient_checkpointing"}
_TOKENS = "data.tokens of "
# What shows in the tokens, where it matters at all.
_HARMLESS_ALONE = {f"data.{name}" for name in ("rows", "format", "columns", "on_bad_row", "truncation", "long_text")}
# What never changes by itself: listed only where no cause is known.
_CONSEQUENCES = ("data.special_tokens", "data.stop_token_ids", _TOKENS)
# What follows from another setting, and is listed only where that is the same.
_FOLLOWS = {"resolved attention": "model.precision"}
# Automatic choices that decide on the last bits.
_DECISIVE = ("layout", "attention", "activation", "normalization", "lora_forward")
# Raised whenever the same run on the same device would differ in its last bits: blocks of attention, head chunks.
_ARITHMETIC = 2
_HASH = re.compile(r"[0-9a-f]{64}")


def resume_contract(
    config: Config,
    *,
    data: PreparedData,
    choices: Mapping[str, Resolved[Any]],
    device: torch.device,
    model: Mapping[str, Any],
) -> dict[str, Any]:
    """Return everything that changes the maths of a run; a resume must find it unchanged.

    A part is its value, or a mapping of `is` (what is compared) and `shown` (what a message says).
    """
    training = config.training
    held = str(choices["quantization"].value) if "quantization" in choices else "none"
    return {
        **{f"data.{name}": value for name, value in data.identity.items()},
        "data.template": {"is": data.identity["template"], "shown": data.template.name},
        "model weights": model["sha256"] or f"{model['name']}@{model['revision']}",
        "model.precision": str(choices["precision"].value).removeprefix("torch."),
        **({} if held == "none" else {"model.quantization": held}),
        "model.attn_implementation": str(choices["attn_implementation"].value),
        "model.device": device.type,
        # How steps are laid out changes no maths, but the order of sums: bit-equal or refused.
        **{f"resolved {name}": str(choices[name].value) for name in _DECISIVE if name in choices},
        "order of sums": _ARITHMETIC,
        **({"lora.dropout masks": MASKS} if config.lora.dropout else {}),
        "model.base_dropout": str(choices["base_dropout"].value),
        **{f"lora.{key}": value for key, value in config.lora.model_dump(mode="json").items()},
        **{f"training.{k}": v for k, v in training.model_dump(mode="json").items() if k not in _FREE},
        "advanced.trainer_args": dict(config.advanced.trainer_args),
        **_watched_contract(config),
    }


def _watched_contract(config: Config) -> dict[str, Any]:
    """Return what decides when and how a figure is measured that decides on the adapter."""
    training, evaluation, figure = config.training, config.evaluation, watched_metric(config.training)
    if training.early_stopping is None and not training.load_best_model_at_end:
        return {}
    if figure == "loss":
        return {"training.logging_steps": training.logging_steps}
    found: dict[str, Any] = {"evaluation.strategy": evaluation.strategy, "evaluation.steps": evaluation.steps}
    if figure in ALWAYS or owner_of(figure) in ("token_accuracy", "token_entropy"):
        return found
    chosen = evaluation.model_dump(mode="json", include={"metrics", "answer_by", "labels", "metric_rows"})
    return (
        found
        | {f"evaluation.{key}": value for key, value in chosen.items()}
        | {"evaluation.max_new_tokens": evaluation.max_new_tokens}
    )


def check_contract(checkpoint: Checkpoint, contract: Mapping[str, Any]) -> None:
    """Check that a resume would go on with the same run.

    Raises:
        RunFolderError: something that changes the maths is different; each is named with both values.
    """
    changes = contract_changes(checkpoint.contract, contract)
    if changes:
        raise RunFolderError(
            f"cannot resume, the run has changed: {'; '.join(changes)}",
            where=str(checkpoint.path),
            fix="restore these, start a new run in another output.dir, or begin one from these weights: --warm-start",
        )


def contract_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], *, words: tuple[str, str] = (" was ", ", now ")
) -> list[str]:
    """Return what differs between two contracts, causes without their consequences, each with both values.

    Args:
        before: a contract.
        now: another one.
        words: what stands before the value in each.
    """
    differing = [key for key in sorted({*before, *now}) if _decisive(before.get(key)) != _decisive(now.get(key))]
    if not any(key.startswith(_TOKENS) for key in differing):
        differing = [key for key in differing if key not in _HARMLESS_ALONE]
    causes = [key for key in differing if not key.startswith(_CONSEQUENCES)]
    if any(key.startswith("data.") for key in causes):
        differing = causes
    differing = [key for key in differing if _FOLLOWS.get(key) not in differing]
    return [f"{key}{words[0]}{_shown(before, key, now)}{words[1]}{_shown(now, key, before)}" for key in differing]


def _decisive(part: Any) -> Any:
    return part["is"] if isinstance(part, Mapping) and "is" in part else part


def _shown(contract: Mapping[str, Any], key: str, other: Mapping[str, Any]) -> str:
    part = contract.get(key)
    if isinstance(part, Mapping) and "shown" in part:
        same = other.get(key)
        named_alike = isinstance(same, Mapping) and same.get("shown") == part["shown"]
        return f"{part['shown']!r} ({_short(part['is'])})" if named_alike else repr(part["shown"])
    return _short(part)


def _short(value: Any) -> str:
    return f"sha256 {value[:12]}.." if isinstance(value, str) and _HASH.fullmatch(value) else repr(value)


def find_start(folder: RunFolder, contract: Mapping[str, Any], *, reporter: Reporter) -> Checkpoint | None:
    """Return the checkpoint that a resumed run goes on from, or None where there is none.

    Damaged checkpoints are removed: they would count in the rotation.

    Raises:
        RunFolderError: the run has changed since.
    """
    checkpoint = find_checkpoint(folder.checkpoints)
    if checkpoint is not None:
        check_contract(checkpoint, contract)
    for path in list_checkpoints(folder.checkpoints):
        if read_checkpoint(path) is None:
            shutil.rmtree(path, ignore_errors=True)
    if checkpoint is None:
        reporter.say("no checkpoint was written before: starting from step 0")
        return None
    reporter.say(f"resuming from step {checkpoint.step}")
    return checkpoint
