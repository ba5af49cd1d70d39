"""The vision benchmark's model, pictures and rows, all made in code.

Owns the shape, the tokenizer whose words are single tokens, and the order in which everybody takes the rows.
"""

import hashlib
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, PngImagePlugin
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from loralab.data.example import Branch, ImageFile, TokenizedExample
from loralab.data.images.processor import PictureProcessor
from loralab.layout.grouping import find_prefix_groups
from loralab.training.sampler import StepSampler
from vision_flops import Shape

SEED = 42  # loralab's own default, which its order of rows comes from
STOP = "<|im_end|>"
MARKS = ("<|im_start|>", STOP, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION_WORDS, ANSWER_TOKENS = 10, 12
PICTURE_SIDE = 512
# The tokenizer has fewer tokens; the embedding's further rows are never met. The head is then an eighth of the text
# layers' weights, as in Qwen2-VL-2B, where it is 0.18 of them.
VOCABULARY = 8192
SHAPE = Shape(
    vision_depth=8,
    vision_width=448,
    vision_heads=7,
    vision_mlp=1792,
    hidden=512,
    layers=8,
    heads=8,
    key_heads=2,
    mlp=2304,
    vocabulary=VOCABULARY,
)
# Wide enough that losses depend on what is read: a wrong picture or position then shows in the first loss.
_SPREAD = 0.08


@dataclass(frozen=True)
class Prepared:
    """Rows as every contender gets them; each file has the same rows.

    Attributes:
        grouped: for loralab, which finds a picture's rows itself.
        copies: for loralab without anything in common: each row has a picture file of its own, with the same pixels;
            a random order takes the rows step by step as the grouped one does.
        rendered: for TRL: picture, prompt and completion as text, in the order of the steps.
        rows: their number.
        steps: optimizer steps of an epoch.
        batch: rows of a step.
        step_tokens: tokens of the rows of each step that something is predicted from, each row on its own: all but the
            last of a row.
        labels: tokens that carry loss, all rows together.
        picture_tokens: of one picture in a prompt.
        text_tokens: prompt without picture, answer and stop token, but for the last: the mean of the rows.
    """

    grouped: Path
    copies: Path
    rendered: Path
    rows: int
    steps: int
    batch: int
    step_tokens: list[int]
    labels: int
    picture_tokens: int
    text_tokens: float


def draw_words() -> list[str]:
    """Return 1,200 words of three syllables."""
    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprstvz", "aeiou")]
    draw = random.Random(0)
    return sorted({"".join(draw.choices(syllables, k=3)) for _ in range(1300)})[:1200]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that has learnt the words, with a blank before them and without."""
    words = draw_words()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(MARKS) - 1,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*words, *(f"a {word}" for word in words), "user\nassistant\n"] * 2, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(mark, special=True) for mark in MARKS]})
    tokenizer.eos_token = STOP
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_model(folder: Path) -> Path:
    """Return the folder of model and processor, made of random weights where it is not there yet."""
    if (folder / "preprocessor_config.json").is_file() or (folder / "processor_config.json").is_file():
        return folder
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    ids = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": SHAPE.hidden,
        "intermediate_size": SHAPE.mlp,
        "num_hidden_layers": SHAPE.layers,
        "num_attention_heads": SHAPE.heads,
        "num_key_value_heads": SHAPE.key_heads,
        "max_position_embeddings": 2048,
        "initializer_range": _SPREAD,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1_000_000.0},
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": SHAPE.vision_depth,
        "embed_dim": SHAPE.vision_width,
        "hidden_size": SHAPE.hidden,
        "num_heads": SHAPE.vision_heads,
        "mlp_ratio": SHAPE.vision_mlp // SHAPE.vision_width,
        "patch_size": SHAPE.patch,
        "spatial_merge_size": SHAPE.merge,
        "temporal_patch_size": SHAPE.frames,
        "initializer_range": _SPREAD,
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        **{key: tokenizer.convert_tokens_to_ids(mark) for key, mark in ids.items()},
    )
    model: Any = Qwen2VLForConditionalGeneration(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    cut = {"patch_size": SHAPE.patch, "merge_size": SHAPE.merge, "temporal_patch_size": SHAPE.frames}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**cut), tokenizer, Qwen2VLVideoProcessor(**cut), chat_template=TEMPLATE
    )
    processor.save_pretrained(folder)
    return folder


def draw_picture(path: Path, number: int, *, copy: int = 0) -> Path:
    """Write noise with shapes on it; copies of a number have the same pixels and other bytes."""
    draw = np.random.default_rng(number)
    picture = Image.fromarray(draw.integers(0, 96, (PICTURE_SIDE, PICTURE_SIDE, 3), dtype=np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(12):
        x, y, size = (int(value) for value in draw.integers((0, 0, 40), (400, 400, 160)))
        colour = tuple(int(value) for value in draw.integers(96, 256, 3))
        shape = pen.rectangle if draw.integers(2) else pen.ellipse
        shape((x, y, x + size, y + size), fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    note = PngImagePlugin.PngInfo()
    note.add_text("copy", str(copy))
    picture.save(path, pnginfo=note)
    return path


def prepare_rows(folder: Path, model: Path, *, steps: int, questions: int) -> Prepared:
    """Draw pictures and rows, find the order in which loralab takes them, and write all files.

    Args:
        folder: where they go.
        model: folder of the model.
        steps: one picture each.
        questions: about each picture.
    """
    processor = AutoProcessor.from_pretrained(model)
    pictures = [draw_picture(folder / f"pictures/{number}.png", number) for number in range(steps)]
    rows = _draw_rows(processor.tokenizer, pictures, questions)
    random.Random(0).shuffle(rows)  # nothing in the file's order says which rows belong together
    rendered = [_render(row, processor) for row in rows]
    examples = [
        _tokenize(number, row, text, processor)
        for number, (row, text) in enumerate(zip(rows, rendered, strict=True), start=1)
    ]
    groups = find_prefix_groups(examples, largest=questions)
    order = StepSampler(len(rows), questions, SEED, groups=groups).steps()
    for step in order:
        if len({rows[place]["image"] for place in step}) != 1:
            raise SystemExit("a step would hold questions about several pictures")
    copied = [{} for _ in rows]  # type: list[dict[str, str]]
    for places, step in zip(StepSampler(len(rows), questions, SEED).steps(), order, strict=True):
        for place, source in zip(places, step, strict=True):
            number = int(Path(rows[source]["image"]).stem)
            own = draw_picture(folder / f"copies/{source}.png", number, copy=source)
            copied[place] = rows[source] | {"image": str(own)}
    branches = [branch for each in examples for branch in each.branches]
    lengths = [len(branch.prompt_ids) + len(branch.answer_ids) - 1 for branch in branches]
    span = branches[0].images[0].length
    return Prepared(
        grouped=_write(folder / "rows.jsonl", rows),
        copies=_write(folder / "copies.jsonl", copied),
        rendered=_write(folder / "rendered.jsonl", [rendered[place] for step in order for place in step]),
        rows=len(rows),
        steps=len(order),
        batch=questions,
        step_tokens=[sum(lengths[place] for place in step) for step in order],
        labels=sum(each.supervised_tokens for each in examples),
        picture_tokens=span,
        text_tokens=sum(lengths) / len(lengths) - span,
    )


def _draw_rows(tokenizer: Any, pictures: list[Path], questions: int) -> list[dict[str, str]]:
    words = draw_words()
    draw = random.Random(1)
    rows = []
    for picture in pictures:
        for _ in range(questions):
            answer = " ".join(draw.choices(words, k=ANSWER_TOKENS))
            if len(tokenizer(answer)["input_ids"]) != ANSWER_TOKENS:
                raise SystemExit(f"an answer is not {ANSWER_TOKENS} tokens long: {answer!r}")
            question = " ".join(draw.choices(words, k=QUESTION_WORDS))
            rows.append({"image": str(picture), "question": question, "answer": answer})
    return rows


def _render(row: dict[str, str], processor: Any) -> dict[str, str]:
    content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
    messages = [{"role": "user", "content": content}]
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return {"image": row["image"], "prompt": prompt, "completion": row["answer"] + STOP}


def _tokenize(number: int, row: dict[str, str], text: dict[str, str], processor: Any) -> TokenizedExample:
    stored = Path(row["image"]).read_bytes()
    digest = hashlib.sha256(stored).hexdigest()
    file = ImageFile(row["image"], digest, PICTURE_SIDE, PICTURE_SIDE, len(stored), 0)
    prompt, answer = (processor.tokenizer(text[name])["input_ids"] for name in ("prompt", "completion"))
    ids, placed = PictureProcessor(processor, None, None).place(prompt, [file])
    branch = Branch(np.array(ids, np.int32), np.array(answer, np.int32), placed)
    return TokenizedExample(number, 0, (branch,))


def _write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
