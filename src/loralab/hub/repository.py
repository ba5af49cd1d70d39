"""A repository that something is pushed to: its name, making it, and whose adapter lies there.

Owns what is checked before a push; uploading is `upload.py`'s.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from loralab.config.output_checks import is_repository_name
from loralab.errors import HubError
from loralab.hub.access import NETWORK_ERRORS, Account, explain, open_hub, status_of

_UNUSABLE = re.compile(r"[^A-Za-z0-9_.-]+")
# What a repository holds that is not to be replaced by another run's.
WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
_LINEAGE = "loralab-run: "


@dataclass(frozen=True, slots=True)
class Repository:
    """Where pushes go.

    Attributes:
        name: OWNER/NAME.
        private: whether it is made private where it does not exist.
        revision: branch, or None for the default branch.
    """

    name: str
    private: bool
    revision: str | None = None

    @property
    def url(self) -> str:
        """Its page."""
        return f"{open_hub().endpoint}/{self.name}"


def resolve_name(template: str, values: Mapping[str, str], *, where: str) -> str:
    """Return the name of a repository with its placeholders filled in.

    Args:
        template: such as `{user}/price-{timestamp}`; without an owner it is the user's.
        values: of `user`, `run` and `timestamp`.
        where: the key that gave the template, for messages.

    Raises:
        HubError: the Hub takes no such name.
    """
    text = template if "/" in template else f"{{user}}/{template}"
    for key, value in values.items():
        text = text.replace(f"{{{key}}}", _UNUSABLE.sub("-", value).strip("-.") or "run")
    if not is_repository_name(text):
        raise HubError(
            f"no name of a repository: {text!r}",
            where=where,
            fix="use letters, digits, -, _ and . in OWNER/NAME, at most 96 characters, without -- and ..",
        )
    return text


def open_repository(repository: Repository, account: Account, *, where: str) -> None:
    """Make the repository where it does not exist, and check that the token may write to it.

    Raises:
        HubError: the token may not, or the Hub cannot be reached.
    """
    if not account.writes:
        raise HubError(
            f"the token of {account.user!r} can only read: nothing can be pushed to {repository.name!r}",
            where=where,
            fix="make a token with write access on the Hub's settings page, then `hf auth login` or HF_TOKEN",
        )
    api = open_hub()
    try:
        api.create_repo(repository.name, private=repository.private, exist_ok=True)
        api.auth_check(repository.name, write=True)
        if repository.revision is not None:
            api.create_branch(repository.name, branch=repository.revision, exist_ok=True)
    except NETWORK_ERRORS as error:
        if status_of(error) == 403:
            raise HubError(
                f"the token of {account.user!r} may not write to {repository.name!r} (HTTP 403)",
                where=where,
                fix="name a repository of your own, such as {user}/NAME, or take a token with rights there",
            ) from error
        raise explain(error, f"the repository {repository.name!r}", where=where) from error


def lineage(run_id: str) -> str:
    """Return the line by which the commits of a run are known."""
    return f"{_LINEAGE}{run_id}"


def check_lineage(repository: Repository, run_id: str, weights: Mapping[str, str], *, where: str, fix: str) -> None:
    """Check that a push replaces nothing of another run.

    Args:
        repository: where the push goes.
        run_id: of the run, or of the folder that is pushed.
        weights: SHA-256 of the files of weights that are pushed, by name; the same ones may be pushed again.
        where: the key or argument that named the repository, for messages.
        fix: what to do where it holds another's.

    Raises:
        HubError: it holds weights that this run did not push.
    """
    api, name, revision = open_hub(), repository.name, repository.revision
    try:
        found = api.get_paths_info(name, list(WEIGHTS), revision=revision)
        theirs = {file.path: file.lfs.sha256 for file in found if isinstance(file, RepoFile) and file.lfs is not None}
        if not found or (theirs and all(weights.get(path) == sha256 for path, sha256 in theirs.items())):
            return
        commits = api.list_repo_commits(name, revision=revision)
    except (EntryNotFoundError, RevisionNotFoundError):
        return
    except NETWORK_ERRORS as error:
        if isinstance(error, HfHubHTTPError) and status_of(error) == 404:
            return
        raise explain(error, f"the repository {name!r}", where=where) from error
    if not any(lineage(run_id) in f"{commit.title}\n{commit.message}" for commit in commits):
        raise HubError(f"{name!r} holds the weights of another run, which would be replaced", where=where, fix=fix)
