"""Texts to ids: always the tokenizer's own, whichever way is taken."""

import pickle
from typing import Any

import pytest

from loralab.data.prompts.encoding import TextEncoder
from unit.data.prompters import build_tokenizer

TEXTS = ["red cat", "", " the <|stop|>dog <|end|>", "日本 🙂\n\n", "a" * 300]


def own(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("bos", [False, True])
def test_ids_are_the_tokenizers(bos: bool) -> None:
    tokenizer = build_tokenizer(bos=bos)
    encode = TextEncoder(tokenizer)
    assert encode([]) == []
    assert encode(TEXTS) == own(tokenizer, TEXTS)
    assert pickle.loads(pickle.dumps(encode))(TEXTS) == own(tokenizer, TEXTS)


def test_what_others_did_with_the_tokenizer_does_not_matter() -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    encode = TextEncoder(tokenizer)
    expected = own(tokenizer, TEXTS)
    tokenizer(TEXTS, padding="max_length", truncation=True, max_length=5)
    assert tokenizer.backend_tokenizer.padding is not None
    assert encode(TEXTS) == expected
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(2)
    assert encode(TEXTS) == TextEncoder(tokenizer)(TEXTS) == expected
    tokenizer.add_tokens(["red cat"])
    assert encode(["red cat"]) == own(tokenizer, ["red cat"]) != expected[:1]


def test_the_backend_is_asked_directly() -> None:
    tokenizer = build_tokenizer()
    encode = TextEncoder(tokenizer)
    encode._tokenizer = None  # type: ignore[assignment]
    assert encode(TEXTS) == own(tokenizer, TEXTS)


class Shouting:
    """A tokenizer whose class does more than ask its backend."""

    def __init__(self) -> None:
        self.inner = build_tokenizer()
        self.backend_tokenizer = self.inner.backend_tokenizer
        self.all_special_tokens = self.inner.all_special_tokens

    def __call__(self, texts: list[str], **options: Any) -> Any:
        return self.inner([text.upper() for text in texts], **options)


def test_a_tokenizer_with_ways_of_its_own_is_asked_itself() -> None:
    tokenizer: Any = Shouting()
    assert TextEncoder(tokenizer)(["red"]) == own(build_tokenizer(), ["RED"])


def test_a_tokenizer_without_a_backend_is_asked_itself() -> None:
    tokenizer: Any = Shouting()
    del tokenizer.backend_tokenizer
    assert TextEncoder(tokenizer)(["red"]) == own(build_tokenizer(), ["RED"])
