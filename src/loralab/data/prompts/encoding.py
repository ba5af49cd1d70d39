"""Texts to token ids, by the shortest way that gives the tokenizer's own ids.

Owns when the tokenizers library may be asked directly. It then leaves out what nobody here reads
(offsets, masks, tokens as text), which is a third of the time.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

_PROBES = ("", "a", " a", "Two words.\n\n  1 + 1 =\t", "na\u00efve \u4e16\u754c \U0001f642 e\u0301")


class TextEncoder:
    """Gives the ids of texts in which special tokens are written out.

    Args:
        tokenizer: whose ids they are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        # A class of its own may do more than ask its backend.
        probes = [*_PROBES, " x ".join(["", *tokenizer.all_special_tokens, ""])]
        if self._backend is not None and self._ask_backend(probes) != self._ask_tokenizer(probes):
            self._backend = None

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text; nothing is added."""
        if not texts:
            return []
        # Whoever pads or cuts with this tokenizer leaves that set in its backend.
        if self._backend is None or self._backend.padding is not None or self._backend.truncation is not None:
            return self._ask_tokenizer(texts)
        return self._ask_backend(texts)

    def _ask_backend(self, texts: Sequence[str]) -> list[list[int]]:
        backend: Any = self._backend
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _ask_tokenizer(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids
