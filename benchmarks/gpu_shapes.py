"""Models of real shapes with random weights, made on the device, and rows of realistic lengths.

Owns what `gpu_throughput.py` and `gpu_profile.py` measure. Nothing is read from a file.
"""

import copy
from typing import Any

import numpy as np
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel, Qwen2Config

from loralab.config.schema import LoraConfig
from loralab.data.example import Branch, TokenizedExample
from loralab.models.adapters import build_adapter
from loralab.models.layer_stack import enable_recomputation
from loralab.models.quantized import QuantizedLinear4bit
from loralab.models.self_check import resolve_tree_kernel
from loralab.models.supervised import SupervisedPeftModel
from loralab.models.targets import linear_layers

SHAPES: dict[str, Any] = {
    "tiny": LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    ),
    "gpt2": GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "qwen2.5-0.5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    "llama3.2-3b": LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
    ),
    "llama3-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
}
LORA = LoraConfig(r=16, alpha=16)


def build_base(
    shape: str, *, quantization: str, dtype: torch.dtype, device: torch.device, own_layers: bool
) -> PreTrainedModel:
    """Return a frozen base with random weights on the device.

    Args:
        shape: name in `SHAPES`.
        quantization: none or nf4 (with double quantization).
        dtype: of what is not quantized, and of what is computed.
        device: where to.
        own_layers: loralab's quantized layers, not the library's.
    """
    torch.manual_seed(0)
    with torch.device(device):
        config = copy.deepcopy(SHAPES[shape])  # models write into theirs
        base: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    base.requires_grad_(False)
    base.config.use_cache = False
    if quantization == "nf4":
        _quantize(base, dtype, device, own_layers=own_layers)
    return base


def _quantize(base: Any, dtype: torch.dtype, device: torch.device, *, own_layers: bool) -> None:
    layer: Any
    for name, layer in linear_layers(base).items():
        stored: Any = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=dtype,
            quant_type="nf4",
            device="meta",
        )
        stored.weight = Params4bit(
            layer.weight.data,
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=True,
            module=stored,
        ).to(device)
        stored.bias = layer.bias
        base.set_submodule(name, QuantizedLinear4bit.adopt(stored) if own_layers else stored)
    base.is_loaded_in_4bit = True  # by which PEFT knows


def build_ours(
    shape: str,
    *,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    checkpointing: bool = False,
    dropout: float = 0.0,
) -> SupervisedPeftModel:
    """Return loralab's model with its adapter and its attention chosen; arguments as in `build_base`."""
    base: Any = build_base(shape, quantization=quantization, dtype=dtype, device=device, own_layers=True)
    if checkpointing:
        enable_recomputation(base)
    model, _ = build_adapter(base, LORA.model_copy(update={"dropout": dropout}), seed=0)
    model.to(device)
    model.tree_kernel = resolve_tree_kernel(model).value
    return model.train()


def draw_rows(
    count: int, *, vocabulary: int, prompt: int, answer: int, longest: int, preamble: int, seed: int = 0
) -> list[TokenizedExample]:
    """Return rows of random tokens whose lengths are spread as those of instruction data: a few are very long.

    Args:
        count: rows.
        vocabulary: token ids are below it.
        prompt: median tokens of a prompt, without the preamble.
        answer: median tokens of an answer.
        longest: most tokens of a row.
        preamble: tokens that all prompts begin with.
        seed: of lengths and tokens.
    """
    draw = np.random.default_rng(seed)
    start = draw.integers(3, vocabulary, preamble)
    rows = []
    for index in range(count):
        asked = int(np.clip(draw.lognormal(np.log(prompt), 0.5), 4, longest // 2 - preamble))
        answered = int(np.clip(draw.lognormal(np.log(answer), 0.9), 2, longest - preamble - asked))
        ids = np.concatenate([start, draw.integers(3, vocabulary, asked)]).astype(np.int32)
        rows.append(TokenizedExample(index, 0, (Branch(ids, draw.integers(3, vocabulary, answered).astype(np.int32)),)))
    return rows
