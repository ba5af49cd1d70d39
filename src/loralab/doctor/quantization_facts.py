"""What bitsandbytes says of this machine, as a program; whether it can be imported is the first question."""

import importlib.metadata
from types import ModuleType
from typing import Any

from loralab.doctor.programs import open_output
from loralab.errors import excerpt

_FUNCTIONAL: ModuleType | None = None
_ERROR: str | None = None
try:
    from bitsandbytes import functional

    _FUNCTIONAL = functional
except (ImportError, OSError, RuntimeError, AttributeError) as error:
    _ERROR = f"{type(error).__name__}: {excerpt(error)}"


def quantization_facts() -> dict[str, Any]:
    """Return version, why it cannot be imported, and whether it repacks 4-bit layers on this CPU."""
    try:
        version = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        return {}
    packs = getattr(_FUNCTIONAL, "has_avx512bf16", None)
    return {"version": version, "error": _ERROR, "packs_on_cpu": bool(packs is not None and packs())}


if __name__ == "__main__":
    open_output()(quantization_facts())
