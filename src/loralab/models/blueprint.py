"""A model as a run would train it, without numbers: base and adapter on the meta device.

Owns building it from the configuration alone, its parameters by kind, and the memory of its steps.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from loralab.config.schema import LoraConfig, ModelConfig
from loralab.errors import excerpt
from loralab.models.adapters import build_adapter
from loralab.models.attention import TREE_ATTENTION, TreeLayout, UnsupportedAttention, carry_layout, use_attention
from loralab.models.families import find_tree_obstacle
from loralab.models.layer_stack import enable_recomputation
from loralab.models.load import SettledBase, settle_base
from loralab.models.memory_trace import META, MemoryTrace, WithoutNumbers, trace_memory
from loralab.models.new_tokens import grow_vocabulary
from loralab.models.picture_features import on_axes
from loralab.models.precision import Resolved
from loralab.models.quantization import BITSANDBYTES
from loralab.models.self_check import kernels_to_try
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.trainable_tokens import new_tokens_of
from loralab.models.variants import needs_activations
from loralab.models.visibility import TreeSegment
from loralab.models.vision import auto_class

if BITSANDBYTES:
    from loralab.models.blank_quantized import quantize_blank
    from loralab.models.quantized import quantized_layers, weight_sizes

# What a model that cannot run without numbers was seen to raise: experts, whose rows depend on the router.
_REFUSALS = (
    RuntimeError,
    NotImplementedError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    KeyError,
    UnsupportedAttention,
)


class Untraceable(Exception):
    """A model that exists only with its numbers."""


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A model without numbers.

    Attributes:
        model: base and adapter.
        settled: what was chosen for the base.
        choices: what was chosen for the adapter.
        lora: the adapter section, tokens by id.
        device: where the run computes.
        checkpointing: whether activations are recomputed.
    """

    model: SupervisedPeftModel
    settled: SettledBase
    choices: dict[str, Resolved[str]]
    lora: LoraConfig
    device: torch.device
    checkpointing: bool

    def trace(self, run: Callable[[], object]) -> MemoryTrace | str:
        """Return the tensors of a computation with the model, or the reason why it cannot be followed."""
        try:
            return trace_memory(self.model, run)
        except _REFUSALS as error:
            return f"{type(self.model.language_model).__name__} does not run without numbers: {excerpt(error)}"
        finally:
            self.model.zero_grad(set_to_none=True)


def draw_blueprint(
    section: ModelConfig,
    lora: LoraConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    checkpointing: bool,
    seed: int,
) -> Blueprint:
    """Build a run's model without its numbers.

    Args:
        section: the model section.
        lora: the adapter section, tokens by id.
        dtype: compute type.
        device: where the run computes.
        checkpointing: whether activations are recomputed.
        seed: of the adapter, for its choices alone.

    Raises:
        LoralabError: what loading or adapting the base would raise too.
        Untraceable: the model cannot be built without numbers.
    """
    config, settled = settle_base(section, device)
    try:
        return _draw(section, lora, config, settled, dtype=dtype, device=device, checkpointing=checkpointing, seed=seed)
    except _REFUSALS as error:
        raise Untraceable(f"the model cannot be built without numbers: {excerpt(error)}") from error


def _draw(
    section: ModelConfig,
    lora: LoraConfig,
    config: PreTrainedConfig,
    settled: SettledBase,
    *,
    dtype: torch.dtype,
    device: torch.device,
    checkpointing: bool,
    seed: int,
) -> Blueprint:
    base = _blank_base(section, config, settled, dtype)
    grown = grow_vocabulary(base, new_tokens_of(lora))
    if checkpointing:
        # What is recomputed runs inside `backward`, where the mode around it does not reach.
        enable_recomputation(base, context_fn=lambda: (nullcontext(), WithoutNumbers()))
    # EVA deals ranks out by activations, in all as many as LoRA has.
    shape = lora.model_copy(update={"variant": "lora"}) if needs_activations(lora) else lora
    with WithoutNumbers(), torch.random.fork_rng(devices=[]):
        model, choices = build_adapter(base, shape, seed=seed)
    for name in ("head", "first_weights"):  # what only numbers tell
        choices.pop(name, None)
    model.planned_device_type = device.type
    return Blueprint(model, settled, grown | choices, lora, device, checkpointing)


def _blank_base(
    section: ModelConfig, config: PreTrainedConfig, settled: SettledBase, dtype: torch.dtype
) -> PreTrainedModel:
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        del config.quantization_config  # from_config would ask for weights that are packed so
    with torch.device(META):
        base: PreTrainedModel = auto_class(config).from_config(
            config,
            dtype=dtype,
            attn_implementation=settled.attention.value,
            trust_remote_code=section.trust_remote_code,
        )
    base.requires_grad_(False)
    if settled.quantization.value is not None:
        quantize_blank(base, settled.quantization.value)
    base.config.use_cache = False
    return base


