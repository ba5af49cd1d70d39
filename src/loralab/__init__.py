"""loralab: LoRA and QLoRA fine-tuning that proves what it claims.

    import loralab
    run = loralab.train("config.yaml", training={"learning_rate": 1e-3})
    print(run.evaluate()["difference"])

Importing the package loads no torch; the names below load it on first use.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from loralab.errors import LoralabError

if TYPE_CHECKING:
    from loralab.api import Run, train

__all__ = ["LoralabError", "Run", "__version__", "train"]

__version__ = version("loralab")


def __getattr__(name: str) -> Any:
    if name in ("Run", "train"):
        from loralab import api

        return getattr(api, name)
    raise AttributeError(f"module 'loralab' has no attribute {name!r}")
