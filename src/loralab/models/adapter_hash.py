"""The hash by which an adapter is known, from its file alone. No torch: a command that only asks that answers at once.

Owns what is hashed. Loading tensors is `adapters.py`'s.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

from loralab.errors import ModelError

WEIGHTS_FILE = "adapter_model.safetensors"
# As torch names the types that safetensors knows.
_TYPES = {
    "BF16": "bfloat16",
    "BOOL": "bool",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "I8": "int8",
    "U8": "uint8",
}
_CHUNK_BYTES = 1 << 20
_MOST_HEADER_BYTES = 100_000_000  # safetensors' own bound


def adapter_sha256(folder: Path) -> str:
    """Return the SHA-256 over name, dtype, shape and bytes of the adapter's tensors, sorted by name.

    Args:
        folder: of the adapter.

    Raises:
        ModelError: there is no adapter, or its file is none of safetensors.
    """
    path = folder / WEIGHTS_FILE
    try:
        with path.open("rb") as stream:
            return _hash(stream)
    except FileNotFoundError:
        raise ModelError(
            f"no {WEIGHTS_FILE} in {str(folder)!r}",
            where=str(folder),
            fix="give a run folder or an adapter folder; adapters are read from safetensors only",
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{WEIGHTS_FILE} cannot be read: {error}", where=str(path), fix="restore the file from a backup"
        ) from None


def _hash(stream: BinaryIO) -> str:
    length = int.from_bytes(stream.read(8), "little")
    if not 0 < length <= _MOST_HEADER_BYTES:
        raise ValueError("it is no file of safetensors")
    header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    digest = hashlib.sha256()
    for name, facts in sorted(header.items()):
        digest.update(f"{name}|torch.{_TYPES[facts['dtype']]}|{tuple(facts['shape'])}|".encode())
        _add(digest, stream, start=8 + length + facts["data_offsets"][0], end=8 + length + facts["data_offsets"][1])
    return digest.hexdigest()


def _add(digest: Any, stream: BinaryIO, *, start: int, end: int) -> None:
    stream.seek(start)
    left = end - start
    while left > 0:
        chunk = stream.read(min(left, _CHUNK_BYTES))
        if not chunk:
            raise ValueError("its end is missing")
        digest.update(chunk)
        left -= len(chunk)
