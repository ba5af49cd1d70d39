"""How much text the supervised tokens of each row stand for: bytes and words, what perplexities are divided by.

Owns the bytes of a token and where a word begins. Rows of a text are windows of it, and `data.max_length` says
where one ends: the sums over a text must not depend on that.
"""

import codecs
import functools
import re
from collections.abc import Callable

import numpy as np

from loralab.data.example import Branch
from loralab.data.prompts.decoding import Decoder
from loralab.data.prompts.prompter import Prompter
from loralab.data.tokens.store import TokenStore
from loralab.evaluation.perplexity import FloatArray
from loralab.progress import Reporter

_LABEL = "words and bytes"
_META_BLANK = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Rows between two words about progress.
_TELL_EVERY = 1024


class TokenBytes:
    """The bytes that each token stands for, part of a character or whole.

    Args:
        prompter: whose tokenizer it is.

    Attributes:
        exact: whether the tokenizer spells its tokens in a way that is known here; else each is decoded by itself.
        adds_blank: whether the tokenizer puts a blank before a text, which the text does not have.
    """

    def __init__(self, prompter: Prompter) -> None:
        self._tokenizer = prompter.tokenizer
        self._stops = frozenset(prompter.stop.ids)
        self._added = {int(token): str(added.content) for token, added in self._tokenizer.added_tokens_decoder.items()}
        self._alone = Decoder(self._tokenizer, prompter.stop.ids[0])
        self._spell = self._choose_spelling()
        self.exact = self._spell is not None
        self._known: dict[int, bytes] = {}
        (first,) = prompter.encode(["a"])
        self.adds_blank = bool(first) and self.of(first[0]).startswith(b" ")

    def _choose_spelling(self) -> Callable[[str], bytes] | None:
        """Return what the tokenizer's own decoder shows its spelling to be, or None."""
        decoder = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "decoder", None)
        if decoder is None:
            return None
        if decoder.decode(["a", "\u0120b"]) == "a b":
            return _bytes_of_characters
        if decoder.decode(["a", f"{_META_BLANK}b"]) == "a b":
            return functools.partial(_bytes_of_piece, with_bytes=decoder.decode(["a", "<0x41>"]) == "aA")
        return None

    def of(self, token: int) -> bytes:
        """Return the bytes of a token; of a stop token a blank, since it ends words."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._find(token)
        return found

    def _find(self, token: int) -> bytes:
        if token in self._stops:
            return b" "
        if token in self._added:
            return self._added[token].encode()
        if self._spell is None:
            return self._alone.texts([[token]])[0].encode()
        return self._spell(str(self._tokenizer.convert_ids_to_tokens(token)))


def _bytes_of_piece(piece: str, *, with_bytes: bool) -> bytes:
    """Return the bytes of a piece in which a mark stands for a blank, and `<0xE4>` maybe for a byte."""
    byte = _BYTE_TOKEN.fullmatch(piece) if with_bytes else None
    return piece.replace(_META_BLANK, " ").encode() if byte is None else bytes([int(byte[1], 16)])


def _bytes_of_characters(token: str) -> bytes:
    """Return the bytes of a token in which each character stands for one byte."""
    values = _byte_values()
    return bytes(values[each] for each in token) if all(map(values.__contains__, token)) else token.encode()


@functools.cache
def _byte_values() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Bytes that print, in Latin-1, are written as themselves; the others, in order, as the characters from 256 on.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printing]
    return {chr(value): value for value in printing} | {chr(256 + n): value for n, value in enumerate(others)}


class _Reader:
    """Reads text from its beginning, or from the middle, and counts the words that begin.

    Args:
        words: where they are counted (examples).
    """

    def __init__(self, words: FloatArray) -> None:
        self._words = words
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._inside = False
        self._began: int | None = None

    def read(self, text: bytes, example: int | None) -> None:
        """Read on.

        Args:
            text: what comes next; it may end within a character.
            example: whose words those are that begin in it, or None where they do not count.
        """
        first = self._began if self._decoder.getstate()[0] else example
        read = self._decoder.decode(text)
        self._began = example if read else first
        if not read:
            return
        begun = len(read.split()) - (self._inside and not read[0].isspace())
        # A character that began in the text before belongs to that.
        if begun and not self._inside and not read[0].isspace():
            self._add(1, first)
            begun -= 1
        self._add(begun, example)
        self._inside = not read[-1].isspace()

    def _add(self, count: int, example: int | None) -> None:
        if example is not None:
            self._words[example] += count


def measure_volumes(split: TokenStore, prompter: Prompter, *, reporter: Reporter) -> tuple[FloatArray, FloatArray]:
    """Return the UTF-8 bytes and the blank-separated words of the supervised text of each row.

    A row's bytes are those of its supervised tokens; stop tokens stand for none. A word counts in the row in
    which it begins, and one that begins in a text's first token, which nothing predicts, in none. So the sums over
    a text are those of the text behind its first token whatever `data.max_length` is, and of the whole text where
    the tokenizer begins it with a bos token. The blank that some tokenizers put before a text is not counted; they
    do not tell it from a blank that the text has there.

    Args:
        split: the rows.
        prompter: knows tokenizer and stop tokens.
        reporter: told of progress, and of tokens that cannot be taken apart.

    Returns:
        Bytes and words (examples), (examples).
    """
    table = TokenBytes(prompter)
    if not table.exact:
        reporter.say(
            f"{_LABEL}: this tokenizer does not spell its tokens in bytes or pieces: each counts as what it is decoded "
            "to by itself"
        )
    volumes, words = np.zeros(len(split)), np.zeros(len(split))
    counter = _Counter(table, prompter, words)
    units, origins = split.units, split.origins
    follows = np.zeros(len(split), dtype=bool)
    follows[1:] = (np.diff(units) == 1) & (np.diff(origins, axis=0) == 0).all(axis=1)
    for index in range(len(split)):
        for branch in split[index].branches:
            volumes[index] += counter.add(branch, index, follows=bool(follows[index]))
        if not (index + 1) % _TELL_EVERY:
            reporter.progress(_LABEL, index + 1, len(split))
    reporter.finish(_LABEL)
    return volumes, words


class _Counter:
    """Counts the text of branches one behind the other; words are counted where the reader puts them."""

    def __init__(self, table: TokenBytes, prompter: Prompter, words: FloatArray) -> None:
        self._table = table
        self._stops = frozenset(prompter.stop.ids)
        self._special = frozenset(prompter.tokenizer.all_special_ids)
        self._words = words
        self._reader = _Reader(words)

    def add(self, branch: Branch, example: int, *, follows: bool) -> int:
        """Count the words of an answer and return its bytes.

        Args:
            branch: the answer and what is before it.
            example: the row that it belongs to.
            follows: whether the row before is the one before it in its source row.
        """
        ids = branch.answer_ids.tolist()
        text = b"".join(map(self._table.of, ids))
        unseen = sum(map(self._stops.__contains__, ids))
        # A window of a text begins with one token that is not predicted; an answer stands by itself.
        if len(branch.prompt_ids) != 1 or not follows:
            self._reader = _Reader(self._words)
            first = int(branch.prompt_ids[0]) if len(branch.prompt_ids) == 1 else None
            if first is not None and first not in self._special:
                self._reader.read(self._table.of(first), None)
            elif first is not None and self._table.adds_blank:
                text = text.removeprefix(b" ")
        self._reader.read(text, example)
        return len(text) - unseen
