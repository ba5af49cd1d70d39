"""Trained tokens: from texts to ids, and rows of the embedding."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loralab.config.schema import LoraConfig
from loralab.errors import ConfigError
from loralab.models.adapters import build_adapter
from loralab.models.new_tokens import NewToken, grow_vocabulary
from loralab.models.trainable_tokens import SettledLora, new_tokens_of, resolve_trainable_tokens, settle_tokens
from support import tiny

VOCABULARY = 64


def tokens(*found: int | str, **lora: Any) -> LoraConfig:
    return LoraConfig(trainable_token_indices=list(found), r=2, **lora)


def ids_of(*found: int | str) -> Any:
    return settle_tokens(tokens(*found), tiny.build_tokenizer()).trainable_token_indices


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
    assert settle_tokens(lora, tiny.build_tokenizer()) is lora
    assert resolve_trainable_tokens(tiny.build_model(vocabulary=VOCABULARY), lora) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "what", "fix"),
    [
        (("  ",), "'  ' holds nothing but blanks", "name a text with letters"),
        ((), "trainable_token_indices names no token: []", "list tokens"),
        ((5, 5), "token 5 is named twice", "name it once"),
        (("<|sep|>", "<|sep|>"), "token '<|sep|>' is named twice", "name it once"),
        ((" cat", "Ġcat"), "' cat' and 'Ġcat' are one token, ", "name it once"),
    ],
)
def test_text_that_is_no_token(found: tuple[Any, ...], what: str, fix: str) -> None:
    said = problem(lambda: ids_of(*found))
    assert said.what.startswith(what)
    assert fix in said.fix


def test_a_text_that_is_no_token_is_added() -> None:
    tokenizer = tiny.build_tokenizer()
    size, pieces = len(tokenizer), tokenizer.encode("<|sep|>")
    vocabulary = tokenizer.get_vocab()
    settled = settle_tokens(tokens(" cat", "<|sep|>", 7), tokenizer)
    assert settled.trainable_token_indices == [vocabulary["Ġcat"], size, 7]
    assert new_tokens_of(settled) == (NewToken("<|sep|>", size, tuple(pieces)),)
    assert new_tokens_of(settled.model_copy(update={"r": 8})) == new_tokens_of(settled)
    assert settled.r == 2
    assert tokenizer.encode("a<|sep|>b")[1] == size
    again = settle_tokens(tokens(" cat", "<|sep|>"), tokenizer)  # there it is one of the vocabulary's
    assert (again.trainable_token_indices, new_tokens_of(again)) == ([vocabulary["Ġcat"], size], ())


def test_a_token_of_the_vocabulary_is_not_added() -> None:
    tokenizer = tiny.build_tokenizer()
    size = len(tokenizer)
    assert new_tokens_of(settle_tokens(tokens(" cat", tiny.END, 7), tokenizer)) == ()
    assert len(tokenizer) == size


def test_the_token_of_unknown_texts_stands_for_none() -> None:
    backend = Tokenizer(models.WordLevel({"cat": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    settled = settle_tokens(tokens("<|sep|>", "<unk>"), tokenizer)
    assert settled.trainable_token_indices == [2, 1]
    assert new_tokens_of(settled) == (NewToken("<|sep|>", 2, (1,)),)


def test_a_text_that_may_be_two_tokens_is_refused() -> None:
    """Tokenizers of the SentencePiece kind write a word alone otherwise than the same piece inside a word."""
    backend = Tokenizer(models.WordLevel({"cat": 0, "▁cat": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    said = problem(lambda: settle_tokens(tokens("cat"), tokenizer))
    assert said.what.startswith("'cat' may be token 0, spelled so in the vocabulary, or token 1 ('▁cat')")
    assert said.fix == "give the id: 0 or 1"
    assert settle_tokens(tokens("▁cat"), tokenizer).trainable_token_indices == [1]


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


def test_a_head_that_is_the_embedding_is_not_trained_whole_beside_tokens() -> None:
    base: Any = tiny.build_model("qwen2", vocabulary=VOCABULARY)
    said = problem(lambda: resolve_trainable_tokens(base, tokens(3, modules_to_save=["lm_head"])))
    assert said.what.startswith("the embedding 'model.embed_tokens' is trained whole")


def settled(*new: int, also: tuple[int, ...] = (), **lora: Any) -> SettledLora:
    """Return a section of new tokens, by id, and of others."""
    added = tuple(NewToken(f"<{number}>", number, (1, 2)) for number in new)
    return SettledLora(trainable_token_indices=[*new, *also], new_tokens=added, r=2, **lora)


@pytest.mark.parametrize(
    ("family", "lora", "rows"),
    [
        ("llama", {}, {"model.embed_tokens": [64, 9], "lm_head": [64]}),
        ("llama", {"modules_to_save": ["lm_head"]}, {"model.embed_tokens": [64, 9]}),
        ("qwen2", {}, {"model.embed_tokens": [64, 9]}),
        ("gpt2", {}, {"transformer.wte": [64, 9]}),
    ],
)
def test_a_new_token_has_a_row_in_a_head_of_its_own(family: Any, lora: dict[str, Any], rows: dict[str, Any]) -> None:
    base: Any = tiny.build_model(family, vocabulary=VOCABULARY)
    section = settled(64, also=(9,), **lora)
    grow_vocabulary(base, section.new_tokens)
    assert resolve_trainable_tokens(base, section) == {"trainable_token_indices": rows}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_head_with_a_bias_is_refused(family: Any) -> None:
    """PEFT's layer of single rows multiplies without it, and the model would be another one."""
    base: Any = tiny.build_model(family, vocabulary=VOCABULARY)
    base.get_output_embeddings().bias = torch.nn.Parameter(torch.ones(VOCABULARY))
    grow_vocabulary(base, settled(64).new_tokens)
    assert "has a bias, which PEFT leaves out" in problem(lambda: resolve_trainable_tokens(base, settled(64))).what
    if family == "llama":  # the head is not touched for tokens that the base has
        assert resolve_trainable_tokens(base, tokens(3)) == {"trainable_token_indices": {"model.embed_tokens": [3]}}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_training_makes_a_new_token_likelier(family: Any) -> None:
    base: Any = tiny.build_model(family, vocabulary=VOCABULARY).eval().requires_grad_(False)
    section = settled(64)
    grow_vocabulary(base, section.new_tokens)
    model, _ = build_adapter(base, section, seed=0)
    model.eval()
    for name, weight in model.named_parameters():
        weight.requires_grad_("trainable_tokens_delta" in name)  # by its rows alone
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    prompt = torch.tensor([[3, 5, 9]])  # by its row in the head alone
    optimizer = torch.optim.SGD(trained, lr=0.1)
    losses = []
    for _ in range(8):
        loss = -model(input_ids=prompt).logits[0, -1].log_softmax(-1)[64]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5


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
