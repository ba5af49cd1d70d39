"""What decides on the tokens of a run, by name: for the cache key, and for a resume that must find the same data.

Owns hashing. The two differ on purpose: the cache key holds the versions of all code that makes
tokens, so that no entry outlives its code; the identity holds the tokens themselves, so that
code which makes the same tokens leaves a run its data.
"""

import ast
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from loralab.config.schema import DataConfig
from loralab.data.reading.sources import Source
from loralab.data.tokens.pipeline import RowTokenizer
from loralab.data.tokens.store import TokenStore
from loralab.run import file_sha256

# Where tokens are made and where they are stored. What these modules import, and what that imports, counts too.
_PACKAGE = "loralab.data"
_MAKERS = ("tokens.pipeline", "tokens.store_writer")
_LIBRARIES = ("tokenizers", "transformers", "jinja2")
_PICTURE_LIBRARIES = ("pillow", "torchvision")


def entry_key(parts: Mapping[str, str]) -> str:
    """Return the name of the cache entry that `parts` describe."""
    return _hash(sorted(parts.items()))


def describe_entry(sources: Sequence[Source], workers: Sequence[RowTokenizer]) -> dict[str, str]:
    """Return what decides on the tokens of a cache entry, by readable name; long values as hashes.

    Args:
        sources: of the rows, in order.
        workers: what tokenizes the rows of each source.
    """
    return {
        "rows": _hash([source.fingerprint for source in sources]),
        **describe_tokenizing(workers),
        "code": code_version(),
        **{name: importlib.metadata.version(name) for name in _LIBRARIES},
        **_describe_pictures(workers),
    }


def _describe_pictures(workers: Sequence[RowTokenizer]) -> dict[str, str]:
    """Return where pictures are read from and by what: a stored row holds their whole paths. Nothing where none are."""
    if workers[0].prompter.pictures is None:
        return {}
    return {
        "picture_folder": _joined([str(worker.images.root) for worker in workers]),
        "pictures_outside": _joined([str(worker.images.allow_outside) for worker in workers]),
        **{name: importlib.metadata.version(name) for name in _PICTURE_LIBRARIES},
    }


@functools.cache
def code_version(folder: Path = Path(__file__).parent.parent) -> str:
    """Return a hash over all modules of `loralab.data` that decide on tokens or on how they are stored.

    Args:
        folder: the package's.
    """
    found: dict[str, str] = {}
    waiting = list(_MAKERS)
    while waiting:
        name = waiting.pop()
        path = folder / f"{name.replace('.', '/')}.py"
        if name not in found and path.is_file():
            found[name] = path.read_text(encoding="utf-8")
            waiting += _imports(found[name])
    return _hash(sorted(found.items()))


def _imports(source: str) -> list[str]:
    """Return the modules of `loralab.data` that a module imports, and names that lead to none."""
    names: list[str] = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name.removeprefix(f"{_PACKAGE}.") for name in names]


def describe_tokenizing(workers: Sequence[RowTokenizer]) -> dict[str, str]:
    """Return everything but the rows that decides on tokens, by readable name; long values as hashes.

    Args:
        workers: they differ in format and columns alone.
    """
    first = workers[0]
    prompter = first.prompter
    return {
        "format": _joined([worker.format for worker in workers]),
        "columns": _joined([_columns(worker) for worker in workers]),
        "on_bad_row": first.on_bad_row,
        **{name: str(value) for name, value in asdict(first.settings).items()},
        "tokenizer": tokenizer_sha256(prompter.tokenizer),
        # Templates write them, and data.stop_tokens changes the end token.
        "special_tokens": json.dumps({k: str(v) for k, v in sorted(prompter.tokenizer.special_tokens_map.items())}),
        "template": _hash(prompter.tokenizer.chat_template),
        "stop_tokens": json.dumps(prompter.stop.texts),
        "stop_token_ids": json.dumps(prompter.stop.ids),
        **({} if prompter.pictures is None else {"pictures": prompter.pictures.fingerprint}),
    }


def _columns(worker: RowTokenizer) -> str:
    return json.dumps(dict(sorted(worker.columns.items())))


def _joined(values: Sequence[str]) -> str:
    """Return what all values are, or all of them in turn where they differ."""
    return values[0] if len(set(values)) == 1 else ", ".join(values)


def data_identity(
    data: DataConfig, *, sources: Sequence[Source], workers: Sequence[RowTokenizer], splits: Mapping[str, TokenStore]
) -> dict[str, str]:
    """Return what a run's data is, by readable name.

    Args:
        data: the data section.
        sources: of all splits, in order.
        workers: what tokenized them; they differ in format and columns alone.
        splits: the tokens.
    """
    identity = {"rows": _hash([source.fingerprint for source in sources])}
    identity |= describe_tokenizing(workers)
    # Each once: into how many sources rows of one format are divided does not matter.
    identity["format"] = ", ".join(dict.fromkeys(worker.format for worker in workers))
    identity["columns"] = ", ".join(dict.fromkeys(map(_columns, workers)))
    amounts = {name: value for name in ("validation", "test") if isinstance(value := getattr(data, name), (int, float))}
    if amounts:
        seed = f", seed {data.split_seed}" if data.split_method == "random" else ""
        taken = ", ".join(f"{name} {amount}" for name, amount in amounts.items())
        identity["split"] = f"{taken}, {data.split_method}{seed}"
    return identity | {f"tokens of {name}": store.content_sha256() for name, store in splits.items()}


def identity_sha256(identity: Mapping[str, str]) -> str:
    """Return the fingerprint: one hash over an identity."""
    return _hash(sorted(identity.items()))


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash over everything of a tokenizer that decides on ids, wherever its files lie."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return _hash(backend.to_str())
    # Without a backend the ids come from the class's own code, its settings and its files.
    files = {name: tokenizer.init_kwargs.get(name) or getattr(tokenizer, name, None) for name in _file_names(tokenizer)}
    content = {name: file_sha256(Path(file)) for name, file in files.items() if file and Path(file).is_file()}
    placed = {"name_or_path", "chat_template", *files}
    settings = {k: repr(v) for k, v in sorted(tokenizer.init_kwargs.items()) if k not in placed}
    kind = f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"
    return _hash([kind, sorted(tokenizer.get_vocab().items()), settings, content])


def _file_names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [str(name) for name in tokenizer.vocab_files_names]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
