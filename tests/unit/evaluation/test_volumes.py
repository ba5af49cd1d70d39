"""Bytes and words of supervised text: those of the text itself, wherever windows cut it."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from loralab.data.example import Document, Example
from loralab.data.prompts.prompter import Prompter
from loralab.data.tokens.store import TokenStore
from loralab.data.tokens.tokenize import TokenizeSettings, Unit, tokenize_examples
from loralab.evaluation.volumes import TokenBytes, measure_volumes
from loralab.progress import Reporter
from unit.data.prompters import build_tokenizer
from unit.data.stores import branch, write_units

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
# Characters of one to four bytes, a blank of three bytes, double blanks, and words of many tokens.
TEXT = (
    "Gr\u00fc\u00dfe \u4e16\u754c,  \U0001f642\U0001f642 x\u2003y na\u00efve\nstrawberries \u65e5\u672c\u8a9e the cat "
    * 3
)
TEXTS = (TEXT, "one", "\u4e16", "  two  words  ")


def build_pieces() -> PreTrainedTokenizerFast:
    """Return a tokenizer of pieces and bytes that begins a text with a blank and a bos token, as Llama's does."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), "\u2581"]
    tokens += [chr(value) for value in range(0x21, 0x7F)]
    backend = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def prompter_of(tokenizer: PreTrainedTokenizerBase) -> Prompter:
    tokenizer.chat_template = TEMPLATE
    return Prompter(tokenizer)


BYTES, PIECES = prompter_of(build_tokenizer()), prompter_of(build_pieces())


def windows(folder: Path, prompter: Prompter, max_length: int, texts: tuple[str, ...] = TEXTS) -> TokenStore:
    settings = TokenizeSettings(train_on="response", max_length=max_length, truncation="right", long_text="split")
    documents: list[Example] = [Document(text) for text in texts]
    rows = enumerate(tokenize_examples(documents, prompter=prompter, settings=settings), start=1)
    return write_units(folder, [(0, row, unit) for row, units in rows for unit in units])


def measure(split: TokenStore, prompter: Prompter) -> tuple[list[float], list[float]]:
    volumes, words = measure_volumes(split, prompter, reporter=Reporter())
    return volumes.tolist(), words.tolist()


def by_text(split: TokenStore, prompter: Prompter) -> list[tuple[float, float]]:
    """Return the sums over the windows of each text."""
    found = zip(split.origins[:, 1].tolist(), *measure(split, prompter), strict=True)
    sums = {row: np.zeros(2) for row in split.origins[:, 1].tolist()}
    for row, volume, words in found:
        sums[row] += volume, words
    return [(float(a), float(b)) for a, b in sums.values()]


def behind_first_token(text: str, prompter: Prompter) -> tuple[int, int]:
    """Return bytes and words of what is predicted: the text, without its first token where no bos token is there."""
    if prompter is PIECES:
        # A tokenizer that puts a blank before a text takes one that it has for its own.
        return len(text.removeprefix(" ").encode()), len(text.split())
    first = len(TokenBytes(prompter).of(prompter.encode([text])[0][0]))
    return len(text.encode()) - first, len(text.split()) - (not text[0].isspace())


@pytest.mark.parametrize("prompter", [BYTES, PIECES], ids=["bytes", "pieces"])
@pytest.mark.parametrize("max_length", [2, 3, 5, 8, 64, 4096])
def test_sums_are_those_of_the_text_wherever_it_is_cut(tmp_path: Path, prompter: Prompter, max_length: int) -> None:
    split = windows(tmp_path / "store", prompter, max_length)
    assert by_text(split, prompter) == [behind_first_token(text, prompter) for text in TEXTS]


def test_a_word_counts_in_the_row_where_it_begins(tmp_path: Path) -> None:
    split = windows(tmp_path / "store", PIECES, 4, ("abcd ef",))
    # The tokens are <s> _ a b | c d _ | e f </s>: the blank before the text is not of the text.
    assert measure(split, PIECES) == ([2, 3, 2], [1, 0, 1])


def test_a_character_that_windows_cut_counts_where_it_begins(tmp_path: Path) -> None:
    split = windows(tmp_path / "store", PIECES, 2, ("a \u4e16\u754c",))
    # <s> | _ | a | _ | three bytes | three bytes | </s>: the blank before the text is not of the text
    assert measure(split, PIECES) == ([0, 1, 1, 1, 1, 1, 1, 1, 1, 0], [0, 1, 0, 1, 0, 0, 0, 0, 0, 0])


def test_rows_that_do_not_follow_each_other_are_not_read_on(tmp_path: Path) -> None:
    split = windows(tmp_path / "store", BYTES, 4, ("qqzz jjkk", "vvww"))
    ids = [BYTES.encode([text])[0] for text in ("qqzz jjkk", "vvww")]
    assert [len(each) for each in ids] == [9, 4]
    # q | q z z | _ j j | k k .; v | v w w | .
    assert measure(split, BYTES) == ([3, 3, 2, 3, 0], [0, 1, 0, 0, 0])
    part = split.select(np.array([2, 1, 4, 0]))
    assert measure(part, BYTES) == ([2, 3, 0, 3], [0, 1, 0, 0])


def test_answers_stand_by_themselves_and_stop_tokens_are_no_text(tmp_path: Path) -> None:
    stop = BYTES.stop.ids[0]
    prompt, yes, caf = (BYTES.encode([text])[0] for text in ("is it", "yes", " caf\u00e9 bar"))
    unit = Unit([branch(prompt, [*yes, stop]), branch([*prompt, *yes, stop], [*caf, stop])])
    split = write_units(tmp_path / "store", [(0, 1, unit), (0, 2, Unit([branch(prompt, yes)]))])
    assert measure(split, BYTES) == ([3 + len(" caf\u00e9 bar".encode()), 3], [3, 1])


def test_a_stop_token_inside_ends_a_word(tmp_path: Path) -> None:
    stop = BYTES.stop.ids[0]
    (a,) = BYTES.encode(["a"])
    split = write_units(tmp_path / "store", [(0, 1, Unit([branch([stop], [*a, stop, *a, stop])]))])
    assert measure(split, BYTES) == ([2], [2])


class Listening(Reporter):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.told: list[tuple[int, int | None]] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def progress(self, label: str, done: int, total: int | None, *, detail: str = "") -> None:
        self.told.append((done, total))


def test_a_long_split_tells_of_progress(tmp_path: Path) -> None:
    split = windows(tmp_path / "store", BYTES, 2, ("x" * 2500,))
    reporter = Listening()
    measure_volumes(split, BYTES, reporter=reporter)
    assert reporter.told == [(1024, len(split)), (2048, len(split))]
    assert reporter.said == []


def test_a_tokenizer_that_spells_otherwise_is_told_of(tmp_path: Path) -> None:
    vocabulary = {"[UNK]": 0, "[SEP]": 1, "play": 2, "##ing": 3, "now": 4}
    backend = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    prompter = prompter_of(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", unk_token="[UNK]"))
    split = write_units(tmp_path / "store", [(0, 1, Unit([branch([4], [2, 3, 4, 1])]))])
    reporter = Listening()
    volumes, words = measure_volumes(split, prompter, reporter=reporter)
    assert (volumes.tolist(), words.tolist()) == ([len(" playing now")], [2])
    assert reporter.said == [
        "words and bytes: this tokenizer does not spell its tokens in bytes or pieces: each counts as what it is "
        "decoded to by itself"
    ]
