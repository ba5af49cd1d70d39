"""The optional package `gguf`: imported when a GGUF file is asked for, or a clear error.

Owns that import alone.
"""

import importlib
from typing import Any

from loralab.errors import ModelError


def load_gguf() -> Any:
    """Return the package `gguf`.

    Raises:
        ModelError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise ModelError(
            "the package gguf, which writes GGUF files, is not installed",
            where="option --to gguf",
            fix='install it: pip install "loralab[gguf]"',
        ) from None
