"""What a merge works with: the run's settings, what it goes onto, and how the live adapter is opened.

Owns the choices of a merge that follow from run and request.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from loralab.config.schema import Config
from loralab.errors import ConfigError, ModelError
from loralab.models.load import check_local_model, load_model_config
from loralab.models.merge_source import open_checkpoint
from loralab.models.merging import Part
from loralab.models.new_tokens import NewToken
from loralab.models.precision import Resolved, resolve_device, resolve_precision, select_single_gpu
from loralab.models.quantization import Quantization, resolve_quantization
from loralab.workflows.merge_checks import DTYPES
from loralab.workflows.session import (
    Target,
    check_base_named,
    known_base,
    load_adapter_tokenizer,
    load_target_config,
    new_tokens_in,
)


@dataclass(slots=True)
class MergeWorld:
    """What a merge works with.

    Attributes:
        config: the run's configuration, of the base that is used.
        parts: the adapters with their weights.
        tokens: what the adapter's tokenizer has beyond the base's.
        quantization: what the linear layers are merged through, or None.
        onto: in words, with the reason.
        dtype: type that is asked for, or None.
        device: where the live adapter computes.
        live_precision: type that the live base is held in.
        live_reason: why.
        overrides: settings under which the live adapter is opened.
        trained: settings under which it was trained, where it is merged onto other numbers, and how these differ.
        base_model: base to use instead of the recorded one.
        notes: what is to be said of the choices.
    """

    config: Config
    parts: Sequence[Part]
    tokens: tuple[NewToken, ...]
    quantization: Quantization | None
    onto: Resolved[str]
    dtype: torch.dtype | None
    device: torch.device
    live_precision: str
    live_reason: str
    overrides: list[str]
    trained: Resolved[list[str]] | None
    base_model: str | None
    notes: list[str] = field(default_factory=list)


def open_world(
    targets: Sequence[Target],
    parts: Sequence[Part],
    *,
    onto: str,
    request: tuple[str | None, str | None],
    dtype: torch.dtype | None,
) -> MergeWorld:
    """Settle what a merge works with.

    Args:
        targets: the adapters; the first one's run is the one whose settings count.
        parts: the same with their weights.
        onto: dequantized or original.
        request: base and device that are asked for, or None.
        dtype: type that is asked for, or None.

    Raises:
        ConfigError: a wish that has no effect.
        ModelError: the base cannot be used.
    """
    base_model, device_name = request
    known = known_base(targets[0])
    overrides = _first_overrides(targets[0], device_name)
    notes = [f"{text} (as the adapter's own facts say)" for text in overrides if "quantization=" in text]
    config = load_target_config(targets[0], overrides, base_model).config
    check_base_named(targets[0], config, base_model)
    check_local_model(config.model.name)
    overrides += _pinned(config, known.revision, notes)
    config = _with(config, overrides)
    note = select_single_gpu(config.model.device)
    device = resolve_device("cuda:0" if note else config.model.device).value
    quantization = resolve_quantization(config.model, load_model_config(config.model), device).value
    what, chosen = _choose_onto(onto, quantization, told=all(known_base(each).told for each in targets))
    held = _live_precision(config, device, dtype)
    precision = held.value
    own = _trained_precision(known.precision, precision, device)
    live = [*overrides, f"model.precision={precision}"]
    trained = None
    if own != precision:
        notes.append(f"asked in {precision}, as the merged model is; the adapter was trained in {own}")
    if quantization is not None and (chosen is None or own != precision):
        how = "it stands on other weights" if chosen is None else f"its weights were quantized from {own} numbers"
        trained = Resolved([*overrides, f"model.precision={own}"], how)
    if quantization is not None and chosen is None:
        live += ["model.quantization=none", "model.double_quantization=true"]
    tokens = new_tokens_in(targets[0], config, load_adapter_tokenizer(targets[0], config))
    notes.append(f"onto {what.value} ({what.reason})")
    return MergeWorld(
        config, parts, tokens, chosen, what, dtype, device, precision, held.reason, live, trained, base_model, notes
    )


def _first_overrides(target: Target, device: str | None) -> list[str]:
    known = known_base(target)
    found = [f"model.device={device}"] if device is not None else []
    if target.folder is None and known.quantization not in (None, "none"):
        found.append(f"model.quantization={known.quantization}")
        if known.double_quantization is False:
            found.append("model.double_quantization=false")
    return found


def _with(config: Config, overrides: Sequence[str]) -> Config:
    """Return a configuration with overrides of the model section."""
    values: dict[str, object] = {}
    for text in overrides:
        key, _, value = text.partition("=")
        values[key.removeprefix("model.")] = value == "true" if value in ("true", "false") else value
    return config.model_copy(update={"model": config.model.model_copy(update=values)})


def _pinned(config: Config, revision: str | None, notes: list[str]) -> list[str]:
    """Name the revision that an adapter was trained on, where its base comes from the Hub."""
    if not revision or config.model.revision or Path(config.model.name).expanduser().is_dir():
        return []
    notes.append(f"base {config.model.name} at revision {revision} (the one that the adapter was trained on)")
    return [f"model.revision={revision}"]


def _choose_onto(
    onto: str, quantization: Quantization | None, *, told: bool
) -> tuple[Resolved[str], Quantization | None]:
    trained = "the adapter was trained on them" if told else "the adapter does not say what it was trained on"
    if quantization is None:
        if onto == "original":
            why = "the adapter was trained on unquantized weights" if told else "the base is not quantized"
            raise ConfigError(
                f"--onto original has no effect: {why}",
                where="option --onto",
                fix="leave it out",
            )
        return Resolved("the base's own weights", trained), None
    if onto == "dequantized":
        why = f"{trained}; they differ from the unquantized ones by what quantization lost"
        return Resolved(f"weights dequantized from {quantization}", why), quantization
    if quantization.stored:
        raise ModelError(
            f"the base is stored in {quantization.kind}: there are no original weights to merge onto",
            where="option --onto",
            fix="leave it out, or name the unquantized model with --model",
        )
    why = f"set in --onto; the adapter was trained on weights in {quantization}, so that the merged model differs"
    return Resolved("the original, unquantized weights", why), None


def _live_precision(config: Config, device: torch.device, dtype: torch.dtype | None) -> Resolved[str]:
    """Return the type that the live adapter's base is held in: the merged one's, so that the merge alone is compared.

    float16 is not computed with here but on CUDA: there float32 takes its place.
    """
    reason = "set in --dtype, as the merged weights are"
    if dtype is None:
        dtype, reason = open_checkpoint(config.model).dtype(), "what the base's weights are stored in"
    if dtype not in DTYPES.values():  # packed numbers, or float64
        found = resolve_precision(config.model, device)
        dtype, reason = found.value, found.reason
    chosen = str(dtype).removeprefix("torch.")
    if chosen == "float16" and device.type != "cuda":
        return Resolved("float32", f"float16 is not computed with on {device.type}")
    return Resolved(chosen, reason)


def _trained_precision(recorded: str | None, live: str, device: torch.device) -> str:
    """Return the type that the base was held in in training, as far as that is known and this device computes in it."""
    name = str(recorded or "").removeprefix("torch.")
    return live if name not in DTYPES or (name == "float16" and device.type != "cuda") else name
