"""Tiny configurations of many architectures: those that take token trees and those that cannot."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WINDOW = 6  # of sliding layers: shorter than the rows of the tests
# Larger than the usual 0.02, so that attention is not uniform and a mistake in it shows.
SPREAD = 0.15
_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": SPREAD,
}
_GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": SPREAD}
_NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GEMMA = {"head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

# Name -> (transformers' model type, settings).
TREE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "llama": ("llama", _SHAPE),
    "qwen2": ("qwen2", _SHAPE | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", _SHAPE | {"head_dim": 8}),
    "mistral-window": ("mistral", _SHAPE | {"sliding_window": WINDOW}),
    "gemma2": ("gemma2", _SHAPE | _GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", _SHAPE | _GEMMA),
    "phi3": ("phi3", _SHAPE),
    "phi": ("phi", _SHAPE | {"num_key_value_heads": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "opt": (
        "opt",
        {
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "init_std": SPREAD,
            "word_embed_proj_dim": 32,
            "dropout": 0.0,
        },
    ),
    "gpt-neox": ("gpt_neox", _SHAPE | _NO_DROPOUT),
    "olmo2": ("olmo2", _SHAPE),
    "cohere": ("cohere", _SHAPE),
    "granite": ("granite", _SHAPE | {"logits_scaling": 4.0}),
    "mixtral": ("mixtral", _SHAPE | {"num_local_experts": 4}),
    "qwen3-moe": ("qwen3_moe", _SHAPE | _EXPERTS | {"head_dim": 8}),
    "gpt-oss": ("gpt_oss", _SHAPE | {"head_dim": 8, "num_local_experts": 4, "sliding_window": WINDOW}),
    "stablelm": ("stablelm", _SHAPE),
}
# Name -> (transformers' model type, settings, what the reason for the padded layout says).
OTHER_FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "gptj": (
        "gptj",
        _GPT | {"rotary_dim": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "0 of 2 layers attend through transformers' attention interface",
    ),
    "bloom": (
        "bloom",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": SPREAD} | _NO_DROPOUT,
        "layers attend through transformers' attention interface",
    ),
    "falcon-alibi": ("falcon", _SHAPE | _NO_DROPOUT | {"alibi": True}, "ALiBi biases attention by distance in the row"),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256, "initializer_range": SPREAD}, ""),
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": SPREAD}, ""),
    "qwen3-next": (
        "qwen3_next",
        _SHAPE
        | _EXPERTS
        | {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 32,
        },
        "linear_attention",
    ),
    "lfm2": ("lfm2", _SHAPE | {"layer_types": ["conv", "full_attention"]}, "conv"),
    "llama4": (
        "llama4_text",
        _SHAPE
        | {"head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 1}
        | {"attention_chunk_size": 8, "attn_temperature_tuning": True, "no_rope_layers": [1, 0], "floor_scale": 2},
        "temperature is tuned by place in the row",
    ),
}


def build_family(name: str, *, vocabulary: int, seed: int = 0) -> PreTrainedModel:
    """Return a random model of some 10,000 parameters, float32, without dropout.

    What begins at zero (biases, sinks) is drawn too, or leaving it out would not show.
    """
    kind, settings = TREE_FAMILIES[name] if name in TREE_FAMILIES else OTHER_FAMILIES[name][:2]
    ids = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**ids, **settings))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1 and parameter_name.endswith(("bias", "sinks")):
                parameter.normal_(std=SPREAD)
    return model.requires_grad_(False).float()


def lora_targets(name: str) -> str | list[str]:
    """Return `lora.target_modules` for a family: everything that its tests can adapt."""
    if name in ("mixtral", "qwen3-moe", "gpt-oss", "llama4"):
        return _ATTENTION
    return {"qwen3-next": _ATTENTION}.get(name, "auto")
