"""What a run takes of memory, predicted on its blueprint.

Owns which parts there are and how they add up to a peak; `plan` and `train` share it, and the token
budget goes by it. The peak is what comes above the level after imports, as `memory_watch.py`
measures it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loralab.config.schema import Config
from loralab.data.example import Branch, TokenizedExample
from loralab.layout.collate import MicroBatch
from loralab.layout.planner import Layout, Planner
from loralab.models.allocator import KEPT_PINNED, RECOMPUTED_PINNED, heap_peak, keeps_freed_memory
from loralab.models.blueprint import Blueprint, describe_weights
from loralab.models.memory import TokenMemory
from loralab.models.memory_trace import META, MemoryTrace
from loralab.models.picture_features import trains_vision
from loralab.models.self_check import kernels_to_try
from loralab.models.token_loss import chunk_elements
from loralab.models.vision_memory import count_patches, tower_memory
from loralab.training.distributed import ALONE, Processes
from loralab.training.loss import run_micro_batches
from loralab.workflows.base_share import held_base

# Threads, their stacks, kernels that are built on first use, and the rows of a run: seen in every run on a CPU.
_RUNTIME_BYTES = 24 << 20
# Two sizes give a line: what a micro-batch takes grows with its tokens, beside logits and gradients.
_FEW, _MANY = 1, 4  # rows
# Attention keeps more of a token the longer its row is, up to rows of so many tokens (`span_attention.py:_KEPT`).
_SHORTEST, _LONGEST = 128, 1024
# One label for so many tokens, as where prompts are longer than answers.
_TOKENS_PER_LABEL = 4
# While a weight is quantized there are of it: the original, float32 of it and of what was made, their difference
# and its square; read by as many threads as transformers has.
_QUANTIZING_BYTES, _READERS = 4 * 4, 4
# bitsandbytes holds moments of tensors below this in 32 bits.
_SMALL_TENSOR = 4096


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What a computation takes.

    Attributes:
        peak: at most, as the process holds it.
        alive: at most, of tensors that are still needed.
    """

    peak: int
    alive: int


@dataclass(frozen=True, slots=True)
class StepMeter:
    """Measures micro-batches on a blueprint.

    Args:
        blueprint: the model without numbers.
        layout: how rows lie.
    """

    blueprint: Blueprint
    layout: Layout

    def train(self, batch: MicroBatch, *, typical: MicroBatch | None = None) -> StepBytes | str:
        """Return what forward and backward take at most, or why that cannot be told.

        Args:
            batch: the largest micro-batch.
            typical: one of those that come between; what they leave of the heap makes the largest take more.
        """
        self.blueprint.model.train()
        how = {"backward": Tensor.backward, "dropout_key": (0, 0)}
        traces = [self._trace(each, how) for each in (batch, typical) if each is not None]
        return self._take(traces)

    def evaluate(self, batch: MicroBatch) -> StepBytes | str:
        """Return what measuring the loss takes, or why that cannot be told."""
        self.blueprint.model.eval()
        with torch.no_grad():
            return self._take([self._trace(batch, {"observe": lambda _batch, _losses: None})])

    def _trace(self, batch: MicroBatch, how: dict[str, Any]) -> MemoryTrace | str:
        model = self.blueprint.model
        model.tree_kernel = None if self.layout == "padded" else self._kernel
        return self.blueprint.trace(partial(run_micro_batches, model, [batch], device=META, **how))

    @property
    def _kernel(self) -> str:
        """The kernel that is traced: kernels of accelerators keep what `per_tree` keeps, and that needs no device."""
        if self.blueprint.device.type != "cpu":
            return "per_tree"
        return kernels_to_try("cpu", self.blueprint.model.embedding.weight.dtype)[0]

    def _take(self, traces: Sequence[MemoryTrace | str]) -> StepBytes | str:
        followed: list[MemoryTrace] = []
        for trace in traces:
            if isinstance(trace, str):
                return trace
            followed.append(trace)
        alive = followed[0].peak_bytes
        if self.blueprint.device.type != "cpu" or not keeps_freed_memory():
            return StepBytes(alive, alive)
        first, between = followed[0].events, followed[-1].events
        pinned = RECOMPUTED_PINNED if self.blueprint.checkpointing else KEPT_PINNED
        return StepBytes(heap_peak([first, between, first, between, first], pinned=pinned), alive)

    def count_tokens(self, longest: int) -> TokenMemory | str:
        """Return what a micro-batch takes by its tokens, or why that cannot be told.

        Args:
            longest: tokens of the longest row; all rows are taken to be like it.
        """
        length = min(max(longest, _SHORTEST), _LONGEST)
        few, many = (self.train(_rows_of(rows, length, self.layout)) for rows in (_FEW, _MANY))
        if isinstance(few, str):
            return few
        if isinstance(many, str):
            return many
        slope = (many.peak - few.peak) / (length * (_MANY - _FEW))
        return TokenMemory(max(slope, 1.0), max(few.peak - slope * length * _FEW, 0.0))


