"""Tokens that a base does not have yet: in its tokenizer, its embedding and its head.

Owns what is added for a new token, and what its rows start from. All of it happens in memory: the base on
disk stays as it is. Which tokens there are, and that their rows are trained, is `trainable_tokens.py`'s.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from loralab.errors import ConfigError, ModelError, excerpt
from loralab.models.precision import Resolved
from loralab.models.trained_modules import is_tied

WHERE = "key lora.trainable_token_indices"
_MOST_SHOWN = 8
# What a model was seen to raise for an id that one of its tables has no row for.
_REFUSALS = (RuntimeError, IndexError, ValueError, TypeError)


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that the base does not have.

    Attributes:
        text: as it stands in the data.
        id: its id in the tokenizer that has it.
        pieces: ids of the tokens that its text was before.
    """

    text: str
    id: int
    pieces: tuple[int, ...]


def add_new_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[NewToken, ...]:
    """Add texts to a tokenizer, each as one token.

    Args:
        texts: none of them is one token yet.
        tokenizer: the one that training uses; it is changed.

    Raises:
        ConfigError: a text cannot be a token, or this tokenizer takes none.
    """
    pieces = {text: _find_pieces(text, tokenizer) for text in texts}
    try:
        tokenizer.add_tokens([_as_written(text) for text in texts])
    except (NotImplementedError, ValueError, TypeError, AttributeError) as error:
        raise _takes_none(texts[0], tokenizer, excerpt(error)) from error
    known = tokenizer.get_vocab()
    for text in texts:
        if text not in known:
            raise _takes_none(text, tokenizer, "it left it out")
        _check_whole(text, known[text], tokenizer)
    return tuple(NewToken(text, known[text], pieces[text]) for text in texts)


def _as_written(text: str) -> AddedToken:
    """Return a token that is found wherever its text stands, as it stands.

    It is not special: special tokens are left out of answers when these are turned into text, and are not
    looked for where a text must not command the model. It is found inside words too, since tags stand close to
    their content, and before the tokenizer normalizes a text, which may change letters and blanks of the token.
    """
    return AddedToken(text, single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)


