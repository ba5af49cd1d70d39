"""Single tokens whose rows of the embedding are trained.

Owns `lora.trainable_token_indices`: from texts and ids to ids, and what PEFT's configuration says of them.
"""

from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loralab.config.schema import LoraConfig
from loralab.errors import ConfigError

_WHERE = "key lora.trainable_token_indices"
_MOST_SHOWN = 8


def resolve_token_ids(lora: LoraConfig, tokenizer: PreTrainedTokenizerBase) -> LoraConfig:
    """Return the section with every token by its id.

    Args:
        lora: the adapter section.
        tokenizer: the one that training uses.

    Raises:
        ConfigError: a text that is not one token, or a token that is named twice.
    """
    tokens = lora.trainable_token_indices
    if tokens is None:
        return lora
    ids = [token if isinstance(token, int) else _find_token(token, tokenizer) for token in tokens]
    if not ids:
        raise ConfigError("trainable_token_indices names no token: []", where=_WHERE, fix="list tokens, or remove it")
    twice = [index for index, number in enumerate(ids) if number in ids[:index]]
    if twice:
        first, again = ids.index(ids[twice[0]]), twice[0]
        same = f"{tokens[first]!r} and {tokens[again]!r} are one token, {ids[again]}"
        what = same if tokens[first] != tokens[again] else f"token {tokens[again]!r} is named twice"
        raise ConfigError(what, where=_WHERE, fix="name it once")
    return lora.model_copy(update={"trainable_token_indices": ids})


def _find_token(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of a text that is one token: in the vocabulary's own spelling, or as it is encoded."""
    entry = tokenizer.get_vocab().get(text)
    encoded = tokenizer.encode(text, add_special_tokens=False)
    alone = encoded[0] if len(encoded) == 1 else None
    if entry is not None and alone is not None and entry != alone:
        spelled = tokenizer.convert_ids_to_tokens(alone)
        raise ConfigError(
            f"{text!r} may be token {entry}, spelled so in the vocabulary, or token {alone} ({spelled!r}), as it is "
            "encoded",
            where=_WHERE,
            fix=f"give the id: {entry} or {alone}",
        )
    found = entry if entry is not None else alone
    if found is None:
        pieces = tokenizer.convert_ids_to_tokens(encoded)
        shown = ", ".join(repr(piece) for piece in pieces[:_MOST_SHOWN]) + (", .." if len(pieces) > _MOST_SHOWN else "")
        raise ConfigError(
            f"{text!r} is not one token but {len(pieces)}: {shown or 'nothing'}",
            where=_WHERE,
            fix="name one token of the vocabulary; a new one must first be in the base model's folder: "
            "tokenizer.add_tokens, model.resize_token_embeddings, save_pretrained of both",
        )
    return found


def resolve_trainable_tokens(base: PreTrainedModel, lora: LoraConfig) -> dict[str, Any]:
    """Return what PEFT's configuration says of trained tokens; nothing where there are none.

    Raises:
        ConfigError: an id that the embedding has no row for, or an embedding that is trained whole.
    """
    ids = lora.trainable_token_indices
    if ids is None:
        return {}
    embedding = cast(nn.Embedding, base.get_input_embeddings())
    size = embedding.weight.shape[0]
    texts = [token for token in ids if isinstance(token, str)]
    if texts:
        raise ConfigError(f"token {texts[0]!r} is given as text, where no tokenizer is", where=_WHERE, fix="give ids")
    outside = [token for token in ids if isinstance(token, int) and not 0 <= token < size]
    if outside:
        raise ConfigError(
            f"no token {outside[0]}: the embedding has {size} rows", where=_WHERE, fix=f"give ids from 0 to {size - 1}"
        )
    name = next(full for full, module in base.named_modules() if module is embedding)
    if lora.modules_to_save and any(f".{name}".endswith(f".{saved}") for saved in lora.modules_to_save):
        raise ConfigError(
            f"the embedding {name!r} is trained whole, by modules_to_save, and by single tokens",
            where=f"{_WHERE}, key lora.modules_to_save",
            fix="choose one of the two",
        )
    return {"trainable_token_indices": {name: list(ids)}}
