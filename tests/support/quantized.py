"""Quantized bases of every family that tests use, and the plain model that each one stands for."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loralab.config.schema import ModelConfig
from loralab.models.load import load_base_model
from loralab.models.quantized import quantized_layers
from support import tiny

CPU = torch.device("cpu")
# Every setting; int8 has no second form.
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"quantization": "nf4"},
    "nf4, single": {"quantization": "nf4", "double_quantization": False},
    "fp4": {"quantization": "fp4"},
    "fp4, single": {"quantization": "fp4", "double_quantization": False},
    "int8": {"quantization": "int8"},
}
# Widths of 32 and 64; of 44 and 172, which neither 32 nor 64 divides; of 96, where the library's own
# dequantization on a CPU is wrong.
SHAPES: dict[str, tuple[tiny.Family, dict[str, int]]] = {
    "gpt2": ("gpt2", {}),
    "llama": ("llama", {}),
    "qwen2, with bias": ("qwen2", {}),
    "llama, widths 44 and 172": ("llama", {"hidden_size": 44, "intermediate_size": 172}),
    "qwen2, widths 96 and 36": ("qwen2", {"hidden_size": 96, "intermediate_size": 36}),
    "gpt2, width 44": ("gpt2", {"n_embd": 44}),
}


def save_base(folder: Path, shape: str, *, seed: int = 0) -> Path:
    """Write a tiny base of one of `SHAPES`, biases drawn, with its tokenizer."""
    family, sizes = SHAPES[shape]
    tokenizer = tiny.build_tokenizer()
    config = tiny.build_model(family, vocabulary=len(tokenizer), seed=seed).config
    config.update(sizes)
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.data = 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path, **settings: Any) -> PreTrainedModel:
    """Load a base in float32 on the CPU."""
    base, _ = load_base_model(ModelConfig(name=str(folder), **settings), dtype=torch.float32, device=CPU)
    return base


def plain_twin(folder: Path, quantized: nn.Module) -> nn.Module:
    """Return the base of transformers' own plain layers, with the weights that the quantized one stands for."""
    twin: nn.Module = AutoModelForCausalLM.from_pretrained(folder)
    for name, layer in quantized_layers(quantized):
        plain = twin.get_submodule(name.replace("base_model.model.", "").replace(".base_layer", ""))
        weight = expected_weights(layer)
        plain.weight.data = weight.T.contiguous() if isinstance(plain, Conv1D) else weight
    return twin


def expected_weights(layer: Any) -> torch.Tensor:
    """Dequantize a layer's weights number by number, from the format's definition."""
    weight = layer.weight
    if weight.dtype == torch.int8:
        return weight.data.float() * (weight.SCB / 127)[:, None]
    state = weight.quant_state
    packed = weight.data.flatten().to(torch.int64)
    numbers = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: state.shape.numel()]
    scales = state.absmax
    if state.nested:
        second = state.state2
        blocks = torch.arange(scales.numel()) // second.blocksize
        scales = second.code[scales.to(torch.int64)] * second.absmax[blocks] + state.offset
    blocks = torch.arange(numbers.numel()) // state.blocksize
    return (state.code[numbers] * scales[blocks]).view(state.shape)
