"""Tiny vision-language models with their real processors, and pictures, built in code."""

from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageDraw
from tokenizers import AddedToken
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.clip import CLIPImageProcessor

from support.tiny import build_tokenizer

VisionFamily = Literal["qwen2_vl", "qwen2_5_vl", "llava", "idefics3"]
VISION_FAMILIES: tuple[VisionFamily, ...] = ("qwen2_vl", "qwen2_5_vl", "llava", "idefics3")
_SPREAD = 0.15
_MARKS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As LLaVA's own: content is always a list, and pictures stand before the text of their turn.
_LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
# As SmolVLM's own, but that a generation prompt is written where it is asked for.
_IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %} {{ part['text'] }}{% else %}<image>{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
_IDEFICS_MARKS = (
    *("<|im_start|>", "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"),
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
_TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": _SPREAD,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def _tokenizer(marks: tuple[str, ...], template: str) -> PreTrainedTokenizerFast:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(mark, special=True) for mark in marks]})
    tokenizer.chat_template = template
    return tokenizer


def _qwen_text(tokenizer: PreTrainedTokenizerFast) -> dict:
    rope = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10_000.0}
    return {**_TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope, "tie_word_embeddings": False}


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(mark) for key, mark in names.items()}


def build_vision_model(family: VisionFamily, *, seed: int = 0):
    """Return a random model and its processor."""
    torch.manual_seed(seed)
    if family == "llava":
        tokenizer = _tokenizer(("<image>",), _LLAVA_TEMPLATE)
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
            projection_dim=32,
            initializer_range=_SPREAD,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(vocab_size=len(tokenizer), **_TEXT),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=16,
            vision_feature_layer=-2,
        )
        images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        processor = LlavaProcessor(
            images,
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=_LLAVA_TEMPLATE,
        )
        return _spread(LlavaForConditionalGeneration(config)), processor
    if family == "idefics3":
        return _build_idefics3()
    tokenizer = _tokenizer(_MARKS, _QWEN_TEMPLATE)
    bounds = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    shape = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    images, videos = Qwen2VLImageProcessor(size=bounds, **shape), Qwen2VLVideoProcessor(size=bounds, **shape)
    if family == "qwen2_vl":
        vision = {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 48,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "initializer_range": _SPREAD,
        }
        config = Qwen2VLConfig(
            text_config=_qwen_text(tokenizer), vision_config=vision, tie_word_embeddings=False, **_qwen_ids(tokenizer)
        )
        processor = Qwen2VLProcessor(images, tokenizer, videos, chat_template=_QWEN_TEMPLATE)
        return _spread(Qwen2VLForConditionalGeneration(config)), processor
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 48,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "window_size": 32,
        "fullatt_block_indexes": [1],
        "initializer_range": _SPREAD,
    }
    config = Qwen2_5_VLConfig(
        text_config=_qwen_text(tokenizer), vision_config=vision, tie_word_embeddings=False, **_qwen_ids(tokenizer)
    )
    processor = Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=_QWEN_TEMPLATE)
    return _spread(Qwen2_5_VLForConditionalGeneration(config)), processor


def _build_idefics3():
    """Return a model whose pictures are cut into tiles of 32 x 32 pixels, beside the whole made as small."""
    tokenizer = _tokenizer(_IDEFICS_MARKS, _IDEFICS_TEMPLATE)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "initializer_range": _SPREAD,
    }
    config = Idefics3Config(
        vision_config=vision,
        text_config=LlamaConfig(vocab_size=len(tokenizer), **_TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )
    images = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=_IDEFICS_TEMPLATE)
    return _spread(Idefics3ForConditionalGeneration(config)), processor


def _spread(model: torch.nn.Module) -> torch.nn.Module:
    """Draw matrices wide enough that what a picture shows matters."""
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3 if "patch_embed" in name else _SPREAD)
    return model


def save_vision_base(folder: Path, family: VisionFamily = "qwen2_vl", *, seed: int = 0) -> Path:
    """Write a tiny vision-language base with its processor to `folder` and return it."""
    model, processor = build_vision_model(family, seed=seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def draw_picture(path: Path, number: int, *, size: tuple[int, int] = (48, 32)) -> Path:
    """Write a picture that differs by its number and return the path."""
    picture = Image.new("RGB", size, (37 * number % 256, 91 * number % 256, 200))
    ImageDraw.Draw(picture).rectangle((4, 4, 8 + number % 20, 20), fill=(255, 17 * number % 256, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


def vqa_rows(folder: Path, pictures: int, *, questions: int = 3) -> list[dict[str, str]]:
    """Draw pictures below `folder` and return several questions about each, the pictures' sizes unlike."""
    sizes = ((48, 32), (32, 32), (64, 48))
    rows = []
    for number in range(pictures):
        name = f"images/{number}.png"
        draw_picture(folder / name, number, size=sizes[number % 3])
        rows += [
            {
                "image": name,
                "question": f"is the {['cat', 'dog', 'bird', 'red'][q % 4]} {q}?",
                "answer": f"one {q} {number}",
            }
            for q in range(questions)
        ]
    return rows