def _find_pieces(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    if not text.strip():
        raise ConfigError(
            f"{text!r} holds nothing but blanks, and cannot be a new token",
            where=WHERE,
            fix="name a text with letters or signs",
        )
    found: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if not found:
        raise ConfigError(
            f"the tokenizer makes nothing of {text!r}: there are no rows for a new token to start from",
            where=WHERE,
            fix="name a text that the tokenizer knows the letters of",
        )
    return tuple(found)


def _takes_none(text: str, tokenizer: PreTrainedTokenizerBase, why: str) -> ConfigError:
    return ConfigError(
        f"{text!r} is not one token, and {type(tokenizer).__name__} takes no new ones: {why}",
        where=WHERE,
        fix="name single tokens of the vocabulary, or take a base with a tokenizer.json",
    )


def _check_whole(text: str, number: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a new token is found in its own text, and is written as it."""
    found: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if found != [number]:
        raise ConfigError(
            f"{text!r} was added, and yet the tokenizer makes {show_pieces(found, tokenizer)} of it",
            where=WHERE,
            fix="name a text that holds no other token that is found first",
        )
    # Byte-level tokenizers read the letters from U+00A1 to U+0143 of a token as bytes.
    written = str(tokenizer.decode([number]))
    if written.strip() != text.strip():
        raise ConfigError(
            f"the tokenizer would write the new token {text!r} as {written!r} in answers",
            where=WHERE,
            fix="name a text of ASCII signs, such as <|name|>",
        )


def show_pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the first few tokens of a text, in words."""
    pieces = cast(list[str], tokenizer.convert_ids_to_tokens(list(ids[:_MOST_SHOWN])))
    return ", ".join(map(repr, pieces)) + (", .." if len(ids) > _MOST_SHOWN else "") or "nothing"


def find_new_tokens(
    trained: Iterable[int], *, own: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase
) -> tuple[NewToken, ...]:
    """Return which of an adapter's trained tokens its base does not have.

    Args:
        trained: ids of the tokens.
        own: the adapter's tokenizer.
        base: the base's, whose pieces are the ones that the tokens were before.

    Raises:
        ModelError: the base has another token under the id of a new one.
    """
    added, known = {number: text for text, number in own.get_added_vocab().items()}, base.get_vocab()
    taken = {number: text for text, number in known.items()}
    found = []
    for number in sorted(trained):
        text = added.get(number)
        if text is None or text in known:
            continue
        if number in taken:
            raise ModelError(
                f"the adapter's new token {text!r} is token {number}, which in this base is {taken[number]!r}",
                where="key model.name",
                fix="name the base that it was trained on",
            )
        found.append(NewToken(text, number, tuple(base.encode(text, add_special_tokens=False))))
    return tuple(found)


def grow_vocabulary(base: PreTrainedModel, tokens: Sequence[NewToken]) -> dict[str, Resolved[str]]:
    """Give a base the rows of new tokens, in memory; nothing where there are none.

    Each new row is the mean of the rows of the pieces that its text was before, in the embedding and in a head
    of its own. Rows that a base has to spare are taken first.

    Args:
        base: the frozen base model, without an adapter; with numbers or without.
        tokens: what its tokenizer was given.

    Returns:
        What was done, with the reason; for `run.json`.

    Raises:
        ModelError: this base cannot take new rows.
    """
    if not tokens:
        return {}
    tables = _find_tables(base)
    before = tables[0].weight.shape[0]
    _check_pieces(tokens, rows=min(int(table.weight.shape[0]) for table in tables))
    rows = max(token.id for token in tokens) + 1
    _enlarge(base, tables, rows)
    for table in tables:
        with torch.no_grad():
            for token in tokens:
                mean = table.weight[list(token.pieces)].float().mean(dim=0)
                table.weight[token.id] = mean.to(table.weight.dtype)
    _check_runs(base, [token.id for token in tokens])
    return {"new_tokens": _describe(tokens, before=before, rows=rows, tied=len(tables) == 1)}


def _find_tables(base: PreTrainedModel) -> list[Any]:
    """Return the embedding, and the head where it is a matrix of its own."""
    embedding: Any = base.get_input_embeddings()
    head: Any = base.get_output_embeddings()
    tables = [embedding] if is_tied(base) or head is None else [embedding, head]
    for table, kind, name in zip(tables, (nn.Embedding, nn.Linear), ("embedding", "head"), strict=False):
        weight = getattr(table, "weight", None)
        if not isinstance(table, kind) or weight is None or not weight.is_floating_point():
            held = "quantized" if isinstance(table, kind) else f"a {type(table).__name__}"
            raise ModelError(
                f"the {name} of {type(base).__name__} is {held}, and takes no rows for new tokens",
                where=WHERE,
                fix="name single tokens of the vocabulary",
            )
    return tables


def _check_pieces(tokens: Sequence[NewToken], *, rows: int) -> None:
    for token in tokens:
        outside = [number for number in token.pieces if number >= rows]
        if outside:
            raise ModelError(
                f"token {outside[0]}, a piece of {token.text!r}, has no row: the model has {rows}",
                where="key model.name",
                fix="use the tokenizer that belongs to the model",
            )


def _enlarge(base: PreTrainedModel, tables: Sequence[Any], rows: int) -> None:
    """Make tables larger that have fewer rows.

    The configuration keeps its `vocab_size`: by it PEFT tells that all but the trained rows are as on disk.
    Where it differs, PEFT saves both matrices whole with every checkpoint.
    """
    head: Any = base.get_output_embeddings()
    for table in tables:
        old = table.weight
        if old.shape[0] >= rows:
            continue
        held = nn.Parameter(lengthen(old.detach(), rows), requires_grad=old.requires_grad)
        for user in {id(user): user for user in (table, head)}.values():
            if user is not None and user.weight is old:  # a head that is the embedding stays it
                user.weight = held
                setattr(user, "num_embeddings" if isinstance(user, nn.Embedding) else "out_features", rows)
    bias = getattr(head, "bias", None)
    if bias is not None and bias.shape[0] < rows:
        head.bias = nn.Parameter(lengthen(bias.detach(), rows), requires_grad=bias.requires_grad)


def lengthen(table: Tensor, rows: int) -> Tensor:
    """Return a table with more rows, which all hold the mean: also those between that no token of ours has.

    Args:
        table: a row for each token, or a number for each.
        rows: at least as many as it has.
    """
    longer = torch.empty((rows, *table.shape[1:]), dtype=table.dtype, device=table.device)
    longer[: table.shape[0]] = table
    longer[table.shape[0] :] = table.mean(dim=0, dtype=torch.float32)
    return longer


def _check_runs(base: PreTrainedModel, ids: Sequence[int]) -> None:
    """Check that no other table of the model goes by token ids."""
    device = next(base.parameters()).device
    if device.type == "meta":
        return
    try:
        with torch.no_grad():
            base(input_ids=torch.tensor([list(ids[:_MOST_SHOWN])], device=device), use_cache=False)
    except _REFUSALS as error:
        raise ModelError(
            f"{type(base).__name__} does not run with new tokens: {excerpt(error)}",
            where=WHERE,
            fix="name single tokens of the vocabulary",
        ) from error


def _describe(tokens: Sequence[NewToken], *, before: int, rows: int, tied: bool) -> Resolved[str]:
    where = "the embedding, which is the head" if tied else "embedding and head"
    room = f"which grew from {before} to {rows}" if rows > before else f"which had {before}, some of them spare"
    return Resolved(
        ", ".join(f"{token.text!r} = {token.id}" for token in tokens),
        f"added to the tokenizer and to the rows of {where}, {room}; a new row starts as the mean of the rows of the "
        "pieces that its text was before, and is trained; figures of the base are those with these first rows, the "
        "base on disk is unchanged",
    )
