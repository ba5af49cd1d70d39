"""Repositories of the Hub on the loopback, in memory: commits, branches, and how their files are called."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LARGE = re.compile(r".*\.(safetensors|parquet|bin)|tokenizer\.json")


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    sha: str
    title: str
    message: str
    files: dict[str, bytes]
    parent: str | None


@dataclass
class Repo:
    """A repository: its commits, newest last, and where its branches are."""

    name: str
    kind: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, title: str, files: Mapping[str, bytes], *, branch: str = "main", message: str = "") -> Commit:
        """Add a commit on top of a branch; `files` come to those that are there."""
        parent = self.branches.get(branch)
        content = {**(self.commits[parent].files if parent else {}), **files}
        sha = hashlib.sha1(f"{self.name}{len(self.commits)}{title}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, title, message, content, parent)
        self.branches[branch] = sha
        return self.commits[sha]

    def find(self, revision: str) -> Commit | None:
        """Return the commit of a branch or hash."""
        return self.commits.get(self.branches.get(revision, revision))

    @property
    def head(self) -> Commit:
        """The newest commit of the default branch."""
        return self.commits[self.branches["main"]]

    def history(self, revision: str) -> list[Commit]:
        """Return the commits of a branch, newest first."""
        found, commit = [], self.find(revision)
        while commit is not None:
            found.append(commit)
            commit = self.commits.get(commit.parent) if commit.parent else None
        return found


def git_oid(path: str, content: bytes) -> str:
    """What git calls a file, a large one by its pointer."""
    if LARGE.fullmatch(path):  # git knows the pointer, whose hash depends on the content alone
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
        content = pointer.format(hashlib.sha256(content).hexdigest(), len(content)).encode()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def etag(path: str, content: bytes) -> str:
    """What `resolve` answers as ETag."""
    return hashlib.sha256(content).hexdigest() if LARGE.fullmatch(path) else git_oid(path, content)


def entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as `tree` and `paths-info` list it."""
    facts: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_oid(path, content)}
    if LARGE.fullmatch(path):
        facts["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return facts


def card_data(readme: bytes) -> dict[str, str]:
    """The front matter of a card, as far as it is plain lines."""
    found = re.match(rb"---\n(.*?)---\n", readme, re.DOTALL)
    lines = found[1].decode().splitlines() if found else []
    return {key: value for key, _, value in (line.partition(": ") for line in lines) if value}
