"""Which commit of a model or data set a run uses: found once, then named.

Owns the look-up of a revision and the fetching of a base model's files, so that what fails there is said in
three lines before anything is loaded. Does not own which names are Hub ids: the callers know.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError

from loralab.errors import HubError
from loralab.hub.access import NETWORK_ERRORS, explain, is_offline, open_hub

Kind = Literal["model", "dataset"]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_INDEX = "model.safetensors.index.json"
# Beside the weights: configuration, tokenizer, template, processor. Code is never fetched.
_SMALL = (".json", ".jinja", ".txt", ".model")
_UNKNOWN: tuple[type[Exception], ...] = (*NETWORK_ERRORS, ValueError)
_WORDS = {"model": "the model", "dataset": "the data set"}


@dataclass(frozen=True, slots=True)
class Pin:
    """The commit that a name stood for when a run began.

    Attributes:
        name: Hub id.
        asked: the revision that the configuration names, or None.
        commit: what it resolved to, or None where that could not be learned.
        reason: how it was found.
    """

    name: str
    asked: str | None
    commit: str | None
    reason: str


def find_commit(kind: Kind, name: str, revision: str | None, *, where: str) -> Pin:
    """Return the commit that a revision stands for now.

    Args:
        kind: of the repository.
        name: Hub id.
        revision: branch, tag or commit; None is the default branch.
        where: the key that named it, for messages.

    Raises:
        HubError: the repository or revision is not there, not allowed, or the Hub cannot be reached.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return Pin(name, revision, revision, "a commit was named")
    if is_offline():
        cached = _cached_commit(kind, name, revision)
        why = "the newest in the cache, HF_HUB_OFFLINE is set" if cached else "HF_HUB_OFFLINE is set: not looked up"
        return Pin(name, revision, cached, why)
    api, what = open_hub(), f"{_WORDS[kind]} {name!r}" + (f", revision {revision!r}" if revision else "")
    try:
        info = api.repo_info(name, revision=revision, repo_type=kind)
        if getattr(info, "gated", False):  # its facts are public, its files are not
            api.auth_check(name, repo_type=kind)
    except NETWORK_ERRORS as error:
        raise explain(error, what, where=where) from error
    except ValueError as error:
        raise HubError(f"{what}: no valid Hub id", where=where, fix="name it as OWNER/NAME") from error
    return Pin(name, revision, info.sha, f"what {revision or 'the default branch'} was at the start")


def _cached_commit(kind: Kind, name: str, revision: str | None) -> str | None:
    if kind != "model":
        return None  # prepared data is not kept under its commit
    found = _in_cache(name, "config.json", revision)
    return None if found is None else found.parent.name


def fetch_model(name: str, commit: str, *, where: str, progress: Callable[[int, int], None]) -> None:
    """Fetch a base model's files into the cache: what loading needs, and nothing that could run.

    Args:
        name: Hub id.
        commit: which.
        where: the key that named it, for messages.
        progress: told of files done, of all.

    Raises:
        HubError: a file cannot be had, or there are no safetensors weights.
    """
    what = f"the model {name!r}"
    if is_offline() or is_fetched(name, commit):
        return  # loading takes what the cache has, and says what it lacks
    try:
        files = [file.rfilename for file in open_hub().model_info(name, revision=commit).siblings or []]
        wanted = [file for file in files if _is_small(file)]
        wanted += _weights(name, commit, files, where=where)
        for done, file in enumerate(wanted):
            hf_hub_download(name, file, revision=commit)
            progress(done + 1, len(wanted))
    except LocalEntryNotFoundError as error:
        raise explain(error.__cause__ or error, what, where=where) from error
    except NETWORK_ERRORS as error:
        raise explain(error, what, where=where) from error


def is_fetched(name: str, revision: str | None) -> bool:
    """Return whether the cache has a base model's configuration and weights, so that the Hub need not be asked."""
    if _in_cache(name, "config.json", revision) is None:
        return False
    index = _in_cache(name, _INDEX, revision)
    weights = [constants.SAFETENSORS_SINGLE_FILE] if index is None else _shards(index)
    return all(_in_cache(name, file, revision) is not None for file in weights)


def _in_cache(name: str, file: str, revision: str | None) -> Path | None:
    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _shards(index: Path) -> list[str]:
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def _is_small(file: str) -> bool:
    path = PurePosixPath(file)
    return len(path.parts) == 1 and path.suffix in _SMALL


def _weights(name: str, commit: str, files: list[str], *, where: str) -> list[str]:
    if constants.SAFETENSORS_SINGLE_FILE in files:
        return [constants.SAFETENSORS_SINGLE_FILE]
    if _INDEX in files:
        return _shards(Path(hf_hub_download(name, _INDEX, revision=commit)))
    others = sorted(file for file in files if PurePosixPath(file).suffix in {".bin", ".pt", ".pth", ".gguf", ".ckpt"})
    raise HubError(
        f"the model {name!r} has no safetensors weights" + (f"; found {', '.join(others[:3])}" if others else ""),
        where=where,
        fix="name a model with model.safetensors (other formats are pickles that may run code: convert them first)",
    )


def base_licence(name: str, commit: str | None) -> str | None:
    """Return the licence that a base model's card names, or None where nothing is known; never fails."""
    if is_offline():
        return None
    try:
        card = open_hub().model_info(name, revision=commit).card_data
    except _UNKNOWN:
        return None
    licence = getattr(card, "license", None)
    if licence == "other":
        licence = getattr(card, "license_name", None) or licence
    return licence if isinstance(licence, str) else None
