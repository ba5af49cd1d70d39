"""The tensors of an adapter file: names, sizes, norms and hash, read without torch and without a model.

Owns reading safetensors as arrays (bfloat16 included, which numpy does not know), and what a tensor's
name says: the layer and the part of its adapter. What the figures mean is `inspect.py`'s.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from loralab.errors import ModelError, excerpt

Array = NDArray[Any]

# safetensors' name of a type: torch's name, which the hash of an adapter is made over, and how numpy reads it.
_TYPES: dict[str, tuple[str, str | None]] = {
    "F64": ("float64", "<f8"),
    "F32": ("float32", "<f4"),
    "F16": ("float16", "<f2"),
    "BF16": ("bfloat16", "<u2"),
    "I64": ("int64", "<i8"),
    "I32": ("int32", "<i4"),
    "I16": ("int16", "<i2"),
    "I8": ("int8", "i1"),
    "U8": ("uint8", "u1"),
    "BOOL": ("bool", "u1"),
    "F8_E4M3": ("float8_e4m3fn", None),
    "F8_E5M2": ("float8_e5m2", None),
}
_PREFIXES = ("base_model.model.", "base_model.")
# How the parts of adapters are named in PEFT's files; what has none of these is a layer saved whole.
_PARTS = ("lora_", "hada_", "lokr_", "ia3_", "vera_", "trainable_tokens_delta")
_ENDINGS = frozenset({"weight", "default"})


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file.

    Attributes:
        name: as it is stored.
        module: the layer that it belongs to, without PEFT's prefix.
        part: the part of the adapter ("lora_A"), or "weight" and the like for a layer saved whole.
        whole: whether the layer is saved whole.
        dtype: torch's name of the type.
        shape: its sizes.
        values: its numbers, or None where numpy cannot read the type.
    """

    name: str
    module: str
    part: str
    whole: bool
    dtype: str
    shape: tuple[int, ...]
    values: Array | None

    @property
    def size(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def norm(self) -> float:
        """The Frobenius norm; NaN where it cannot be read."""
        if self.values is None:
            return math.nan
        return float(np.sqrt(np.square(self.values, dtype=np.float64).sum()))


def read_name(name: str) -> tuple[str, str, bool]:
    """Return the layer that a tensor belongs to, the part that it is, and whether the layer is saved whole."""
    prefix = next((each for each in _PREFIXES if name.startswith(each)), "")
    words = name.removeprefix(prefix).split(".")
    for index, word in enumerate(words):
        if word.startswith(_PARTS):
            tail = [each for each in words[index + 1 :] if each not in _ENDINGS]
            return ".".join(words[:index]).removesuffix(".token_adapter"), ".".join([word, *tail]), False
    return ".".join(words[:-1]), words[-1], True


def read_tensors(path: Path) -> tuple[list[StoredTensor], str]:
    """Return the tensors of a safetensors file, sorted by name, and the hash over them.

    The hash is that of `models.adapters.adapter_sha256`.

    Raises:
        ModelError: the file is damaged.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:  # checks the header against the file
            names = sorted(file.keys())
    except (SafetensorError, OSError) as error:
        fix = "copy it again from where it came from"
        raise ModelError(f"cannot read the adapter's weights: {excerpt(error)}", where=str(path), fix=fix) from None
    content = np.memmap(path, dtype=np.uint8, mode="r")
    begin = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header: dict[str, dict[str, Any]] = json.loads(content[8:begin].tobytes())
    digest, tensors = hashlib.sha256(), []
    for name in names:
        entry = header[name]
        start, end = entry["data_offsets"]
        raw = content[begin + start : begin + end]
        tensor = _read(name, entry, raw)
        digest.update(f"{name}|torch.{tensor.dtype}|{tensor.shape}|".encode())
        digest.update(raw.data)
        tensors.append(tensor)
    return tensors, digest.hexdigest()


def _read(name: str, entry: Mapping[str, Any], raw: Array) -> StoredTensor:
    dtype, form = _TYPES.get(entry["dtype"], (entry["dtype"].lower(), None))
    shape = tuple(entry["shape"])
    values = None if form is None else raw.view(form).reshape(shape)
    if values is not None and dtype == "bfloat16":  # the upper half of a float32
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return StoredTensor(name, *read_name(name), dtype, shape, values)


def product_norm(first: StoredTensor, second: StoredTensor) -> float | None:
    """Return the Frobenius norm of B A, without forming it, or None where the two do not fit.

    Args:
        first: A (R, ...).
        second: B (..., R).
    """
    if first.values is None or second.values is None or not first.size or not second.size:
        return None
    a = first.values.reshape(first.shape[0], -1).astype(np.float64)
    b = second.values.reshape(second.shape[0], -1).astype(np.float64)
    if b.shape[1] != a.shape[0]:
        return None
    return float(np.sqrt(max(float(((a @ a.T) * (b.T @ b)).sum()), 0.0)))


def not_finite(tensors: list[StoredTensor]) -> Iterator[str]:
    """Yield the names of tensors that hold NaN or infinity."""
    for tensor in tensors:
        if tensor.values is not None and tensor.values.dtype.kind == "f" and not np.isfinite(tensor.values).all():
            yield tensor.name
