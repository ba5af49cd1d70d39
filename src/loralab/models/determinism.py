"""Same run, same bits: torch's deterministic algorithms on CUDA.

Owns the switch and the question whether a model can be trained under it. On a CPU everything that
a step calls is deterministic already. Some backward kernels of a GPU (attention above all) add in
the order in which blocks happen to finish, unless told otherwise.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import deterministic as _deterministic

from loralab.models.precision import Resolved
from loralab.models.supervised import SupervisedPeftModel

_PROBE_TOKENS = 16
_memory: Any = _deterministic  # its only setting is set past its types


@contextmanager
def restored_algorithms() -> Iterator[None]:
    """Leave the process with the setting that it came with."""
    enabled = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = _memory.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=only_warned)
        _memory.fill_uninitialized_memory = filled


def resolve_determinism(model: SupervisedPeftModel, device: torch.device) -> dict[str, Resolved[str]]:
    """Switch to deterministic algorithms, if the model can be trained under them.

    Args:
        model: base with adapter, on its device.
        device: where the model is.

    Returns:
        The choice, where there was one to make: on CUDA.
    """
    if device.type != "cuda":
        return {}
    # cuBLAS takes its workspace from here; torch asks for a fixed one.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    _memory.fill_uninitialized_memory = False  # costs time, and finds mistakes only
    torch.use_deterministic_algorithms(True)
    try:
        _train_on_probe(model, device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        torch.use_deterministic_algorithms(False)
        why = f"a resumed run may differ in its last digits: {' '.join(str(error).split())[:120]}"
        return {"deterministic": Resolved("off", why)}
    return {"deterministic": Resolved("on", "so that a resumed run is equal to the last bit")}


def _train_on_probe(model: SupervisedPeftModel, device: torch.device) -> None:
    """Run a few tokens forward and backward."""
    ids = torch.arange(_PROBE_TOKENS, device=device)[None] % model.embedding.weight.shape[0]
    was_training = model.training
    model.train()
    try:
        with torch.random.fork_rng(devices=[device]):
            found = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=torch.arange(_PROBE_TOKENS, device=device)[None],
                token_prefixes=torch.zeros_like(ids),
                dropout_key=(0, 0),
                label_positions=torch.arange(_PROBE_TOKENS - 1, device=device),
                labels=ids[0, 1:],
            )
            found.losses.sum().backward()
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
