"""How a base's weights lie on disk, as far as memory goes by it.

Owns reading the header of safetensors files. Weights that are stored in the type of the run are
mapped: they are pages of their file, which the system reads when they are needed and may drop again.
"""

import json
from collections import Counter
from pathlib import Path

import torch

from loralab.config.schema import ModelConfig
from loralab.models.blueprint import Blueprint

_HEADER_LIMIT = 100_000_000
_NAMES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def stored_dtype(model: ModelConfig) -> torch.dtype | None:
    """Return the type that most of a local model's weights are stored in, or None where that is not known."""
    folder = Path(model.name).expanduser()
    counts: Counter[str] = Counter()
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(min(length, _HEADER_LIMIT)))
            counts.update(
                {name["dtype"]: name["data_offsets"][1] for key, name in header.items() if key != "__metadata__"}
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None  # loading will say what is wrong with the file
    if not counts:
        return None
    return _NAMES.get(counts.most_common(1)[0][0])


def is_mapped(model: ModelConfig, blueprint: Blueprint) -> bool:
    """Return whether the weights that are not quantized stay pages of their file.

    Args:
        model: the model section.
        blueprint: of the run.
    """
    if blueprint.device.type != "cpu":
        return False
    stored = stored_dtype(model)
    if stored is None:
        stored = getattr(blueprint.model.language_model.config, "dtype", None)
    return stored == blueprint.model.embedding.weight.dtype
