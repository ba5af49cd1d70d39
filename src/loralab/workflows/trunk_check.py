"""Can this model start behind its frozen layers? Asked of the loaded model, before a run relies on it.

Owns the probe: loss and every gradient with and without the frozen layers, and whether what they give
depends on the tokens up to each one alone, wherever those lie.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from loralab.data.example import Branch, TokenizedExample
from loralab.layout.collate import MicroBatch, StepBatch
from loralab.layout.planner import Planner, SharingCost
from loralab.models.attention import UnsupportedAttention
from loralab.models.self_check import find_training_noise
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.trunk import CachedTrunk, FrozenTrunk, UncuttableModel
from loralab.models.trunk_store import Integers, PathCollision, TrunkStore
from loralab.training.loss import model_inputs, run_micro_batches

_REFUSALS = (UnsupportedAttention, NotImplementedError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)
# The same numbers enter the same layers: equal to the last bit on a CPU. Kernels of an accelerator may add
# in another order each time.
_SAME_FLOAT32, _SAME_HALF = 1e-5, 2e-2
# The same path in another layout: its sums run in another order.
_MOVED_FLOAT32, _MOVED_HALF = 1e-4, 5e-2
_FORWARD = ("input_ids", "attention_mask", "position_ids", "depth", "subtree_end", "roots")
Gradients = dict[str, Tensor]


def trunk_states(model: SupervisedPeftModel, trunk: FrozenTrunk, batch: MicroBatch) -> Tensor:
    """Run the frozen layers alone and return what enters the first trained one (R, L, D).

    Raises:
        UncuttableModel: the layers are not called in order.
    """
    inputs = model_inputs(batch.to(model.embedding.weight.device))
    with torch.no_grad(), trunk.computing() as recorder:
        model.hidden_states(**{name: inputs[name] for name in _FORWARD})
    if recorder.states is None or recorder.states.shape[:-1] != batch.input_ids.shape:
        raise UncuttableModel("its layers are not called in order, or with hidden states of another shape")
    return recorder.states


def paths_of(batch: MicroBatch) -> tuple[Integers, Integers]:
    """Return hash and mark (last token and depth) of every token's path, padding left out."""
    real = batch.attention_mask.bool()
    return batch.token_prefixes[real].numpy(), (batch.input_ids + (batch.depth << 32))[real].numpy()


def keep_states(store: TrunkStore, batch: MicroBatch, states: Tensor) -> None:
    """Store the hidden states (R, L, D) of a micro-batch's paths; what is stored already stays.

    Raises:
        PathCollision: two different paths have one hash.
        OSError: they cannot be written.
    """
    hashes, marks = paths_of(batch)
    new = store.missing(hashes, marks)
    real = states[batch.attention_mask.bool().to(states.device)]
    store.append(hashes[new], marks[new], real[torch.from_numpy(new).to(real.device)])


def examine_trunk(model: SupervisedPeftModel, trunk: FrozenTrunk, planner: Planner) -> str | TrunkStore:
    """Return why a model cannot start behind its frozen layers, or an empty store for what they give.

    Args:
        model: base with adapter.
        trunk: its layers; afterwards they are known to be as they must be.
        planner: lays out the run's steps.
    """
    was_training, before = model.training, model.cached_trunk
    model.cached_trunk = None
    try:
        noise = find_training_noise(model)
        return noise if noise is not None else _examine(model, trunk, planner)
    except torch.OutOfMemoryError:  # a RuntimeError, and no fact about the architecture
        raise
    except UncuttableModel as error:
        return str(error)
    except PathCollision:
        return "two tokens of its probe row have one hash"
    except _REFUSALS as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    finally:
        model.cached_trunk = before
        model.zero_grad(set_to_none=True)
        model.train(was_training)


