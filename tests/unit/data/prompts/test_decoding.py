"""Ids back to text: whole characters, nothing lost, and when two texts are the same to a tokenizer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loralab.data.prompts.decoding import Decoder
from unit.data.prompters import build_tokenizer

BYTES = build_tokenizer()
DECODER = Decoder(BYTES, BYTES.eos_token_id)


def build_metaspace() -> PreTrainedTokenizerFast:
    """Return a tokenizer that puts a blank before every text and takes it off again, as SentencePiece does."""
    vocabulary = {"<unk>": 0, "</s>": 1, "\u2581a": 2, "\u2581b": 3, "a": 4, "\u2581": 5, "b": 6}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\u2581", "a"), ("\u2581", "b")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFC()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_pieces_are_whole_characters_and_lose_nothing(text: str) -> None:
    ids = BYTES(text, add_special_tokens=False)["input_ids"]
    pieces = DECODER.pieces(ids)
    assert [token for piece in pieces for token in piece.ids] == ids
    if "\ufffd" not in text:
        assert "".join(piece.text for piece in pieces) == text == DECODER.texts([ids])[0]
        assert all("\ufffd" not in piece.text for piece in pieces)


def test_half_a_character_stays_what_it_is() -> None:
    ids = BYTES("\u4e16", add_special_tokens=False)["input_ids"]
    (piece,) = DECODER.pieces(ids[:2])
    assert (piece.ids, piece.text) == (tuple(ids[:2]), "\ufffd")


def test_a_leading_blank_is_kept() -> None:
    tokenizer = build_metaspace()
    decoder = Decoder(tokenizer, tokenizer.eos_token_id)
    assert tokenizer.decode([2, 3]) == "a b"
    assert decoder.texts([[2, 3], [4], []]) == [" a b", "a", ""]


@pytest.mark.parametrize(
    ("decoded", "text", "same"),
    [("a", "a", True), ("\u00e9", "e\u0301", True), ("a b", "a\u2581b", True), ("a", "b", False), ("a", " a", False)],
)
def test_texts_are_the_same_in_the_normal_form_of_the_tokenizer(decoded: str, text: str, same: bool) -> None:
    tokenizer = build_metaspace()
    assert Decoder(tokenizer, tokenizer.eos_token_id).same(decoded, text) is same


@pytest.mark.parametrize(("part", "held"), [("be  red", True), (" be red\n", True), ("", True), ("be blue", False)])
def test_parts_are_found_whatever_their_blanks(part: str, held: bool) -> None:
    assert DECODER.holds("you must be red.", part) is held
