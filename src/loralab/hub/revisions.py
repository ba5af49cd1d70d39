"""Which commit of a model or data set a run uses: found once, then named.

Owns the look-up of a revision and the fetching of a base model's files, so that what fails there is said in
three lines before anything is loaded. Does not own which names are Hub ids: the callers know; nor what the cache has
(`cache.py`).
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, RevisionResolutionError

from loralab.errors import HubError
from loralab.hub.access import NETWORK_ERRORS, explain, is_offline, open_hub, status_of
from loralab.hub.cache import INDEX, Kind, is_commit, is_fetched, is_whole, shards, small_files
from loralab.hub.quiet import without_bars

_NOT_ASKED = "all its files are in the cache, and the Hub is not asked for them"
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
    if is_commit(revision):
        whole = kind == "model" and is_whole(name, revision)
        return Pin(name, revision, revision, "a commit was named" + (f"; {_NOT_ASKED}" if whole else ""))
    if is_offline():
        cached = _cached_commit(kind, name, revision)
        why = f"what {revision or 'the default branch'} was when last asked" if cached else "not looked up"
        why += "; HF_HUB_OFFLINE is set"
        return Pin(name, revision, cached, why)
    api, what = open_hub(), f"{_WORDS[kind]} {name!r}" + (f", revision {revision!r}" if revision else "")
    try:
        info = api.repo_info(name, revision=revision, repo_type=kind)
        if getattr(info, "gated", False):  # its facts are public, its files are not
            api.auth_check(name, repo_type=kind)
    except NETWORK_ERRORS as error:
        cached = _cached_commit(kind, name, revision) if status_of(error) is None else None
        instead = f"or set HF_HUB_OFFLINE=1 to take what it was when last asked, commit {cached}" if cached else None
        raise explain(error, what, where=where, instead=instead) from error
    except ValueError as error:
        raise HubError(f"{what}: no valid Hub id", where=where, fix="name it as OWNER/NAME") from error
    with contextlib.suppress(*NETWORK_ERRORS, RevisionResolutionError):
        api.resolve_revision(name, repo_type=kind, revision=revision)  # kept in the cache, for runs without a network
    return Pin(name, revision, info.sha, f"what {revision or 'the default branch'} was at the start")


def _cached_commit(kind: Kind, name: str, revision: str | None) -> str | None:
    """Return the commit that a branch was when the Hub was asked last, or None where nobody asked on this machine."""
    try:
        return HfApi().resolve_revision(name, repo_type=kind, revision=revision, local_files_only=True).resolved
    except (RevisionResolutionError, ValueError):
        return None


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
    if is_offline() or is_whole(name, commit):
        return  # loading takes what the cache has, and says what it lacks
    try:
        files = [file.rfilename for file in open_hub().model_info(name, revision=commit).siblings or []]
        wanted = small_files(files)
        wanted += _weights(name, commit, files, where=where)
        # This alone keeps the list of files, by which the cache is known to be whole from now on.
        with without_bars():
            snapshot_download(name, revision=commit, allow_patterns=[constants.CONFIG_NAME])
        for done, file in enumerate(wanted):
            hf_hub_download(name, file, revision=commit)
            progress(done + 1, len(wanted))
    except NETWORK_ERRORS as error:
        cause = (error.__cause__ or error) if isinstance(error, LocalEntryNotFoundError) else error
        instead = "or set HF_HUB_OFFLINE=1 to use what the cache has of it" if is_fetched(name, commit) else None
        raise explain(cause, f"the model {name!r}", where=where, instead=instead) from error


def _weights(name: str, commit: str, files: list[str], *, where: str) -> list[str]:
    if constants.SAFETENSORS_SINGLE_FILE in files:
        return [constants.SAFETENSORS_SINGLE_FILE]
    if INDEX in files:
        return shards(Path(hf_hub_download(name, INDEX, revision=commit)))
    others = sorted(file for file in files if PurePosixPath(file).suffix in {".bin", ".pt", ".pth", ".gguf", ".ckpt"})
    raise HubError(
        f"the model {name!r} has no safetensors weights" + (f"; found {', '.join(others[:3])}" if others else ""),
        where=where,
        fix="name a model with model.safetensors (other formats are pickles that may run code: convert them first)",
    )