def describe_trainable(model: SupervisedPeftModel) -> list[dict[str, Any]]:
    """Return the trained parameters by kind of layer: `kind`, `layers`, `parts` (`shape`, `count` each), `parameters`.

    Args:
        model: base with adapter.
    """
    parts: dict[str, dict[tuple[str, tuple[int, ...]], int]] = defaultdict(lambda: defaultdict(int))
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            kind, part = _kind_and_part(name)
            parts[kind][part, tuple(weight.shape)] += 1
    return [
        {
            "kind": kind,
            "parts": [{"part": part, "shape": list(shape), "count": n} for (part, shape), n in sorted(found.items())],
            "parameters": sum(n * _numel(shape) for (_, shape), n in found.items()),
        }
        for kind, found in sorted(parts.items())
    ]


# How names of PEFT's parts of a layer begin.
_PARTS = ("lora_", "vera_", "hada_", "lokr_", "ia3_", "trainable_tokens_")
# What PEFT puts around a layer, of no meaning to who reads of it.
_WRAPPING = ("weight", "default", "base_layer", "original_module", "token_adapter")


def _kind_and_part(name: str) -> tuple[str, str]:
    """Return the layer's and the adapter part's name: "...q_proj.lora_A.default.weight" is (q_proj, lora_A)."""
    names = [each for each in name.split(".") if each not in _WRAPPING]
    place = next((index for index, each in enumerate(names) if each.startswith(_PARTS)), 0)
    if not place:
        return names[-1], "weight"
    return names[place - 1], names[place]


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def describe_weights(model: SupervisedPeftModel) -> Mapping[str, Any]:
    """Return how many parameters there are and what the frozen ones take, in bytes.

    Args:
        model: base with adapter.

    Returns:
        `total`, `trainable`, `frozen_bytes` (those that are not quantized), `grown_bytes` (of these, what grew for
        new tokens: no pages of a file), `quantized` (`layers`, `weights`, `bytes`, `bits_per_weight`, or None),
        `largest` (elements of the largest quantized weight).
    """
    layers = [layer for _, layer in quantized_layers(model)] if BITSANDBYTES else []
    packed = {id(layer.weight) for layer in layers}
    sizes = list(weight_sizes(model)) if BITSANDBYTES else [(p.numel(), p.requires_grad) for p in model.parameters()]
    plain = [p for p in model.parameters() if not p.requires_grad and id(p) not in packed]
    weights = [layer.in_features * layer.out_features for layer in layers]
    stored = sum(layer.stored_bytes() for layer in layers)
    quantized = {
        "layers": len(layers),
        "weights": sum(weights),
        "bytes": stored,
        "bits_per_weight": round(8 * stored / max(sum(weights), 1), 3),
    }
    return {
        "total": sum(size for size, _ in sizes),
        "trainable": sum(size for size, trains in sizes if trains),
        "trainable_bytes": sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad),
        "frozen_bytes": sum(p.numel() * p.element_size() for p in plain),
        "grown_bytes": _grown_bytes(model),
        "quantized": quantized if layers else None,
        "largest": max(weights, default=0),
    }


def _grown_bytes(model: SupervisedPeftModel) -> int:
    """Return the bytes of frozen tables with more rows than on disk, whose number the configuration keeps."""
    rows = int(model.embedding.weight.shape[0])
    if rows <= getattr(model.language_model.config.get_text_config(), "vocab_size", rows):
        return 0
    tables = [p for p in model.parameters() if not p.requires_grad and p.dim() == 2 and p.shape[0] == rows]
    return sum(table.numel() * table.element_size() for table in tables)


def expect_tree_kernel(blueprint: Blueprint) -> Resolved[str | None]:
    """Return what will compute attention over trees, as far as that can be told without weights.

    A loaded model is asked for more (`self_check.py`): whether its numbers are right.

    Args:
        blueprint: the model without numbers.
    """
    base = blueprint.model.language_model
    if not type(base).__module__.startswith("transformers."):
        return Resolved(None, "its code is not part of transformers")
    obstacle = find_tree_obstacle(base.config)
    if obstacle is not None:
        return Resolved(None, obstacle)
    blueprint.model.eval()  # keyed dropout wants to know the tokens of a training forward
    depth = torch.arange(_ROW, device=META)
    layout = TreeLayout(depth, torch.full_like(depth, _ROW), [_Chain(0, _ROW)], "per_tree")

    def run() -> None:
        use_attention(base, TREE_ATTENTION)
        base(
            input_ids=depth[None],
            attention_mask=carry_layout(layout),
            position_ids=on_axes(depth[None], base.config),
            use_cache=False,
        )

    failure = blueprint.trace(run)
    if isinstance(failure, str):
        return Resolved(None, failure)
    layers = int(base.config.get_text_config().num_hidden_layers)
    if layout.calls != layers:
        return Resolved(None, f"{layout.calls} of {layers} layers attend through transformers' attention interface")
    kernel = kernels_to_try(blueprint.device.type, base.dtype)[0]
    return Resolved(kernel, "expected: its layers attend through transformers' interface; train asks the loaded model")


_ROW = 16


@dataclass(frozen=True, slots=True)
class _Chain:
    start: int
    end: int
    branching: bool = False
    segments: Sequence[TreeSegment] = ()
