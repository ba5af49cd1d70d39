"""What the Hub's cache on this machine holds of a base model, told without a request.

A commit never changes, and `huggingface_hub` keeps the list of its files beside them: so what a commit has, and what
of it lies here, is known for ever. Owns which of a model's files loading needs; fetching them is `revisions.py`'s.
"""

import json
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from huggingface_hub import constants, get_cached_repo_tree, try_to_load_from_cache
from huggingface_hub.errors import CachedRepoTreeNotFoundError

from loralab.config.schema import ModelConfig

_COMMIT = re.compile(r"[0-9a-f]{40}")
INDEX = "model.safetensors.index.json"
CARD = "README.md"
Kind = Literal["model", "dataset"]
# What a merged model takes along.
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
# Beside the weights: configuration, tokenizer, template, processor, card and licence. Code is never fetched.
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", CARD, *LICENCES)
_MORE_TEMPLATES = "additional_chat_templates"


def is_local_only(model: ModelConfig) -> bool:
    """Return whether a base is loaded from the cache alone: by commit, all its files there, no code of its own.

    A local folder asks the Hub nothing, and needs no such word.
    """
    return not model.trust_remote_code and is_whole(model.name, model.revision)


def is_whole(name: str, revision: str | None) -> bool:
    """Return whether the cache has every file that loading a base may ask for.

    Args:
        name: Hub id.
        revision: only of a commit is the list of files known for good.
    """
    if revision is None or not is_commit(revision) or Path(name).expanduser().exists():
        return False
    listed = listed_files(name, revision)
    if listed is None or not is_fetched(name, revision):
        return False
    # transformers lists further templates in the cache only where that holds the whole repository.
    more = any(file.startswith(f"{_MORE_TEMPLATES}/") for file in listed)
    return all(in_cache(name, file, revision) is not None for file in listed if more or is_small(file))


def is_commit(revision: str | None) -> bool:
    """Return whether a revision is a commit by its whole hash, which never moves."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def listed_files(name: str, commit: str) -> list[str] | None:
    """Return the files of a commit as the cache lists them, or None where it has no list."""
    try:
        return [file.path for file in get_cached_repo_tree(name, revision=commit)]
    except (CachedRepoTreeNotFoundError, ValueError):  # ValueError: no name of a repository
        return None


def is_fetched(name: str, revision: str | None) -> bool:
    """Return whether the cache has a base model's configuration and weights."""
    if in_cache(name, constants.CONFIG_NAME, revision) is None:
        return False
    index = in_cache(name, INDEX, revision)
    weights = [constants.SAFETENSORS_SINGLE_FILE] if index is None else shards(index)
    return all(in_cache(name, file, revision) is not None for file in weights)


def in_cache(name: str, file: str, revision: str | None, *, kind: Kind = "model") -> Path | None:
    """Return where a file of a repository lies, or None."""
    try:
        found = try_to_load_from_cache(name, file, revision=revision, repo_type=kind)
    except ValueError:  # no name of a repository
        return None
    return Path(found) if isinstance(found, str) else None


def shards(index: Path) -> list[str]:
    """Return the files of weights that an index names."""
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def small_files(listed: Iterable[str]) -> list[str]:
    """Return what is fetched beside the weights."""
    return [file for file in listed if is_small(file)]


def is_small(file: str) -> bool:
    """Return whether a file is one of those that are fetched beside the weights."""
    folder, _, name = file.rpartition("/")
    return folder in ("", _MORE_TEMPLATES) and any(fnmatchcase(name, pattern) for pattern in _SMALL)
