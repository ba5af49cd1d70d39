"""The vision base itself: its tokenizer, its picture processor, its random weights and its folder."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from vision_prose import plain, sayings, sentence
from vision_world import SIDE, make_scene

END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
VOCABULARY, TOKENIZER_SCENES, SAYINGS_EACH = 640, 3000, 4
PATCH, MERGE, FRAMES = 8, 2, 2
# Backgrounds are light: so they become about 0, and shapes stand out from them.
MEAN, DEVIATION = 0.93, 0.3
IMAGE_TOKENS = (SIDE // (PATCH * MERGE)) ** 2
HIDDEN, LAYERS, HEADS, KV_HEADS, INNER, POSITIONS = 160, 5, 4, 2, 320, 1024
VISION_WIDTH, VISION_LAYERS, VISION_HEADS, VISION_RATIO = 96, 3, 4, 4
# Wider than the usual 0.02, which suits far larger layers.
INITIAL_SPREAD = 0.06
# The tokenizer (never the model) sees common words of questions, or prompts would be spelled out by letters.
QUESTION_WORDS = (
    "is there not a does the image contain what which how many are do can you see look at picture? "
    "user assistant system\nuser\nassistant\nanswer: question: colour size big or small? present? shape? shapes?"
)
QUESTION_REPEATS = 400
TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def _tokenizer_lines(seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(TOKENIZER_SCENES):
        for said in islice(sayings(rng, make_scene(rng)), SAYINGS_EACH):
            yield plain(said)
            yield plain(sentence(said))
    yield from [QUESTION_WORDS, QUESTION_WORDS.title()] * QUESTION_REPEATS


def new_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Trains the byte-level BPE tokenizer; any text round-trips through it.

    Args:
        seed: The seed of the text that it learns from.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, TURN, TURN_END, VISION_START, VISION_END, IMAGE, VIDEO],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_tokenizer_lines(seed), trainer)
    marks = (TURN, TURN_END, VISION_START, VISION_END, IMAGE, VIDEO)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[AddedToken(mark, special=True) for mark in marks],
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )


def new_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLProcessor:
    """Makes the processor: a picture of 64 by 64 pixels keeps its size, larger ones shrink to it."""
    bounds = {"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": SIDE * SIDE}
    shape = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": FRAMES, "size": bounds}
    shape |= {"image_mean": [MEAN] * 3, "image_std": [DEVIATION] * 3}
    pictures, videos = Qwen2VLImageProcessor(**shape), Qwen2VLVideoProcessor(**shape)
    return Qwen2VLProcessor(pictures, tokenizer, videos, chat_template=TEMPLATE)


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2VLForConditionalGeneration:
    """Makes the base with random weights.

    Args:
        tokenizer: Whose tokens it reads and writes.
        seed: The seed of the weights.
    """
    torch.manual_seed(seed)
    ids = {
        name: tokenizer.convert_tokens_to_ids(mark)
        for name, mark in (
            ("image_token_id", IMAGE),
            ("video_token_id", VIDEO),
            ("vision_start_token_id", VISION_START),
            ("vision_end_token_id", VISION_END),
        )
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": POSITIONS,
        "initializer_range": INITIAL_SPREAD,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 6, 6]},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": VISION_LAYERS,
        "embed_dim": VISION_WIDTH,
        "hidden_size": HIDDEN,
        "num_heads": VISION_HEADS,
        "mlp_ratio": VISION_RATIO,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "initializer_range": INITIAL_SPREAD,
    }
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    return Qwen2VLForConditionalGeneration(config)


def write_base(
    folder: Path, model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, notes: dict[str, str]
) -> None:
    """Writes the base's folder: configuration, float16 weights, tokenizer, processor and checksums.

    Args:
        folder: Where to; made if need be.
        model: The base.
        tokenizer: Its tokenizer.
        notes: What the weights' file says of their making.
    """
    folder.mkdir(parents=True, exist_ok=True)
    new_processor(tokenizer).save_pretrained(folder)
    # The output layer is the embedding itself (tied), so it is not stored twice.  The library's own
    # names differ between the model in memory and its file, so the library writes it.
    model.half()
    model.config.architectures = ["Qwen2VLForConditionalGeneration"]
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END)],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    _write_notes(folder / "model.safetensors", notes)
    model.float()
    _write_sums(folder)


def _write_notes(path: Path, notes: dict[str, str]) -> None:
    weights = {name: value.clone() for name, value in load_file(path).items()}
    save_file(weights, path, {"format": "pt", **notes})
    path.chmod(0o644)


def _write_sums(folder: Path) -> None:
    names = sorted(p.name for p in folder.iterdir() if p.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")
