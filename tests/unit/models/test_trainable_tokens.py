"""Trained tokens: from texts to ids, and rows of the embedding."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loralab.config.schema import LoraConfig
from loralab.errors import ConfigError
from loralab.models.adapters import build_adapter
from loralab.models.trainable_tokens import resolve_token_ids, resolve_trainable_tokens
from support import tiny

VOCABULARY = 64


def tokens(*found: int | str, **lora: Any) -> LoraConfig:
    return LoraConfig(trainable_token_indices=list(found), r=2, **lora)


def ids_of(*found: int | str) -> Any:
    return resolve_token_ids(tokens(*found), tiny.build_tokenizer()).trainable_token_indices


def problem(call: Any) -> Any:
    with pytest.raises(ConfigError) as caught:
        call()
    assert caught.value.problems[0].where.startswith("key lora.trainable_token_indices")
    return caught.value.problems[0]


def test_ids_and_texts_become_ids_in_their_order() -> None:
    vocabulary = tiny.build_tokenizer().get_vocab()
    wanted = [vocabulary["Ġcat"], 7, vocabulary[tiny.END], vocabulary["Ġdog"]]
    assert ids_of(" cat", 7, tiny.END, "Ġdog") == wanted  # as it is written, and in the vocabulary's spelling


def test_without_tokens_nothing_changes() -> None:
    lora = LoraConfig()
    assert resolve_token_ids(lora, tiny.build_tokenizer()) is lora
    assert resolve_trainable_tokens(tiny.build_model(vocabulary=VOCABULARY), lora) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "what", "fix"),
    [
        (
            (" catdog",),
            "' catdog' is not one token but 3: 'Ġcat'",
            "tokenizer.add_tokens, model.resize_token_embeddings",
        ),
        (("<|sep|>",), "'<|sep|>' is not one token but 6: '<', '|', 'se'", "name one token of the vocabulary"),
        (("",), "'' is not one token but 0: nothing", "name one token"),
        ((), "trainable_token_indices names no token: []", "list tokens"),
        ((5, 5), "token 5 is named twice", "name it once"),
        ((" cat", "Ġcat"), "' cat' and 'Ġcat' are one token, ", "name it once"),
    ],
)
def test_text_that_is_no_token(found: tuple[Any, ...], what: str, fix: str) -> None:
    said = problem(lambda: ids_of(*found))
    assert said.what.startswith(what)
    assert fix in said.fix


def test_a_text_that_may_be_two_tokens_is_refused() -> None:
    """Tokenizers of the SentencePiece kind write a word alone otherwise than the same piece inside a word."""
    backend = Tokenizer(models.WordLevel({"cat": 0, "▁cat": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    said = problem(lambda: resolve_token_ids(tokens("cat"), tokenizer))
    assert said.what.startswith("'cat' may be token 0, spelled so in the vocabulary, or token 1 ('▁cat')")
    assert said.fix == "give the id: 0 or 1"
    assert resolve_token_ids(tokens("▁cat"), tokenizer).trainable_token_indices == [1]


@pytest.mark.parametrize(
    ("lora", "what"),
    [
        (tokens(64), "no token 64: the embedding has 64 rows"),
        (tokens(-1), "no token -1: the embedding has 64 rows"),
        (tokens("cat"), "token 'cat' is given as text, where no tokenizer is"),
        (
            tokens(3, modules_to_save=["embed_tokens"]),
            "the embedding 'model.embed_tokens' is trained whole, by modules_to_save, and by single tokens",
        ),
    ],
)
def test_tokens_that_do_not_fit_the_base(lora: LoraConfig, what: str) -> None:
    base: Any = tiny.build_model(vocabulary=VOCABULARY)
    assert problem(lambda: resolve_trainable_tokens(base, lora)).what == what


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True), ("gpt2", True)])
def test_rows_are_those_of_the_named_tokens(family: Any, tied: bool) -> None:
    """A row that moves changes how its token is read, and how it is written where head and embedding are one."""
    base: Any = tiny.build_model(family, vocabulary=VOCABULARY).eval().requires_grad_(False)
    model, _ = build_adapter(base, tokens(9, 4), seed=0)
    model.eval()
    held = base.get_input_embeddings().token_adapter.base_layer.weight
    (rows,) = [weight for name, weight in model.named_parameters() if "trainable_tokens_delta" in name]
    assert torch.equal(rows, held[[9, 4]])
    with torch.no_grad():
        reads, other = torch.tensor([[1, 4, 2]]), torch.tensor([[1, 9, 2]])
        before = [model(input_ids=ids).logits for ids in (reads, other)]
        rows[1] += 1.0
        after = [model(input_ids=ids).logits for ids in (reads, other)]
    assert not torch.equal(after[0][0, 1:], before[0][0, 1:])
    changed = (after[1] - before[1]).abs().amax(dim=(0, 1)) > 0
    assert changed.nonzero().flatten().tolist() == ([4] if tied else [])
