"""Tokens that a base does not have: in its tokenizer, in its tables, and back from an adapter's tokenizer."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from loralab.errors import ConfigError, ModelError
from loralab.models.new_tokens import NewToken, add_new_tokens, find_new_tokens, grow_vocabulary
from loralab.models.trained_modules import is_tied
from support import tiny

ROWS = 64
NEW = (NewToken("<a>", ROWS, (3, 5, 8)), NewToken("<b>", ROWS + 1, (5,)))
FAMILIES: list[tuple[tiny.Family, bool]] = [("llama", False), ("qwen2", True), ("gpt2", True)]


def base_of(family: tiny.Family = "llama", *, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Any:
    return tiny.build_model(family, vocabulary=rows).to(dtype).eval().requires_grad_(False)


def small_words() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words in small letters, and of one token for all others."""
    backend = Tokenizer(models.WordLevel({"cat": 0, "dog": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def letters() -> PreTrainedTokenizerFast:
    """Return a tokenizer that leaves all letters out but two."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"c": 0, "t": 1}, [])))


# --- the tokenizer -----------------------------------------------------------------------------------------------


def test_a_text_becomes_one_token_wherever_it_stands() -> None:
    tokenizer = tiny.build_tokenizer()
    size, before = len(tokenizer), tokenizer.encode("<tool_call>")
    assert len(before) > 1
    (token,) = add_new_tokens(["<tool_call>"], tokenizer)
    assert token == NewToken("<tool_call>", size, tuple(before))
    for text in ("<tool_call>", "the cat<tool_call>runs", "x<tool_call>", "<tool_call><tool_call>"):
        assert tokenizer.encode(text).count(size) == text.count("<tool_call>")
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<tool call>") == tiny.build_tokenizer().encode("<tool call>")


def test_it_is_not_special_so_answers_keep_it() -> None:
    tokenizer = tiny.build_tokenizer()
    (token,) = add_new_tokens(["<tool_call>"], tokenizer)
    assert tokenizer.decode([token.id, tokenizer.eos_token_id], skip_special_tokens=True) == "<tool_call>"
    assert token.text not in tokenizer.all_special_tokens


def test_it_is_found_as_it_is_written() -> None:
    """A normalizer that writes all letters small would find the token in other texts, too."""
    tokenizer = small_words()
    (token,) = add_new_tokens(["<Call>"], tokenizer)
    assert tokenizer.encode("cat <Call> DOG") == [0, token.id, 1]
    assert token.id not in tokenizer.encode("<call>")


def test_pieces_are_those_from_before_all_new_tokens() -> None:
    plain = tiny.build_tokenizer()
    for texts in (["<a>", "<a><b>"], ["<a><b>", "<a>"]):
        tokenizer = tiny.build_tokenizer()
        tokens = {token.text: token for token in add_new_tokens(texts, tokenizer)}
        assert all(list(token.pieces) == plain.encode(text) for text, token in tokens.items())
        # One inside the other: the longer one where all of it stands, the shorter one elsewhere.
        assert tokenizer.encode("<a><b>") == [tokens["<a><b>"].id]
        assert tokens["<a>"].id in tokenizer.encode("<a><c>")


class Stubborn(PreTrainedTokenizerFast):
    """Takes new tokens, and leaves them out or never finds them."""

    finds = True

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        return super().add_tokens(new_tokens, special_tokens) if not self.finds else 0

    def encode(self, text: Any, *args: Any, **kwargs: Any) -> list[int]:
        return [1, 2]


class Closed(PreTrainedTokenizerFast):
    """Takes no new tokens."""

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        raise NotImplementedError("this vocabulary is closed")


def kind(built: type[PreTrainedTokenizerFast], **attributes: Any) -> PreTrainedTokenizerFast:
    tokenizer = built(tokenizer_object=tiny.build_tokenizer().backend_tokenizer, eos_token=tiny.END)
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.mark.parametrize(
    ("text", "tokenizer", "what"),
    [
        ("", tiny.build_tokenizer(), "'' holds nothing but blanks"),
        (" \n\t ", tiny.build_tokenizer(), r"' \n\t ' holds nothing but blanks"),
        ("<a>", letters(), "the tokenizer makes nothing of '<a>'"),
        ("<a>", kind(Closed), "'<a>' is not one token, and Closed takes no new ones: this vocabulary is closed"),
        ("<a>", kind(Stubborn), "'<a>' is not one token, and Stubborn takes no new ones: it left it out"),
        ("<a>", kind(Stubborn, finds=False), "'<a>' was added, and yet the tokenizer makes "),
        ("café", tiny.build_tokenizer(), "the tokenizer would write the new token 'café' as 'caf\ufffd' in answers"),
    ],
)
def test_texts_that_cannot_be_tokens(text: str, tokenizer: PreTrainedTokenizerFast, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        add_new_tokens([text], tokenizer)
    (problem,) = caught.value.problems
    assert problem.what.startswith(what)
    assert problem.where == "key lora.trainable_token_indices"


# --- the base ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_new_rows_are_the_mean_of_the_pieces(family: tiny.Family, tied: bool, dtype: torch.dtype) -> None:
    base, plain = base_of(family, dtype=dtype), base_of(family, dtype=dtype)
    said = grow_vocabulary(base, NEW)["new_tokens"]
    assert is_tied(base) == tied
    for table, old in (
        (base.get_input_embeddings(), plain.get_input_embeddings().weight),
        (base.get_output_embeddings(), plain.get_output_embeddings().weight),
    ):
        assert table.weight.shape[0] == ROWS + 2
        assert torch.equal(table.weight[:ROWS], old)
        assert torch.equal(table.weight[ROWS], old[[3, 5, 8]].float().mean(0).to(dtype))
        assert torch.equal(table.weight[ROWS + 1], old[5])
        assert not table.weight.requires_grad
    assert base.get_input_embeddings().num_embeddings == base.get_output_embeddings().out_features == ROWS + 2
    with torch.no_grad():
        logits = base(input_ids=torch.tensor([[1, ROWS + 1]])).logits
        expected = plain(input_ids=torch.tensor([[1, 5]])).logits
    torch.testing.assert_close(logits[..., :ROWS], expected)  # a token of one piece is read as that piece
    torch.testing.assert_close(logits[..., ROWS + 1], expected[..., 5])
    assert said.value == "'<a>' = 64, '<b>' = 65"
    assert f"which grew from {ROWS} to {ROWS + 2}" in said.reason
    assert ("rows of the embedding, which is the head, " in said.reason) == tied


def test_spare_rows_are_taken_first() -> None:
    base = base_of(rows=ROWS + 10)
    held = base.get_input_embeddings().weight
    said = grow_vocabulary(base, NEW)["new_tokens"]
    assert base.get_input_embeddings().weight is held
    assert held.shape[0] == base.lm_head.out_features == ROWS + 10
    assert torch.equal(held[ROWS], held[[3, 5, 8]].mean(0))
    assert "some of them spare" in said.reason


def test_the_configuration_keeps_the_number_on_disk() -> None:
    """By it PEFT tells whether embedding and head are to be saved whole."""
    base = base_of()
    grow_vocabulary(base, NEW)
    assert base.config.vocab_size == ROWS


def test_without_numbers_shapes_are_the_same() -> None:
    with torch.device("meta"):
        base: Any = tiny.build_model(vocabulary=ROWS)
    grow_vocabulary(base, NEW)
    assert base.lm_head.weight.shape == base.model.embed_tokens.weight.shape == (ROWS + 2, 32)
    assert base.lm_head.weight.is_meta


def test_without_new_tokens_nothing_happens() -> None:
    base = base_of()
    assert grow_vocabulary(base, ()) == {}
    assert base.get_input_embeddings().weight.shape[0] == ROWS


class Table(nn.Module):
    """A second table by token ids, as some families have in each layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.rows = inner, nn.Embedding(ROWS, 1)

    def forward(self, *, input_ids: torch.Tensor, **further: Any) -> Any:
        self.rows(input_ids)
        return self.inner(input_ids=input_ids, **further)


def with_second_table() -> Any:
    base = base_of()
    base.model = Table(base.model)
    base.get_input_embeddings = lambda: base.model.inner.embed_tokens
    return base


def with_packed_head() -> Any:
    base = base_of()
    base.lm_head.weight = nn.Parameter(torch.zeros(ROWS, 32, dtype=torch.uint8), requires_grad=False)
    return base


@pytest.mark.parametrize(
    ("base", "tokens", "what"),
    [
        (with_packed_head, NEW, "the head of LlamaForCausalLM is quantized, and takes no rows for new tokens"),
        (with_second_table, NEW, "LlamaForCausalLM does not run with new tokens: index out of range"),
        (base_of, (NewToken("<a>", 70, (3, 66)),), "token 66, a piece of '<a>', has no row: the model has 64"),
    ],
)
def test_bases_that_take_no_new_rows(base: Any, tokens: tuple[NewToken, ...], what: str) -> None:
    with pytest.raises(ModelError) as caught:
        grow_vocabulary(base(), tokens)
    assert caught.value.problems[0].what.startswith(what)


# --- back from an adapter's tokenizer ----------------------------------------------------------------------------


def test_the_tokens_of_an_adapter_are_found_again() -> None:
    own, base = tiny.build_tokenizer(), tiny.build_tokenizer()
    added = add_new_tokens(["<a>", "<b>"], own)
    ids = {token.id for token in added}
    assert find_new_tokens(ids | {base.eos_token_id, 7}, own=own, base=base) == added
    assert find_new_tokens(ids, own=own, base=own) == ()  # a base that was given them by hand
    assert find_new_tokens({7}, own=own, base=base) == ()


def test_a_base_with_another_token_in_that_place_is_refused() -> None:
    own, base = tiny.build_tokenizer(), tiny.build_tokenizer()
    (token,) = add_new_tokens(["<a>"], own)
    add_new_tokens(["<other>"], base)
    with pytest.raises(ModelError) as caught:
        find_new_tokens({token.id}, own=own, base=base)
    what = f"the adapter's new token '<a>' is token {token.id}, which in this base is '<other>'"
    assert caught.value.problems[0].what == what
