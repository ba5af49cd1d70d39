"""Tiny models, tokenizers and rows, built in code: nothing is downloaded, nothing is stored."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

Family = Literal["gpt2", "llama", "qwen2"]
END = "<|end|>"
# Larger than the usual 0.02, so that attention is not uniform and a mistake in it shows.
_SPREAD = 0.15
# The Alpaca preamble's words become tokens of their own, so that prompts stay short.
_PREAMBLE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n\n\n### Input:\n\n\n### Response:\n"
)
_WORDS = [
    "red",
    "blue",
    "green",
    "cat",
    "dog",
    "bird",
    "runs",
    "sleeps",
    "sings",
    "one",
    "two",
    "three",
    "house",
    "tree",
    "river",
    "the",
    "a",
    "and",
    "of",
    "in",
    "is",
]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of at most 700 tokens with one special token, its end token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([" ".join(_WORDS), _PREAMBLE] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


def build_model(family: Family = "llama", *, vocabulary: int, seed: int = 0) -> torch.nn.Module:
    """Return a random model of about 50,000 parameters, float32."""
    torch.manual_seed(seed)
    if family == "gpt2":
        shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": _SPREAD}
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **shape))
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    config = config_class(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=_SPREAD,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=family == "qwen2",
    )
    return model_class(config)


def save_base(folder: Path, family: Family = "llama", *, seed: int = 0) -> Path:
    """Write a tiny base model with its tokenizer to `folder` and return it."""
    tokenizer = build_tokenizer()
    build_model(family, vocabulary=len(tokenizer), seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def alpaca_rows(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Return Alpaca rows of different lengths; every third has an input."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choice(_WORDS) for _ in range(draw.randint(low, high)))

    return [
        {"instruction": words(2, 8), "input": words(1, 5) if i % 3 == 0 else "", "output": words(1, 14)}
        for i in range(count)
    ]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as a JSON list and return the path."""
    path.write_text(json.dumps(list(rows), ensure_ascii=False), encoding="utf-8")
    return path


def run_config(base: Path, rows: Path, output: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a short float32 CPU run; `sections` override field by field."""
    config: dict[str, dict[str, Any]] = {
        "model": {"name": str(base), "precision": "float32", "device": "cpu"},
        "data": {"train": str(rows), "max_length": 128, "cache_dir": str(output.parent / "cache")},
        "lora": {"r": 4, "alpha": 8},
        "training": {
            "num_train_epochs": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
        },
        "evaluation": {"num_samples": 0, "bootstrap_samples": 200},
        "output": {"dir": str(output)},
    }
    for name, values in sections.items():
        config.setdefault(name, {}).update(values)
    return config
