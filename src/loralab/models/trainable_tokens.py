"""Single tokens whose rows are trained.

Owns `lora.trainable_token_indices`: from texts and ids to ids, and what PEFT's configuration says of them. What a
token needs that the base does not have yet is added in `new_tokens.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loralab.config.schema import LoraConfig
from loralab.errors import ConfigError
from loralab.models.new_tokens import WHERE, NewToken, add_new_tokens
from loralab.models.trained_modules import is_tied, resolve_trained_modules, trained_names


class SettledLora(LoraConfig):
    """An adapter section with every token by its id.

    Attributes:
        new_tokens: those that were added to the tokenizer, and that the base needs rows for.
    """

    new_tokens: tuple[NewToken, ...] = ()


def settle_tokens(lora: LoraConfig, tokenizer: PreTrainedTokenizerBase) -> LoraConfig:
    """Return the section with every token by its id; a text that is no token yet is added to the tokenizer.

    Args:
        lora: the adapter section.
        tokenizer: the one that training uses, before any data is tokenized.

    Returns:
        A `SettledLora`, or `lora` itself where it names no tokens.

    Raises:
        ConfigError: a text that cannot be one token, or a token that is named twice.
    """
    tokens = lora.trainable_token_indices
    if tokens is None:
        return lora
    if not tokens:
        raise ConfigError("trainable_token_indices names no token: []", where=WHERE, fix="list tokens, or remove it")
    known = {token: token if isinstance(token, int) else _find_token(token, tokenizer) for token in tokens}
    missing = [token for token, number in known.items() if isinstance(token, str) and number is None]
    added = add_new_tokens(missing, tokenizer) if missing else ()
    known |= {token.text: token.id for token in added}
    ids = [known[token] for token in tokens]
    twice = [index for index, number in enumerate(ids) if number in ids[:index]]
    if twice:
        first, again = ids.index(ids[twice[0]]), twice[0]
        same = f"{tokens[first]!r} and {tokens[again]!r} are one token, {ids[again]}"
        what = same if tokens[first] != tokens[again] else f"token {tokens[again]!r} is named twice"
        raise ConfigError(what, where=WHERE, fix="name it once")
    return SettledLora.model_validate({**dict(lora), "trainable_token_indices": ids, "new_tokens": added})


def new_tokens_of(lora: LoraConfig) -> tuple[NewToken, ...]:
    """Return the tokens of an adapter section that its base does not have."""
    return lora.new_tokens if isinstance(lora, SettledLora) else ()


def _find_token(text: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of a text that is one token: in the vocabulary's own spelling, or as it is encoded; else None."""
    entry = tokenizer.get_vocab().get(text)
    encoded = tokenizer.encode(text, add_special_tokens=False)
    alone = encoded[0] if len(encoded) == 1 else None
    if alone is not None and alone == tokenizer.unk_token_id and text != tokenizer.unk_token:
        alone = None  # stands for any text that the vocabulary lacks
    if entry is not None and alone is not None and entry != alone:
        spelled = tokenizer.convert_ids_to_tokens(alone)
        raise ConfigError(
            f"{text!r} may be token {entry}, spelled so in the vocabulary, or token {alone} ({spelled!r}), as it is "
            "encoded",
            where=WHERE,
            fix=f"give the id: {entry} or {alone}",
        )
    return entry if entry is not None else alone


def resolve_trainable_tokens(base: PreTrainedModel, lora: LoraConfig) -> dict[str, Any]:
    """Return what PEFT's configuration says of trained tokens; nothing where there are none.

    The rows of a head that is a matrix of its own are trained for new tokens alone: with a row that nobody
    trained, the model could not learn to say them.

    Args:
        base: the base model, which has rows for new tokens already.
        lora: the adapter section, tokens by their ids.

    Raises:
        ConfigError: an id that the embedding has no row for, an embedding that is trained whole, or a head
            whose single rows PEFT cannot train.
    """
    ids = lora.trainable_token_indices
    if ids is None:
        return {}
    embedding = cast(nn.Embedding, base.get_input_embeddings())
    size = embedding.weight.shape[0]
    texts = [token for token in ids if isinstance(token, str)]
    if texts:
        raise ConfigError(f"token {texts[0]!r} is given as text, where no tokenizer is", where=WHERE, fix="give ids")
    outside = [token for token in ids if isinstance(token, int) and not 0 <= token < size]
    if outside:
        raise ConfigError(
            f"no token {outside[0]}: the embedding has {size} rows", where=WHERE, fix=f"give ids from 0 to {size - 1}"
        )
    whole = trained_names(base, resolve_trained_modules(base, lora).get("modules_to_save", ()))
    name = _name_of(embedding, base)
    if name in whole:
        raise ConfigError(
            f"the embedding {name!r} is trained whole, by modules_to_save, and by single tokens",
            where=f"{WHERE}, key lora.modules_to_save",
            fix="choose one of the two",
        )
    rows = {name: list(ids)}
    new = [token.id for token in new_tokens_of(lora)]
    head = cast(nn.Module, base.get_output_embeddings())
    if not is_tied(base) and (not new or _name_of(head, base) in whole):
        return {"trainable_token_indices": rows}
    if getattr(head, "bias", None) is not None:
        raise ConfigError(
            f"the head {_name_of(head, base)!r} has a bias, which PEFT leaves out where single rows of it are trained",
            where=WHERE,
            fix="leave out lora.trainable_token_indices",
        )
    return {"trainable_token_indices": rows if is_tied(base) else {**rows, _name_of(head, base): new}}


def trained_tokens(config: PeftConfig) -> set[int]:
    """Return the ids of the tokens whose rows an adapter replaces, in embedding or head."""
    found: Mapping[str, Sequence[int]] | Sequence[int] = getattr(config, "trainable_token_indices", None) or ()
    lists = found.values() if isinstance(found, Mapping) else [found]
    return {int(number) for numbers in lists for number in numbers}


def _name_of(wanted: nn.Module, base: PreTrainedModel) -> str:
    found: str = next(full for full, module in base.named_modules() if module is wanted)
    return found
