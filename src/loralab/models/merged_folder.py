"""The weights and the configuration of a merged model, written shard by shard.

Owns which tensor goes into which file and in which type. One shard of the base, the shard that is made of it and one
layer in float32 are in memory at a time.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from loralab.errors import ModelError
from loralab.models.merge_source import INDEX_FILE, SINGLE_FILE, Checkpoint, KeyMap
from loralab.models.merging import Skeleton, narrow
from loralab.models.new_tokens import lengthen
from loralab.run import write_json

# Beside a weight that is stored in 4 or 8 bits.
_BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format")
_STATE = ".quant_state."

Dequantizer = Callable[[str, Mapping[str, Tensor]], Tensor]


@dataclass(slots=True)
class ShardWriter:
    """Writes the shards of a merged model.

    Attributes:
        checkpoint: the base's weights.
        keys: which weight each of its tensors is.
        skeleton: base and adapters.
        dtype: type of all weights, or None where each keeps the one that it is stored in.
        stored: type that most of the base's numbers are stored in.
        quantized: layers whose weight is taken as quantization leaves it.
        dequantize: gives such a weight (its layer's name, the layer's tensors), float32.
    """

    checkpoint: Checkpoint
    keys: KeyMap
    skeleton: Skeleton
    dtype: torch.dtype | None
    stored: torch.dtype
    quantized: frozenset[str] = frozenset()
    dequantize: Dequantizer | None = None
    _untied: bool = field(default=False, init=False)
    _sources: dict[str, str] = field(default_factory=dict, init=False)
    _layers: dict[str, list[str]] = field(default_factory=dict, init=False)
    _ready: tuple[str, dict[str, Tensor]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._sources = self.keys.sources()
        for weight, name in self._sources.items():
            self._layers.setdefault(self._layer_of(weight), []).append(name)
        self._untied = self._comes_apart()

    @property
    def untied(self) -> bool:
        """Whether head and embedding were one matrix in the base and are two in the merged model."""
        return self._untied

    def obstacle(self) -> str | None:
        """Return why the merge cannot go shard by shard, or None where it can."""
        for layer in (*self.skeleton.layers, *self.quantized):
            for part in self.skeleton.parameters_of(layer):
                weight = f"{layer}.{part}"
                if weight not in self._sources and weight != self.skeleton.head:
                    return f"{weight} is not stored as one tensor of the base"
        return None

    def write(self, folder: Path, told: Callable[[int, int], None]) -> list[dict[str, Any]]:
        """Write all shards, and the index where there are several.

        Args:
            folder: where they go; it exists.
            told: called with the number of shards written and of all.

        Returns:
            `file`, `tensors`, `merged` (layers), `bytes` of each shard.
        """
        facts, where, total = [], {}, 0
        for number, file in enumerate(self.checkpoint.files, start=1):
            tensors, merged = self._make(file)
            name = SINGLE_FILE if len(self.checkpoint.files) == 1 else file.name
            save_file(tensors, str(folder / name), metadata={"format": "pt"})
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            facts.append({"file": name, "tensors": len(tensors), "merged": merged, "bytes": size})
            where.update(dict.fromkeys(tensors, name))
            total += size
            del tensors
            _sync(folder / name)
            told(number, len(self.checkpoint.files))
        if len(facts) > 1:
            write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": where})
        return facts

    def _make(self, file: Path) -> tuple[dict[str, Tensor], int]:
        out: dict[str, Tensor] = {}
        merged = set()
        for name in self.checkpoint.names(file):
            weight = self.keys.weights.get(name)
            if weight is None:
                out[name] = self._cast(name, self.checkpoint.read(name), None)
                continue
            layer = self._layer_of(weight)
            if weight != f"{layer}.weight" and layer in self.quantized and _is_beside(name):
                continue  # belongs to a packed weight, which is written as it is dequantized
            if layer not in self.skeleton.layers and layer not in self.quantized:
                out[name] = self._cast(name, self._rows(weight, self.checkpoint.read(name)), None)
            else:
                value = self._layer(layer)[weight[len(layer) + 1 :]]
                out[name] = self._cast(name, value, self._stored_type(name))
                merged.add(layer)
            if self._untied and weight == self.skeleton.embedding and self.skeleton.head not in self._sources:
                head = self._layer_of(self.skeleton.head)
                out[self.skeleton.head] = self._cast(self.skeleton.head, self._matrix(head), self._stored_type(name))
                merged.add(head)
        self._ready = None
        return out, len(merged & set(self.skeleton.layers))

    def _layer(self, layer: str) -> dict[str, Tensor]:
        """Return the weights of a layer with its adapters, float32; kept until another one is asked for."""
        if self._ready is None or self._ready[0] != layer:
            weights = self._base_weights(layer)
            done = self.skeleton.merged(layer, weights) if layer in self.skeleton.layers else weights
            self._ready = (layer, weights | done)
        return self._ready[1]

    def _base_weights(self, layer: str) -> dict[str, Tensor]:
        parts = {}
        for name in self._layers.get(layer, ()):
            parts[self.keys.weights[name][len(layer) + 1 :]] = self.checkpoint.read(name)
        if not parts and f"{layer}.weight" == self.skeleton.head:
            parts["weight"] = self.checkpoint.read(self._sources[self.skeleton.embedding])
        if layer in self.quantized and self.dequantize is not None:
            bias = {"bias": parts["bias"]} if "bias" in parts else {}
            return {"weight": self.dequantize(layer, parts), **{key: value.float() for key, value in bias.items()}}
        rows = {part: self._rows(f"{layer}.{part}", value) for part, value in parts.items()}
        return {part: value.float() for part, value in rows.items()}

    def _rows(self, weight: str, value: Tensor) -> Tensor:
        """Return a table of tokens with the rows that its adapters' tokenizer needs, as training gave it them."""
        skeleton = self.skeleton
        held = skeleton.held.get(weight)
        if held is not None:
            value = held
        head_bias = f"{self._layer_of(skeleton.head)}.bias"
        if weight not in (skeleton.embedding, skeleton.head, head_bias) or value.shape[0] >= skeleton.rows:
            return value
        return lengthen(value, skeleton.rows)

    def _comes_apart(self) -> bool:
        skeleton = self.skeleton
        embedding, head = (self._layer_of(name) for name in (skeleton.embedding, skeleton.head))
        touched = (embedding in skeleton.layers) + (head in skeleton.layers)
        if not skeleton.tied or not touched or self.obstacle() is not None:
            return False
        if touched == 1:
            return True
        apart = not torch.equal(self._matrix(embedding), self._matrix(head))
        self._ready = None
        return apart

    def _matrix(self, layer: str) -> Tensor:
        return self._layer(layer)["weight"]

    def _layer_of(self, weight: str) -> str:
        for mark in (_STATE, *_BESIDE):
            if mark in weight:
                return weight.partition(".weight." if ".weight." in weight else mark)[0]
        return weight.rpartition(".")[0]

    def _stored_type(self, name: str) -> torch.dtype:
        kind = self.checkpoint.read(name).dtype
        return kind if kind in (torch.float32, torch.float16, torch.bfloat16, torch.float64) else self.stored

    def _cast(self, name: str, value: Tensor, stored: torch.dtype | None) -> Tensor:
        if not value.is_floating_point():
            return value.contiguous()
        return narrow(value, self.dtype or stored or value.dtype, name).contiguous()


def _is_beside(name: str) -> bool:
    return name.endswith(_BESIDE) or _STATE in name


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def write_config(source: Path, folder: Path, *, dtype: torch.dtype, rows: int, untied: bool) -> None:
    """Write a merged model's configuration: the base's own, but for what a merge changes.

    Args:
        source: the base's folder.
        folder: the merged model's.
        dtype: of its weights.
        rows: of its embedding.
        untied: whether head and embedding came apart.

    Raises:
        ModelError: the base's configuration cannot be read.
    """
    try:
        config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
        inner = [each for key in ("text_config", "vision_config") if isinstance(each := config.get(key), dict)]
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"cannot read config.json: {error}", where=str(source), fix="restore the file") from error
    name = str(dtype).removeprefix("torch.")
    config.pop("torch_dtype", None)
    config["dtype"] = name
    for each in (config, *inner):
        each.pop("quantization_config", None)
        for key in ("torch_dtype", "dtype"):
            if key in each:
                each[key] = name
        if each.get("vocab_size", rows) < rows:
            each["vocab_size"] = rows
        if untied and (each is config or "tie_word_embeddings" in each):
            each["tie_word_embeddings"] = False
    write_json(folder / "config.json", config)
