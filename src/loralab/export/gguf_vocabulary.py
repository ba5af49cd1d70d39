"""A tokenizer as a GGUF file holds it.

Owns how a `tokenizer.json` becomes llama.cpp's lists: byte-level BPE with merges and the name of its pre-tokenizer,
or SentencePiece-like BPE with scores. A tokenizer that llama.cpp would read otherwise is refused, never guessed.
Source: llama.cpp, src/llama-vocab.cpp.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from loralab.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The pattern that splits text into words, whether whole words skip the merges: llama.cpp's name.
PRE_TOKENIZERS: dict[tuple[str, bool], str] = {
    ("", False): "gpt-2",  # the pattern of ByteLevel itself
    (_WORDS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
    (_WORDS + r"\p{N}" + _REST, False): "qwen2",
}
# What a tokenizer's normalizer does to ordinary text: nothing, or nothing to text that is already composed.
_HARMLESS = (None, "NFC")
_BLANK = "\u2581"
_ADDED_SCORE = -1000.0


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: gpt2 (byte-level BPE) or llama (SentencePiece-like).
        pre: llama.cpp's name of the pre-tokenizer.
        tokens: in the order of their ids, as many as the model has rows.
        types: of each token.
        scores: of each token, for model llama: the higher, the earlier it is put together.
        merges: for model gpt2.
        special: ids by llama.cpp's name: bos, eos, unk, pad.
        notes: what a user should know, in sentences.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None
    merges: tuple[str, ...] | None
    special: Mapping[str, int]
    notes: tuple[str, ...]


def build_vocabulary(tokenizer: PreTrainedTokenizerBase, *, rows: int) -> Vocabulary:
    """Return a tokenizer as a GGUF file holds it.

    Args:
        tokenizer: of the merged model.
        rows: of the model's embedding: ids without a token are filled up, tokens without a row left out.

    Raises:
        ModelError: llama.cpp has no tokenizer that does the same.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refuse("it has no tokenizer.json")
    facts = json.loads(backend.to_str())
    model = facts["model"]
    if model["type"] != "BPE":
        raise _refuse(f"its model is {model['type']}; written are byte-level BPE and SentencePiece-like BPE")
    merges = [tuple(each.split(" ")) if isinstance(each, str) else tuple(each) for each in model["merges"]]
    tokens, types = _tokens(facts, rows, bytes_too=bool(model.get("byte_fallback")))
    if model.get("byte_fallback"):
        _check_sentencepiece(facts)
        scores, note = _scores(model["vocab"], merges, tokens, types)
        notes = (note,) if note else ()
        return Vocabulary("llama", "default", tokens, types, scores, None, _special(tokenizer, rows), notes)
    pre, note = _pre_tokenizer(facts)
    joined = tuple(f"{left} {right}" for left, right in merges)
    return Vocabulary("gpt2", pre, tokens, types, None, joined, _special(tokenizer, rows), (note,) if note else ())


def _tokens(facts: Mapping[str, Any], rows: int, *, bytes_too: bool) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return tokens and their types, ids without a token filled up."""
    model = facts["model"]
    tokens = {int(number): str(text) for text, number in model["vocab"].items()}
    types = dict.fromkeys(tokens, NORMAL)
    if bytes_too:
        types |= {model["vocab"][text]: BYTE for text in map(_byte_token, range(256)) if text in model["vocab"]}
    for added in facts["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if bytes_too and model.get("unk_token") in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = UNKNOWN
    listed = tuple(tokens.get(number, f"[PAD{number}]") for number in range(rows))
    return listed, tuple(types.get(number, UNUSED) for number in range(rows))


def _byte_token(value: int) -> str:
    return f"<0x{value:02X}>"


def _special(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, int]:
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    return {name: int(number) for name, number in ids.items() if number is not None and number < rows}


def _pre_tokenizer(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Return llama.cpp's name of a pre-tokenizer, and a note where it does not normalize as the tokenizer does."""
    kind = (facts["normalizer"] or {}).get("type")
    if kind not in _HARMLESS:
        raise _refuse(f"it normalizes text ({kind}), and llama.cpp does not")
    pattern = _pattern(facts["pre_tokenizer"] or {})
    found = None if pattern is None else PRE_TOKENIZERS.get((pattern, bool(facts["model"].get("ignore_merges"))))
    if found is None:
        shown = json.dumps(facts["pre_tokenizer"], ensure_ascii=False)[:160]
        raise _refuse(f"its pre-tokenizer is none of {', '.join(PRE_TOKENIZERS.values())}: {shown}")
    note = "text that is not in Unicode's composed form (NFC) is composed by the tokenizer, and not by llama.cpp"
    return found, note if kind else ""


