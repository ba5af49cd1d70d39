"""A new run that starts from the weights of another run's adapter.

Owns whether an adapter fits the run, and what the record says of its source. Optimizer and
schedule start anew; only the weights come over.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from loralab.errors import ModelError, RunFolderError, excerpt
from loralab.models.adapters import WEIGHTS_FILE, adapter_sha256, read_adapter_config
from loralab.models.trainable_tokens import trained_tokens
from loralab.run import RunFolder
from loralab.workflows.session import Target, base_misfit, find_target, known_base, load_adapter_tokenizer
from loralab.workflows.steps import Run

_WHERE = "option --warm-start"
# PEFT's name: our key, for what changes the function of the same tensors.
_SHAPING = {"peft_type": "lora.variant", "r": "lora.r", "lora_alpha": "lora.alpha", "alpha": "lora.alpha"}
_FURTHER = ("use_dora", "use_rslora", "bias")
# Of the same name here and in PEFT: rows of other tokens and other scales have the same shapes.
_SILENT = ("rank_pattern", "alpha_pattern", "trainable_token_indices")
# One place may be named in several ways: these count where the tensors differ too, as what they differ by.
_PLACING = ("target_modules", "layers_to_transform", "modules_to_save")


def apply_warm_start(run: Run, source: Path | Mapping[str, str]) -> dict[str, str]:
    """Put the weights of another adapter into a run that has not begun.

    Args:
        run: the run; its fresh adapter is overwritten.
        source: a run folder or an adapter folder, or what this function returned for an earlier start.

    Returns:
        What the record says: source and hash of the adapter.

    Raises:
        ModelError: there is no adapter, it is damaged, or it does not fit the run.
        RunFolderError: the adapter lies in the folder that the run would replace, or has changed since.
    """
    path = Path(source["source"]) if isinstance(source, Mapping) else source
    inside = RunFolder(path).adapter
    config = read_adapter_config(inside if RunFolder(path).exists() else path, where=_WHERE)
    target = find_target(path)
    if target.adapter.resolve().is_relative_to(run.folder.path.resolve()):
        raise RunFolderError(
            f"the adapter lies in the output folder of the new run: {str(path)!r}",
            where=f"{_WHERE}, key output.dir",
            fix="name another output.dir; the new run would replace its own source",
        )
    tensors = _read_weights(target.adapter)
    tensor_misfits = _tensor_misfits(run, tensors)
    settings = {**_SHAPING, **dict(zip(_FURTHER, _FURTHER, strict=True))}
    settings |= {name: f"lora.{name}" for name in (*_SILENT, *(_PLACING if tensor_misfits else ()))}
    base = base_misfit(known_base(target), run.base_facts.get("sha256"))
    misfits = [*([base] if base is not None else []), *_config_misfits(run, config, settings), *tensor_misfits]
    misfits += _token_misfits(run, target, config)
    if misfits:
        raise ModelError(
            f"the adapter does not fit this run: {'; '.join(misfits)}",
            where=f"{_WHERE}: {target.adapter}",
            fix="give the run the adapter's base, rank, alpha and target modules, or start it without --warm-start",
        )
    digest = adapter_sha256(target.adapter)
    if isinstance(source, Mapping) and digest != source["adapter_sha256"]:
        raise RunFolderError(
            f"the adapter that the run was started from has changed: sha256 was {source['adapter_sha256'][:12]}.., "
            f"now {digest[:12]}..",
            where=str(target.adapter),
            fix="restore it, or start a new run with --warm-start",
        )
    set_peft_model_state_dict(run.model, tensors)
    run.reporter.say(f"starting from the weights of {target.adapter} ({digest[:12]}..), with a fresh optimizer")
    return {"source": str(path.absolute()), "adapter_sha256": digest}


def _read_weights(folder: Path) -> dict[str, Any]:
    try:
        return dict(load_file(folder / WEIGHTS_FILE))
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"cannot read {WEIGHTS_FILE}: {excerpt(error)}", where=f"{_WHERE}: {folder}", fix="restore the file"
        ) from error


def _config_misfits(run: Run, theirs: PeftConfig, settings: Mapping[str, str]) -> list[str]:
    ours = run.model.peft_config["default"]
    pairs = [
        (key, _plain(getattr(theirs, name, None)), _plain(getattr(ours, name, None))) for name, key in settings.items()
    ]
    return [f"{key} is {old!r} there, {new!r} here" for key, old, new in pairs if old != new]


def _token_misfits(run: Run, target: Target, theirs: PeftConfig) -> list[str]:
    """Compare the texts of trained tokens: new ones of another name have the same ids."""
    shared = sorted(trained_tokens(theirs) & trained_tokens(run.model.peft_config["default"]))
    if not shared:
        return []
    old, new = load_adapter_tokenizer(target, run.config), run.data.prompter.tokenizer
    pairs = [(token, old.convert_ids_to_tokens(token), new.convert_ids_to_tokens(token)) for token in shared]
    return [f"token {token} is {before!r} there, {now!r} here" for token, before, now in pairs if before != now]


def _plain(value: Any) -> Any:
    """Return a setting as it is compared and shown; nothing set is None, however PEFT holds it."""
    value = getattr(value, "value", value)
    if isinstance(value, (set, frozenset)):
        value = sorted(value)
    if isinstance(value, dict) and len(value) == 1 and isinstance(one := next(iter(value.values())), list):
        value = one  # tokens of the one embedding, by its name
    return None if value in ({}, []) else value


def _tensor_misfits(run: Run, tensors: Mapping[str, Any]) -> list[str]:
    theirs = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    ours = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(run.model).items()}
    missing, foreign = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    misfits = []
    if missing:
        misfits.append(f"{len(missing)} tensors of the run are not in it (first: {missing[0]})")
    if foreign:
        misfits.append(f"{len(foreign)} of its tensors match no layer of the run (first: {foreign[0]})")
    shaped = [name for name in sorted(ours.keys() & theirs.keys()) if ours[name] != theirs[name]]
    if shaped:
        first = shaped[0]
        misfits.append(f"{len(shaped)} tensors differ in shape (first: {first}, {theirs[first]} and {ours[first]})")
    return misfits
