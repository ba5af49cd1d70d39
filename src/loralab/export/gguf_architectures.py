"""Which models a GGUF file can hold here, and how their weights are named and laid out in it.

Owns the names of tensors, the rows that llama.cpp wants in another order, and the settings it reads. A model is
refused where llama.cpp has no place for one of its settings. Source: llama.cpp, gguf-py/gguf/constants.py.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from loralab.errors import ModelError

Array = npt.NDArray[Any]

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ROPE_FACTORS = "rope_freqs.weight"


def _refuse_llama(config: Any) -> Iterator[str]:
    if config.attention_bias or config.mlp_bias:
        yield "its layers have biases, which a file of this kind is read without"


def _refuse_qwen2(config: Any) -> Iterator[str]:
    if config.use_sliding_window or "sliding_attention" in (config.layer_types or ()):
        yield "it has a sliding window, and llama.cpp has no key for one in this kind of model"
    head = getattr(config, "head_dim", None)
    if head not in (None, config.hidden_size // config.num_attention_heads):
        yield "its heads are not hidden_size / num_attention_heads wide"
    if rope_type(config) != "default":
        yield f"its rope scaling is {rope_type(config)!r}"


@dataclass(frozen=True, slots=True)
class Architecture:
    """How models of one type are written.

    Attributes:
        name: llama.cpp's.
        interleaves: whether rows of query and key weights pair neighbours, where transformers pairs halves.
        refuse: yields what a configuration has that cannot be written.
    """

    name: str
    interleaves: bool
    refuse: Callable[[Any], Iterator[str]]


# transformers' model_type: how it is written.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", True, _refuse_llama),
    "qwen2": Architecture("qwen2", False, _refuse_qwen2),
}


def rope_type(config: Any) -> str:
    """Return the kind of rotary embedding that a configuration names."""
    return str((config.rope_parameters or {}).get("rope_type", "default"))


def choose_architecture(config: PreTrainedConfig) -> Architecture:
    """Return how a model is written.

    Raises:
        ModelError: its type, or one of its settings, has no place in a GGUF file that is written here.
    """
    found = ARCHITECTURES.get(str(config.model_type))
    if found is None:
        raise ModelError(
            f"GGUF files are written for {' and '.join(ARCHITECTURES)} models, and this one is {config.model_type}",
            where="option --to gguf",
            fix="export --to vllm, or --to ollama where Ollama imports this family; or merge it and use llama.cpp's "
            "own convert_hf_to_gguf.py",
        )
    reasons = list(found.refuse(config))
    settings: Any = config
    if settings.hidden_act != "silu":
        reasons.append(f"its activation is {settings.hidden_act!r}, and llama.cpp computes silu")
    if rope_type(config) not in ("default", "llama3"):
        reasons.append(f"its rope scaling is {rope_type(config)!r}; written are default and llama3")
    if reasons:
        raise ModelError(
            f"this {config.model_type} model cannot be written as GGUF: {'; '.join(dict.fromkeys(reasons))}",
            where="the model's config.json",
            fix="export --to vllm, or merge it and use llama.cpp's own convert_hf_to_gguf.py",
        )
    return found


def name_tensor(name: str) -> str:
    """Return a tensor's name in a GGUF file.

    Raises:
        ModelError: it is none of these models'.
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    found = _LAYER.fullmatch(name)
    part, _, kind = found[2].rpartition(".") if found else ("", "", "")
    if found is None or part not in _INSIDE or kind not in ("weight", "bias"):
        raise ModelError(
            f"the model has a tensor that a GGUF file of its type has no place for: {name}",
            where="the merged model",
            fix="merge the adapter again from its run, or export --to vllm",
        )
    return f"blk.{found[1]}.{_INSIDE[part]}.{kind}"


def lay_out(name: str, weights: Array, config: Any, architecture: Architecture) -> Array:
    """Return a tensor with its rows in llama.cpp's order.

    Args:
        name: in the GGUF file.
        weights: rows first, as transformers has them.
        config: of the model.
        architecture: of the file.
    """
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if not architecture.interleaves or heads is None:
        return weights
    # A head's first half and second half turn together: pair i is rows i and i + half; llama.cpp has them side by side.
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weights.shape))


def rope_factors(config: PreTrainedConfig) -> Array | None:
    """Return by what each rotary frequency is divided, or None where none is."""
    if rope_type(config) == "default":
        return None
    settings: Any = config
    plain: Any = type(config)(**{**config.to_dict(), "rope_parameters": _default_rope(settings)})
    scaled, own = (LlamaRotaryEmbedding(each).inv_freq.to(torch.float64) for each in (settings, plain))
    factors: Array = (own / scaled).to(torch.float32).numpy()
    return factors


def _default_rope(config: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}


def add_settings(writer: Any, config: PreTrainedConfig, architecture: Architecture) -> None:
    """Write what llama.cpp and transformers read of a model's shape.

    Args:
        writer: `gguf.GGUFWriter`.
        config: of the model.
        architecture: of the file.
    """
    settings: Any = config
    head = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(settings.num_attention_heads)
    writer.add_head_count_kv(settings.num_key_value_heads)
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    writer.add_rope_freq_base(float(settings.rope_parameters["rope_theta"]))
    writer.add_vocab_size(settings.vocab_size)
    if architecture.name == "llama":
        writer.add_rope_dimension_count(head)
        if head * settings.num_attention_heads != settings.hidden_size:
            writer.add_key_length(head)
            writer.add_value_length(head)
