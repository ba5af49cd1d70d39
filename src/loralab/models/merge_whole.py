"""A merge of a whole model in memory, for bases whose layers are not stored as they are held.

Owns loading, PEFT's merge and saving. Takes as much memory as the base in float32.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers.pytorch_utils import Conv1D

from loralab.config.schema import ModelConfig
from loralab.errors import AdapterIntegrityError, ModelError, excerpt
from loralab.models.adapters import load_adapter
from loralab.models.load import load_base_model
from loralab.models.merging import Part, named, narrow, scale_adapter
from loralab.models.new_tokens import NewToken, grow_vocabulary
from loralab.models.quantization import BITSANDBYTES, Quantization
from loralab.models.supervised import SupervisedPeftModel

if BITSANDBYTES:
    from loralab.models.merge_quantized import quantized_names, requantize

_CPU = torch.device("cpu")


def add_parts(model: SupervisedPeftModel, parts: Sequence[Part]) -> None:
    """Put further adapters beside the first, all of them active, each with its weight.

    Args:
        model: base with the first adapter.
        parts: all adapters, the first one included.

    Raises:
        ModelError: one does not fit.
    """
    for name, part in list(named(parts).items())[1:]:
        try:
            model.load_adapter(str(part.folder), name, is_trainable=False)
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            raise ModelError(
                f"the adapters do not go onto this base together: {excerpt(error)}",
                where=str(part.folder),
                fix="merge them one by one, or name the base that they were trained on",
            ) from error
    if len(parts) > 1:
        cast(Any, model.base_model).set_adapter(list(named(parts)))
    for name, part in named(parts).items():
        scale_adapter(model, name, part.weight)
    model.eval()


def merge_whole(
    section: ModelConfig,
    parts: Sequence[Part],
    folder: Path,
    *,
    dtype: torch.dtype,
    tokens: Sequence[NewToken],
    quantization: Quantization | None,
    held: torch.dtype,
) -> list[dict[str, Any]]:
    """Merge in float32 in memory and save the model.

    Args:
        section: the model section.
        parts: the adapters.
        folder: where the merged weights go; it exists.
        dtype: of the merged weights.
        tokens: what the adapters' tokenizer has beyond the base's.
        quantization: what its linear layers went through in training, or None.
        held: type that a quantized base is loaded in.

    Returns:
        `file` and `bytes` of each shard.

    Raises:
        AdapterIntegrityError: a merged number is not finite.
        ModelError: base or adapter cannot be loaded.
    """
    plain = section.model_copy(update={"quantization": "none", "double_quantization": True, "device": "cpu"})
    base, _ = load_base_model(plain, dtype=torch.float32, device=_CPU)
    if quantization is not None:
        for name in quantized_names(base):
            layer: Any = base.get_submodule(name)
            turned = isinstance(layer, Conv1D)
            layer.weight.data = requantize(layer.weight.data, quantization, dtype=held, device=_CPU, turned=turned)
    grow_vocabulary(base, tokens)
    model = load_adapter(base, parts[0].folder)
    add_parts(model, parts)
    try:
        merged: Any = cast(Any, model).merge_and_unload(safe_merge=True, adapter_names=list(named(parts)))
    except ValueError as error:
        raise AdapterIntegrityError(
            f"the adapter cannot be merged: {excerpt(error)}",
            where=str(parts[0].folder),
            fix="restore the adapter folder from a copy, or train again",
        ) from error
    for name, weight in merged.named_parameters():
        weight.data = narrow(weight.data, dtype, name)
    merged.to(dtype).save_pretrained(str(folder))
    return [{"file": file.name, "bytes": file.stat().st_size} for file in sorted(folder.glob("*.safetensors"))]
