"""How llama.cpp cuts text for a SentencePiece-like vocabulary, so that it can be compared before anybody runs it.

Owns that rule alone: special tokens first, a blank where text begins, then the best score first, from the left.
Source: llama.cpp, src/llama-vocab.cpp (SPM); written from the rule, without its code.
"""

import heapq
import re
from collections.abc import Iterator, Sequence

from loralab.export.gguf_vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary

_BLANK = "\u2581"


class SentencePieceRule:
    """Cuts text as llama.cpp does.

    Args:
        vocabulary: of model llama.
        add_blank: whether a blank goes before text that begins, or follows a special token.
    """

    def __init__(self, vocabulary: Vocabulary, *, add_blank: bool) -> None:
        self._ids = {token: number for number, token in enumerate(vocabulary.tokens)}
        self._scores = vocabulary.scores or ()
        self._add_blank = add_blank
        self._unknown = vocabulary.special.get("unk", 0)
        kinds = zip(vocabulary.tokens, vocabulary.types, strict=True)
        whole = sorted((t for t, kind in kinds if kind in (CONTROL, USER_DEFINED, UNKNOWN)), key=len, reverse=True)
        self._whole = re.compile("|".join(map(re.escape, whole)) or r"(?!)")

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text, without a bos token of its own."""
        ids: list[int] = []
        at = 0
        for found in self._whole.finditer(text):
            ids += self._plain(text[at : found.start()])
            ids.append(self._ids[found[0]])
            at = found.end()
        return ids + self._plain(text[at:])

    def _plain(self, text: str) -> list[int]:
        if not text:
            return []
        # Every piece of plain text either begins the prompt or follows a special token.
        marked = ((" " if self._add_blank else "") + text).replace(" ", _BLANK)
        return list(self._bytes(self._join(list(marked))))

    def _join(self, pieces: list[str]) -> list[str]:
        """Put neighbours together, the best score first, the leftmost of equals."""
        after = [*range(1, len(pieces)), -1]
        before = [-1, *range(len(pieces) - 1)]
        waiting: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0 and (number := self._ids.get(pieces[left] + pieces[right])) is not None:
                heapq.heappush(waiting, (-self._scores[number], left, right, pieces[left] + pieces[right]))

        for index in range(len(pieces) - 1):
            offer(index, index + 1)
        while waiting:
            _, left, right, joined = heapq.heappop(waiting)
            if not pieces[left] or not pieces[right] or pieces[left] + pieces[right] != joined:
                continue  # one of them was put together with another since
            pieces[left], pieces[right] = joined, ""
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
            offer(before[left], left)
            offer(left, after[left])
        return [piece for piece in pieces if piece]

    def _bytes(self, pieces: Sequence[str]) -> Iterator[int]:
        for piece in pieces:
            if piece in self._ids:
                yield self._ids[piece]
                continue
            for value in piece.encode():
                yield self._ids.get(f"<0x{value:02X}>", self._unknown)