def _rows_of(count: int, length: int, layout: Layout) -> MicroBatch:
    """Return a micro-batch of rows that have nothing in common."""
    ids = np.arange(length + 1, dtype=np.int32) % 2
    answer = length // _TOKENS_PER_LABEL
    rows = [TokenizedExample(i + 1, 0, (Branch(ids[:-answer], ids[-answer:]),)) for i in range(count)]
    alone: Layout = "padded" if layout == "padded" else "packed"
    (batch,) = Planner(count * length, layout=alone)(rows).micro_batches
    return batch


def predict_memory(
    config: Config,
    meter: StepMeter,
    *,
    batch: MicroBatch,
    typical: MicroBatch | None = None,
    evaluated: MicroBatch | None = None,
    data_bytes: int = 0,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Return the peak of a run and its parts.

    Args:
        config: the configuration.
        meter: of the run's blueprint.
        batch: the largest micro-batch of training.
        typical: one of the middle, or None.
        evaluated: the largest one of an evaluation, or None where there is none.
        data_bytes: what tokenizer and rows take of the device's memory.
        processes: those that share the run; memory is that of one.

    Returns:
        `predicted_bytes` (None where it cannot be told, with `why`), `parts`, `mapped_bytes` (weights that are
        read from their file and can be dropped from memory again; not in the peak), `loading_bytes` (the peak
        while the base is loaded) and `tokens` (of the largest micro-batch, padding included).
    """
    blueprint = meter.blueprint
    weights = describe_weights(blueprint.model)
    base = held_base(config, blueprint, processes)
    optimizer = optimizer_bytes(config.training.optim, trained_shapes(blueprint))
    # What is reduced over processes lies beside the gradients.
    gradients = weights["trainable_bytes"] * (2 if processes.count > 1 else 1)
    runtime = _RUNTIME_BYTES if blueprint.device.type == "cpu" else 0
    loading = runtime + data_bytes + base.own + _loading_extra(blueprint, weights, mapped=base.mapped > 0)
    facts: dict[str, Any] = {
        "mapped_bytes": base.mapped,
        "loading_bytes": loading,
        "tokens": int(batch.input_ids.numel()),
    }
    step = meter.train(batch, typical=typical)
    measured = meter.evaluate(evaluated) if evaluated is not None else StepBytes(0, 0)
    if isinstance(step, str) or isinstance(measured, str):
        why = step if isinstance(step, str) else measured
        return {"predicted_bytes": None, "why": why, "parts": {}, **facts}
    parts = {
        "weights": base.own,
        "adapter": weights["trainable_bytes"],
        "optimizer": optimizer,
        "gradients": gradients,
        **_step_parts(blueprint, weights, batch, step),
        "runtime": runtime,
        "data": data_bytes,
    }
    parts["vision"], encoding = _vision_parts(blueprint, batch)
    training = sum(parts.values())
    evaluation = sum(parts[name] for name in ("weights", "adapter", "optimizer", "runtime", "data")) + measured.peak
    parts["evaluation"] = measured.peak  # instead of gradients and what a step takes, not beside them
    # While pictures are encoded by a frozen tower, nothing of the language model's sweep is there.
    reading = training - parts["activations"] - parts["logits"] - parts["kept_by_allocator"] + encoding
    return {"predicted_bytes": max(training, evaluation, loading, reading), "parts": parts, **facts}


def _vision_parts(blueprint: Blueprint, batch: MicroBatch) -> tuple[int, int]:
    """Return what the pictures of a micro-batch take until the backward sweep, and while they are encoded."""
    base, model = blueprint.model.language_model.config, blueprint.model
    if batch.pictures is None:
        return 0, 0
    trained = trains_vision(model.language_model)
    dtype, held = model.embedding.weight.dtype, blueprint.checkpointing
    tower = tower_memory(base, dtype=dtype, trained=trained, checkpointing=held)
    patches = count_patches(base, batch.pictures.tensors)
    pixels = sum(each.numel() * each.element_size() for each in batch.pictures.tensors.values())
    return pixels + int(patches * tower.kept), int(patches * tower.alive)


def _step_parts(blueprint: Blueprint, weights: Mapping[str, Any], batch: MicroBatch, step: StepBytes) -> dict[str, int]:
    """Divide what a step takes beside gradients."""
    dtype = blueprint.model.embedding.weight.dtype
    vocabulary = int(blueprint.model.embedding.weight.shape[0])
    on_cpu, spare = blueprint.device.type == "cpu", blueprint.model.spares_logits
    elements = chunk_elements(blueprint.device.type, trains=True, spare=spare)
    rows = min(len(batch.labels), max(1, elements // vocabulary))
    # Logits and, over or beside them, their gradient in the compute type; off the CPU in float32 too, with logarithms.
    each = (1 if spare else 2) * dtype.itemsize if on_cpu else 2 * dtype.itemsize + 8
    logits = rows * vocabulary * each
    dequantized = weights["largest"] * dtype.itemsize
    rest = max(step.alive - weights["trainable_bytes"] - logits - dequantized, 0)
    return {
        "activations": rest,
        "logits": min(logits, step.alive),
        "dequantization": dequantized,
        "kept_by_allocator": step.peak - step.alive,
    }


def _loading_extra(blueprint: Blueprint, weights: Mapping[str, Any], *, mapped: bool) -> int:
    """Return what is there besides the weights while the base is loaded."""
    if blueprint.device.type != "cpu":
        return int(weights["largest"]) * _QUANTIZING_BYTES
    if weights["largest"]:
        return int(weights["largest"]) * _QUANTIZING_BYTES * 2
    largest = max((p.numel() * p.element_size() for p in blueprint.model.parameters()), default=0)
    return 0 if mapped else _READERS * largest


def trained_shapes(blueprint: Blueprint) -> list[Sequence[int]]:
    """Return the shapes of the trained tensors."""
    return [tuple(p.shape) for p in blueprint.model.parameters() if p.requires_grad]


def optimizer_bytes(optim: str, shapes: Sequence[Sequence[int]]) -> int:
    """Return what an optimizer holds for trained tensors, in bytes.

    Args:
        optim: `training.optim`.
        shapes: of the tensors.
    """
    sizes = [math.prod(shape) for shape in shapes]
    if optim == "sgd":
        return 0
    if optim == "adafactor":  # a mean of squares for each row and column
        return sum(4 * (shape[0] + shape[1] if len(shape) == 2 else math.prod(shape)) for shape in shapes)
    if "8bit" in optim:
        return sum(2 * size if size >= _SMALL_TENSOR else 8 * size for size in sizes)
    return 8 * sum(sizes)


def needed_bytes(memory: Mapping[str, Any]) -> int | None:
    """Return the peak with the weights that are pages of their file; None where it cannot be told.

    Without room for those too, every step would read them from disk again.

    Args:
        memory: of `predict_memory`.
    """
    if memory["predicted_bytes"] is None:
        return None
    return int(memory["predicted_bytes"] + memory["mapped_bytes"])
