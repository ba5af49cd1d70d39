"""What a merge refuses before anything is written.

Owns the checks of place, disk, adapters and base, and their words.
"""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftType

from loralab.config.schema import Config
from loralab.data.prompts.contract import CONTRACT_FILE
from loralab.errors import AdapterIntegrityError, ConfigError, ModelError, StorageError
from loralab.models.adapters import adapter_sha256
from loralab.models.load import model_sha256
from loralab.models.merge_source import checkpoint_folder, snapshot_revision
from loralab.models.merging import Part
from loralab.run import Json, read_json
from loralab.workflows.first_look import DTYPE_NAMES
from loralab.workflows.session import Target, base_misfit, known_base

MERGE_FILE = "merge.json"
DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES}
# Room for tokenizer, card and the like, beside the weights.
_MARGIN = 64 * 2**20
# PEFT's kinds whose updates add up.
_ADDITIVE = {PeftType.LORA, PeftType.LOHA, PeftType.LOKR, PeftType.VERA}
# Kinds that train nothing inside a layer.
_WITHOUT_LAYERS = {PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.PREFIX_TUNING, PeftType.ADAPTION_PROMPT}


def check_weights(targets: Sequence[Target], parts: Sequence[Part], hashes: Sequence[str]) -> list[str]:
    """Check the weights of adapters; return what is to be said of them.

    Args:
        targets: the adapters.
        parts: the same with their weights.
        hashes: of their tensors.

    Raises:
        ConfigError: a weight leaves its adapter out, or is no number.
    """
    for number, part in enumerate(parts):
        if part.weight == 0 or not math.isfinite(part.weight):
            why = "leaves it out" if part.weight == 0 else "is no finite number"
            raise ConfigError(
                f"weight {part.weight:g} of the adapter {str(part.folder)!r} {why}",
                where="option --adapter" if number else "option --weight",
                fix="leave that adapter out, or give it another weight",
            )
    twice = {str(target.adapter): sha256 for target, sha256 in zip(targets, hashes, strict=True)}
    notes = []
    for sha256 in dict.fromkeys(each for each in hashes if hashes.count(each) > 1):
        total = sum(part.weight for part, each in zip(parts, hashes, strict=True) if each == sha256)
        names = ", ".join(name for name, each in twice.items() if each == sha256)
        notes.append(f"one adapter is named {hashes.count(sha256)} times ({names}): its weight is {total:g} in all")
    return notes


def check_room(output: Path, needed: int) -> None:
    """Check that the disk has room for the merged model.

    Args:
        output: where it goes.
        needed: bytes of its weights.

    Raises:
        StorageError: it has not.
    """
    free = shutil.disk_usage(output.absolute().parent).free
    if free < needed + _MARGIN:
        raise StorageError(
            f"the merged model takes {_gigabytes(needed + _MARGIN)}, and {_gigabytes(free)} are free",
            where=f"the disk of {str(output)!r}",
            fix="free space, name a folder on another disk, or take a smaller --dtype",
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def check_adapter(target: Target) -> str:
    """Check that an adapter's tensors are those that were saved, as far as that was recorded; return their hash.

    Raises:
        AdapterIntegrityError: they are not, or cannot be read.
    """
    try:
        now = adapter_sha256(target.adapter)
    except ModelError as error:
        raise AdapterIntegrityError(
            f"the adapter's tensors cannot be read: {error.problems[0].what}",
            where=str(target.adapter),
            fix="restore the adapter folder from a copy, or train again",
        ) from error
    before = known_base(target).adapter_sha256
    if before is not None and before != now:
        raise AdapterIntegrityError(
            f"the adapter's tensors have changed since they were saved: sha256 was {before[:12]}.., is {now[:12]}..",
            where=str(target.adapter),
            fix="restore the adapter folder from a copy, or train again",
        )
    return now


def check_kinds(parts: Sequence[Part]) -> None:
    """Check that adapters can be merged, alone or together.

    Raises:
        ConfigError: they cannot.
    """
    configs = [part.config for part in parts]
    for part, config in zip(parts, configs, strict=True):
        if config.peft_type in _WITHOUT_LAYERS:
            raise ConfigError(
                f"an adapter of kind {_kind(config)} is no change of weights, and cannot be merged",
                where=str(part.folder),
                fix="use it as it is, with PEFT",
            )
        if part.weight != 1 or len(parts) > 1:
            _check_additive(part, config)
    kinds = sorted({_kind(config) for config in configs})
    if len(kinds) > 1:
        raise ConfigError(
            f"adapters of different kinds: {', '.join(kinds)}; PEFT holds one kind at a time, so that there would be "
            "no live model to compare the merged one with",
            where="options --adapter",
            fix="merge them one after the other: the first, then a run on the merged base",
        )


def _kind(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type)).lower()


