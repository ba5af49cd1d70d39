"""A data set of the Hub as it lies prepared in the cache of `datasets`, by its commit.

The library keeps what it prepares in a folder that is named by the commit, but takes whichever is newest there when
the Hub does not answer. Owns taking the named one or none.
"""

from pathlib import Path
from typing import Any

import datasets
import yaml
from datasets.naming import camelcase_to_snakecase
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub import _CACHED_NO_EXIST, metadata_load, try_to_load_from_cache

from loralab.hub.cache import is_commit

_DEFAULT = "default"


def load_prepared(name: str, config: str | None, commit: str | None, *, split: str) -> datasets.Dataset | None:
    """Load a split of a commit from the cache, without a request; None where it is not there or no commit is named.

    Args:
        name: Hub id.
        config: its configuration, or None for the default one.
        commit: the commit by its whole hash; of a branch or tag the cache cannot tell where it stands.
        split: name or slice.

    Raises:
        ValueError: the data set has no such split.
    """
    if commit is None or not is_commit(commit):
        return None
    chosen = config or _default_config(name, commit)
    found = sorted(_folder(name).glob(f"{chosen}/*/{commit}")) if chosen else []
    if len(found) != 1 or not (found[0] / "dataset_info.json").is_file():
        return None
    builder: Any = Cache(
        dataset_name=name.rpartition("/")[2],
        repo_id=name,
        config_name=chosen,
        version=found[0].parent.name,
        hash=commit,
    )
    return builder.as_dataset(split=split)


def commit_of(dataset: datasets.Dataset) -> str | None:
    """Return the commit that a loaded split was prepared from, or None where its files do not say."""
    folders = {Path(file["filename"]).parent.name for file in dataset.cache_files}
    name = folders.pop() if len(folders) == 1 else ""
    return name if is_commit(name) else None


def _folder(name: str) -> Path:
    """Return where the library prepares the configurations of a data set."""
    owner, _, last = name.rpartition("/")
    parts = [*filter(None, [owner]), camelcase_to_snakecase(last)]
    return Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "___".join(parts)


def _default_config(name: str, commit: str) -> str | None:
    """Return the configuration that is meant where none is named, as the card in the cache says; None if unclear."""
    card = try_to_load_from_cache(name, "README.md", revision=commit, repo_type="dataset")
    if not isinstance(card, str):
        return _DEFAULT if card is _CACHED_NO_EXIST else None
    try:
        configs = (metadata_load(card) or {}).get("configs")
        names = [str(each["config_name"]) for each in configs or ()]
        default = [str(each["config_name"]) for each in configs or () if each.get("default")]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        return None
    if len(names) <= 1:
        return next(iter(names), _DEFAULT)
    return next(iter(default), _DEFAULT if _DEFAULT in names else None)
