"""From stored ids back to text, and when two texts are the same to a tokenizer.

Owns decoding for proofs and for show. Makes no ids: what it says can be held against the code
that does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

# What decoders write for bytes that are no whole character.
REPLACEMENT = "\ufffd"
_META_BLANK = "\u2581"
# A character has at most four bytes; more tokens than that are a replacement character of the text itself.
_MOST_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring tokens that together are whole characters; mostly one.

    Attributes:
        ids: the tokens.
        text: what they stand for.
    """

    ids: tuple[int, ...]
    text: str


class Decoder:
    """Decodes ids with one tokenizer.

    Args:
        tokenizer: as it is used for training.
        anchor: id of a special token, put before each text: decoders drop the blank that a text begins with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, anchor: int) -> None:
        self._tokenizer = tokenizer
        self._anchor = anchor
        self._before = str(tokenizer.decode([anchor], clean_up_tokenization_spaces=False))
        self._normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)

    def texts(self, spans: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each span as it continues other text, special tokens written out."""
        if not spans:
            return []
        anchored = [[self._anchor, *span] for span in spans]
        decoded = self._tokenizer.batch_decode(anchored, clean_up_tokenization_spaces=False)
        return [
            str(text)[len(self._before) :] if str(text).startswith(self._before) else self.text(span)
            for text, span in zip(decoded, spans, strict=True)
        ]

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of ids that nothing stands before."""
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def pieces(self, ids: Sequence[int]) -> list[Piece]:
        """Return ids in the smallest groups that stand for whole characters, with their texts."""
        alone = self.texts([[token] for token in ids])
        pieces: list[Piece] = []
        waiting: list[int] = []
        for token, text in zip(ids, alone, strict=True):
            if REPLACEMENT not in text and not waiting:
                pieces.append(Piece((token,), text))
                continue
            waiting.append(token)
            (joined,) = self.texts([waiting])
            if REPLACEMENT not in joined or len(waiting) > _MOST_TOKENS:
                pieces.append(Piece(tuple(waiting), joined))
                waiting = []
        if waiting:
            pieces.append(Piece(tuple(waiting), self.texts([waiting])[0]))
        return pieces

    def same(self, decoded: str, text: str) -> bool:
        """Return whether ids that decode to `decoded` may stand for `text`, in the tokenizer's normal form."""
        return decoded == text or self.normal(decoded) == self.normal(text)

    def holds(self, decoded: str, text: str) -> bool:
        """Return whether `text`, blanks around it aside, is a part of `decoded`, whatever blanks are inside."""
        wanted = text.strip()
        if wanted in decoded or (found := self.normal(wanted)) in (whole := self.normal(decoded)):
            return True
        return " ".join(found.split()) in " ".join(whole.split())

    def normal(self, text: str) -> str:
        """Return text as the tokenizer brings it to its normal form, with blanks for the marks of blanks."""
        normal = text if self._normalizer is None else str(self._normalizer.normalize_str(text))
        normal = normal.replace(_META_BLANK, " ")
        # Such tokenizers also put a blank before every text.
        return normal[1:] if normal[:1] == " " and text[:1] != " " else normal