def _check_additive(part: Part, config: PeftConfig) -> None:
    dora = bool(getattr(config, "use_dora", False))
    more = [key for key in ("modules_to_save", "trainable_token_indices") if getattr(config, key, None)]
    if config.peft_type in _ADDITIVE and not dora and not more:
        return
    why = f"it trains {', '.join(more)}" if more else f"kind {'dora' if dora else _kind(config)} does more than add"
    raise ConfigError(
        f"an adapter that cannot be combined with weights: {why}",
        where=str(part.folder),
        fix="merge it alone with weight 1; kinds that add: lora, rslora, lora_plus, pissa, olora, eva, loftq, vera, "
        "loha, lokr",
    )


def check_base(config: Config, targets: Sequence[Target], hashes: Sequence[str]) -> str | None:
    """Check that a base is the one of all adapters, and has none of them in it; return its hash.

    Args:
        config: names the base.
        targets: the adapters.
        hashes: of their tensors.

    Raises:
        ModelError: it is another one, another revision, or has an adapter merged in already.
    """
    name = config.model.name
    folder = Path(name).expanduser()
    if (folder / MERGE_FILE).is_file():
        held = [str(each.get("sha256")) for each in read_json(folder / MERGE_FILE).get("adapters", [])]
        if any(each in held for each in hashes):
            raise ModelError(
                f"this adapter is in the base {name!r} already: a second merge would apply it twice",
                where=str(folder / MERGE_FILE),
                fix="use that model as it is, or name the base that the adapter was trained on with --model",
            )
    sha256 = model_sha256(name)
    revision = None if folder.is_dir() else snapshot_revision(checkpoint_folder(config.model))
    for target in targets:
        known = known_base(target)
        misfit, trained = base_misfit(known, sha256), known.revision
        if misfit is None and trained and revision and trained != revision:
            misfit = f"it was trained on revision {trained[:12]}, this is {revision[:12]}"
        if misfit is None and known.sha256 and sha256 is None:
            misfit = f"its base model was a folder with sha256 {known.sha256[:12]}.."
        if misfit is not None:
            raise ModelError(
                f"not the base of this adapter: {name!r}; {misfit}",
                where=str(target.adapter),
                fix="give the base that it was trained on with --model, or restore its files",
            )
    return sha256


def check_same_base(targets: Sequence[Target], parts: Sequence[Part]) -> None:
    """Check by name that several adapters have one base, for those of which nothing else is recorded.

    Raises:
        ModelError: they name different ones.
    """
    named = [str(part.config.base_model_name_or_path or "") for part in parts]
    for target, name in zip(targets, named, strict=True):
        known = known_base(target)
        if known.sha256 is None and known.revision is None and name != named[0]:
            raise ModelError(
                f"adapters of different bases: {Path(named[0]).name} and {Path(name).name}",
                where=f"{targets[0].adapter}, {target.adapter}",
                fix="combine adapters that were trained on the same base",
            )


def check_contracts(targets: Sequence[Target]) -> None:
    """Check that several adapters were prompted alike.

    Raises:
        ModelError: they were not.
    """
    first = _contract(targets[0])
    for target in targets[1:]:
        other = _contract(target)
        differing = [key for key in ("template", "stop_tokens", "system_prompt") if first.get(key) != other.get(key)]
        if differing:
            raise ModelError(
                f"adapters with different prompt contracts: {', '.join(differing)} differ"
                f"{'s' if len(differing) == 1 else ''}",
                where=f"{targets[0].adapter}, {target.adapter}",
                fix="combine adapters that were trained with the same template, stop tokens and system prompt",
            )


def _contract(target: Target) -> Json:
    file = target.adapter / CONTRACT_FILE
    found: dict[str, Any] = read_json(file) if file.is_file() else {}
    return found
