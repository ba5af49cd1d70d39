"""What the acceptance checks hold the product against: its own reader, prompt text, token bytes and offsets.

Nothing here comes from `loralab`: the same mistake would have to be made twice to stay unseen.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

Rows = list[dict[str, Any]]
Offsets = Sequence[tuple[int, int]]

# Taori et al. 2023, Stanford Alpaca, train.py PROMPT_DICT; with the line break behind "### Response:".
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Vocabulary:
    """What is known of a tokenizer from its published files.

    Attributes:
        folder: below the data folder.
        stop: id of the token that ends an answer.
        bos: id that every text begins with, or None where the tokenizer begins texts with nothing.
        never: ids of special tokens that no row of real data may bring into its tokens.
        own_template: whether the tokenizer has a chat template.
        byte_level: whether pieces are written in GPT-2's byte alphabet; else SentencePiece with byte fallback.
    """

    folder: str
    stop: int
    bos: int | None
    never: tuple[int, ...]
    own_template: bool = False
    byte_level: bool = True


VOCABULARIES = {
    "gpt2": Vocabulary("tokenizers/gpt2", stop=50256, bos=None, never=()),
    "qwen2.5": Vocabulary("tokenizers/qwen2.5", stop=151645, bos=None, never=(151643,), own_template=True),
    "llama2": Vocabulary("tokenizers/llama2", stop=2, bos=1, never=(0,), byte_level=False),
}


def read_rows(path: Path) -> Rows:
    """Return the rows of a JSON list or of JSON lines."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return list(json.loads(text))
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def plain_prompt(row: dict[str, Any]) -> str:
    """Return the Stanford Alpaca prompt of a row, up to where the answer begins."""
    # replace, not format: rows hold braces.
    form = _WITH_INPUT if row.get("input") else _WITHOUT_INPUT
    before, after = form.split("{instruction}")
    return before + row["instruction"] + after.replace("{input}", row.get("input") or "")


def chat_messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """Return what a client would send for a row: one user turn."""
    content = row["instruction"]
    if row.get("input"):
        content += "\n\n### Input:\n" + row["input"]
    return [{"role": "user", "content": content}]


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character of GPT-2's byte-level alphabet.

    Source: Radford et al. 2019, encoder.py, bytes_to_unicode.
    """
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_ALPHABET = _byte_alphabet()


def piece_bytes(piece: str, *, byte_level: bool) -> bytes:
    """Return the bytes that a vocabulary piece stands for, without the library's decoder."""
    if byte_level:
        return bytes(_ALPHABET[character] for character in piece)
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()


def token_bytes(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, byte_level: bool) -> bytes:
    """Return the bytes that ordinary tokens stand for, joined."""
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    return b"".join(piece_bytes(piece, byte_level=byte_level) for piece in pieces)


def tiling_error(offsets: Offsets, length: int) -> str | None:
    """Return how `offsets` fail to cover `length` characters without a gap, or None.

    Two neighbours may share one character, where a token ends or begins inside its bytes (or, in
    SentencePiece, where the blank put before a text has no character of its own); never two.
    """
    covered = 0
    for start, end in offsets:
        if not 0 <= start < end <= length:
            return f"token at {start}:{end} of {length} characters"
        if start not in (covered, covered - 1) or end < covered:
            return f"token at {start}:{end} behind {covered}"
        covered = end
    return None if covered == length else f"{covered} of {length} characters covered"
