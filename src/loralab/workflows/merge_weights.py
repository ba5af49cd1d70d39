"""The weights of a merge: shard by shard where the base is stored as its layers hold it, else in memory as a whole.

Owns the choice between the two, the type of the result, and the check of room on the disk.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralab.errors import ModelError
from loralab.models.merge_source import Checkpoint, open_checkpoint
from loralab.models.merge_whole import merge_whole
from loralab.models.merged_folder import ShardWriter, write_config
from loralab.models.merging import Skeleton, draw_skeleton
from loralab.models.precision import Resolved
from loralab.models.quantization import BITSANDBYTES
from loralab.progress import Reporter
from loralab.workflows.merge_checks import check_room
from loralab.workflows.merge_world import MergeWorld

if BITSANDBYTES:
    from loralab.models.merge_quantized import requantize, unpack


@dataclass(frozen=True, slots=True)
class Written:
    """What was written.

    Attributes:
        checkpoint: the base's weights.
        dtype: of the merged weights.
        way: shard by shard or as a whole.
        shards: facts of each file.
        untied: whether head and embedding came apart.
    """

    checkpoint: Checkpoint
    dtype: Resolved[torch.dtype]
    way: Resolved[str]
    shards: list[dict[str, Any]]
    untied: bool


def write_weights(world: MergeWorld, staging: Path, *, output: Path, reporter: Reporter) -> Written:
    """Write merged weights and their configuration.

    Args:
        world: what the merge works with.
        staging: where they go.
        output: where they end up.
        reporter: told of progress.

    Raises:
        ModelError: base or adapter cannot be read.
        StorageError: the disk has no room.
        AdapterIntegrityError: a merged number is not finite.
    """
    checkpoint = open_checkpoint(world.config.model)
    stored = checkpoint.dtype()
    dtype = _resolve_dtype(world, stored)
    skeleton = draw_skeleton(world.config.model, world.parts, checkpoint, world.tokens)
    count = sum(shape.numel() for shape in skeleton.plain.values())
    check_room(output, count * dtype.value.itemsize)
    writer = _writer(world, checkpoint, skeleton, stored)
    obstacle = writer.obstacle()
    reporter.say(f"dtype {str(dtype.value).removeprefix('torch.')} ({dtype.reason})")
    if obstacle is None:
        way = Resolved("shard by shard", "every merged weight is stored as one tensor of the base")
        shards = writer.write(staging, lambda done, of: reporter.progress("merge", done, of, detail="shards"))
        reporter.finish("merge")
    else:
        way = Resolved("in memory as a whole", obstacle)
        shards = _write_whole(world, staging, dtype.value)
    reporter.say(f"merged {way.value} ({way.reason})")
    if writer.untied:
        reporter.say("embedding and head were one matrix and are two now: the adapter changed one of them alone")
    write_config(checkpoint.folder, staging, dtype=dtype.value, rows=skeleton.rows, untied=writer.untied)
    return Written(checkpoint, dtype, way, shards, writer.untied)


def _resolve_dtype(world: MergeWorld, stored: torch.dtype) -> Resolved[torch.dtype]:
    if world.dtype is not None:
        return Resolved(world.dtype, "set in --dtype")
    if world.quantization is not None and world.quantization.stored:
        return Resolved(getattr(torch, world.live_precision), "the type that the packed weights are used in")
    return Resolved(stored, "the type that the base's weights are stored in")


def _writer(world: MergeWorld, checkpoint: Checkpoint, skeleton: Skeleton, stored: torch.dtype) -> ShardWriter:
    keys = skeleton.keys
    chosen = world.quantization
    if chosen is None:
        return ShardWriter(checkpoint, keys, skeleton, world.dtype, stored)
    held, device, turned = getattr(torch, world.live_precision), world.device, skeleton.turned
    if chosen.stored:
        names = {keys.weights[name].rpartition(".weight")[0] for name in keys.weights if _is_packed(checkpoint, name)}
    else:
        names = set(skeleton.quantizable)

    def dequantize(layer: str, parts: Mapping[str, Tensor]) -> Tensor:
        if chosen.stored:
            return unpack(parts, dtype=held, device=device, turned=layer in turned)
        return requantize(parts["weight"], chosen, dtype=held, device=device, turned=layer in turned)

    dtype = world.dtype or (held if chosen.stored else None)
    return ShardWriter(checkpoint, keys, skeleton, dtype, stored, frozenset(names), dequantize)


def _is_packed(checkpoint: Checkpoint, name: str) -> bool:
    return name.endswith(".weight") and (
        f"{name}.absmax" in checkpoint.owners or f"{name.removesuffix('weight')}SCB" in checkpoint.owners
    )


def _write_whole(world: MergeWorld, staging: Path, dtype: torch.dtype) -> list[dict[str, Any]]:
    if world.quantization is not None and world.quantization.stored:
        raise ModelError(
            f"a base that is stored in {world.quantization.kind}, and not as its layers hold it, cannot be merged",
            where="key model.name",
            fix="use the adapter as it is, or train it on the unquantized model",
        )
    return merge_whole(
        world.config.model,
        world.parts,
        staging,
        dtype=dtype,
        tokens=world.tokens,
        quantization=world.quantization,
        held=getattr(torch, world.live_precision),
    )