def _examine(model: SupervisedPeftModel, trunk: FrozenTrunk, planner: Planner) -> str | TrunkStore:
    examples = _probe(model.embedding.weight.shape[0])
    step = replace(planner, cost=SharingCost(tokens_per_pair=0.0, min_tokens=1))(examples)
    model.train()
    with trunk.observing():
        _loss_and_gradients(model, step)
    loss, gradients = _loss_and_gradients(model, step)
    together = _store_of(model, trunk, [step])
    half = together.dtype != torch.float32
    model.cached_trunk = CachedTrunk(trunk, together)
    model.train()
    other_loss, other_gradients = _loss_and_gradients(model, step)
    if model.cached_trunk.misses:
        return "what its frozen layers give was not found again"
    model.cached_trunk = None
    reason = _differing(loss, other_loss, gradients, other_gradients, limit=_SAME_HALF if half else _SAME_FLOAT32)
    if reason is not None:
        return reason
    alone = _store_of(model, trunk, [planner([example]) for example in examples])
    reason = _moved(step, together, alone, limit=_MOVED_HALF if half else _MOVED_FLOAT32)
    return reason or TrunkStore(width=together.width, dtype=together.dtype)


def _probe(vocabulary: int) -> list[TokenizedExample]:
    """Return rows with a common beginning, and one without."""

    def ids(start: int, count: int) -> np.ndarray:
        return ((np.arange(start, start + count) * 37 + 11) % vocabulary).astype(np.int32)

    rows = [(ids(0, 14), ids(20, 6)), (np.concatenate([ids(0, 9), ids(40, 5)]), ids(60, 4)), (ids(70, 8), ids(80, 15))]
    return [TokenizedExample(place, 0, (Branch(*row),)) for place, row in enumerate(rows, start=1)]


def _loss_and_gradients(model: SupervisedPeftModel, step: StepBatch) -> tuple[float, Gradients]:
    model.zero_grad(set_to_none=True)
    device = model.embedding.weight.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        result = run_micro_batches(
            model,
            step.micro_batches,
            device=device,
            backward=lambda loss: (loss / step.supervised_tokens).backward(),
            dropout_key=(0, 0),
        )
    found = {name: weight.grad.detach() for name, weight in model.named_parameters() if weight.grad is not None}
    return float(result.total), found


def _store_of(model: SupervisedPeftModel, trunk: FrozenTrunk, steps: Sequence[StepBatch]) -> TrunkStore:
    """Return a store in memory of what the frozen layers give for the rows of steps."""
    model.eval()
    store: TrunkStore | None = None
    for step in steps:
        for batch in step.micro_batches:
            states = trunk_states(model, trunk, batch)
            store = store or TrunkStore(width=states.shape[-1], dtype=states.dtype)
            keep_states(store, batch, states)
    if store is None:
        raise UncuttableModel("the probe has no row")
    return store


def _differing(loss: float, other: float, own: Gradients, others: Gradients, *, limit: float) -> str | None:
    if own.keys() != others.keys():
        name = min(own.keys() ^ others.keys())
        return f"{name} has a gradient only {'with' if name in own else 'without'} the frozen layers"
    error = abs(loss - other) / max(abs(loss), 1e-12)
    if not error <= limit:
        return f"its loss behind the frozen layers differs by {error:.1e}"
    largest = max((float(each.norm()) for each in own.values()), default=0.0)
    for name, gradient in own.items():
        # Against the largest gradient too: what is nearly zero is all rounding.
        error = float((gradient - others[name]).norm()) / max(float(gradient.norm()), 1e-3 * largest, 1e-12)
        if not error <= limit:
            return f"the gradient of {name} behind the frozen layers differs by {error:.1e}"
    return None


def _moved(step: StepBatch, together: TrunkStore, alone: TrunkStore, *, limit: float) -> str | None:
    """Return a sentence where a path gives something else beside other rows than alone."""
    hashes = np.concatenate([paths_of(batch)[0] for batch in step.micro_batches])
    rows, others = together.find(hashes), alone.find(hashes)
    if rows is None or others is None:
        return "a path of its probe row was not found again"
    first, second = (store.read(places).float() for store, places in ((together, rows), (alone, others)))
    error, power = (float((first - each).norm() / first.norm()) for each in (second, first.roll(1, dims=0)))
    if not power > 10 * limit:
        return f"unknown: tokens of its probe row differ by no more than {power:.1e}"
    if not error <= limit:
        return f"what its frozen layers give depends on other rows (by {error:.1e})"
    return None