def _pattern(rule: Mapping[str, Any]) -> str | None:
    """Return the pattern by which byte-level text is split ("" for ByteLevel's own), or None for anything else."""
    steps: Sequence[Mapping[str, Any]] = rule.get("pretokenizers", [rule])
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not before:
        return "" if last.get("use_regex") else None
    split = before[0]
    whole = len(before) == 1 and split.get("type") == "Split" and split.get("behavior") == "Isolated"
    if not whole or split.get("invert") or last.get("use_regex"):
        return None
    return str(split.get("pattern", {}).get("Regex", "")) or None


def _check_sentencepiece(facts: Mapping[str, Any]) -> None:
    """Refuse what SentencePiece's own way with blanks does not do: a word border is a blank, written as a mark."""
    normalizer, rule = facts["normalizer"] or {}, facts["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    usual = [each.get("type") for each in steps] in ([], ["Prepend", "Replace"], ["Replace"])
    plain = rule.get("type", "Metaspace") == "Metaspace" and not rule.get("split", False)
    if not usual or not plain or (not rule and not steps):
        raise _refuse("it treats blanks in a way of its own")


def _scores(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, ...]], tokens: Sequence[str], types: Sequence[int]
) -> tuple[tuple[float, ...], str]:
    """Return scores under which putting together the best token first is what the merges do, and a note or ""."""
    spans: dict[str, tuple[int, int]] = {}
    for rank, (left, right) in enumerate(merges):
        spans[left + right] = (spans.get(left + right, (rank, rank))[0], rank)
    wanted = {
        (token[:cut], token[cut:])
        for token in spans
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    }
    score: dict[str, float] = {}
    tied: set[str] = set()
    end = -1
    for token, (first, last) in spans.items():  # in the order of their first merge
        if first > end:
            level = -float(len(score))
        else:
            tied.add(token)  # merges of both take turns: they have one score
        score[token], end = level, max(end, last)
    if wanted != set(merges) or any(token.strip(_BLANK) for token in tied):
        raise _refuse("its merges are not those that one score for each token would give")
    lowest = -float(len(score))
    listed = (
        score.get(token, lowest) if kind == NORMAL else (_ADDED_SCORE if kind == USER_DEFINED else 0.0)
        for token, kind in zip(tokens, types, strict=True)
    )
    note = "runs of three blanks and more may be cut in other places by llama.cpp, which takes the leftmost first"
    return tuple(listed), note if tied else ""


def add_vocabulary(writer: Any, vocabulary: Vocabulary, *, add_bos: bool, add_blank: bool) -> None:
    """Write a tokenizer.

    Args:
        writer: `gguf.GGUFWriter`.
        vocabulary: as `build_vocabulary` made it.
        add_bos: whether the program that reads the file puts the bos token before a prompt.
        add_blank: whether it puts a blank before text that begins, or follows a special token (model llama).
    """
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.scores is not None:
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(add_blank)
    if vocabulary.merges is not None:
        writer.add_token_merges(list(vocabulary.merges))
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(add_bos)
    writer.add_add_eos_token(False)


def _refuse(why: str) -> ModelError:
    return ModelError(
        f"this tokenizer cannot be written as GGUF: {why}",
        where="the model's tokenizer.json",
        fix="export --to vllm, which takes the tokenizer as it is, or use llama.cpp's own convert_hf_to_gguf.py",
    )
