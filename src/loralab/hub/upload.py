"""Bringing files up: one commit, tried again where that may help, and verified before it counts.

Owns attempts and waits, the check of what arrived, and the thread in which pushes happen while a run trains.
Files that the repository has already are skipped by the client, so that a push that broke off is taken up again.
"""

import hashlib
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd
from huggingface_hub.hf_api import RepoFile

from loralab.errors import HubError
from loralab.hub.access import NETWORK_ERRORS, explain, may_pass, open_hub, retry_after, status_of
from loralab.hub.quiet import without_bars, without_remark
from loralab.hub.repository import Repository
from loralab.run import file_sha256

ATTEMPTS = 5
# Waits grow fourfold: 1, 4, 16, 60 seconds.
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
# A server that asks for more than this is not waited for.
LONGEST_OBEYED_SECONDS = 300.0
# Where no answer came at all, no further attempt begins after this; one that is under way may end later.
LONGEST_SILENCE_SECONDS = 900.0
# Files from this size on are brought up before the commit, one by one.
_LARGE_BYTES = 1 << 20
# The client wraps what fails in a thread of its own (RuntimeError), and refuses answers that it does not know.
_FAILURES: tuple[type[Exception], ...] = (*NETWORK_ERRORS, RuntimeError, ValueError)


@dataclass(frozen=True, slots=True)
class Push:
    """What one push brings up.

    Attributes:
        files: local file by its name in the repository.
        title: first line of the commit.
        description: the rest of it.
        step: optimizer step of the adapter, or None where it is not known.
        own_folder: folder that is removed when the push is over, or None.
    """

    files: Mapping[str, Path]
    title: str
    description: str = ""
    step: int | None = None
    own_folder: Path | None = None


@dataclass(frozen=True, slots=True)
class Pushed:
    """How a push ended.

    Attributes:
        push: what was to be pushed.
        commit: the commit that holds it, or None where it failed.
        url: page of that commit, or of the pull request.
        seconds: how long it took, waits included.
        attempts: how often it was tried.
        error: why it failed, or None.
    """

    push: Push
    commit: str | None
    url: str | None
    seconds: float
    attempts: int
    error: HubError | None = None


class Abandoned(Exception):
    """A push was given up because a newer one takes its place."""


def push_files(
    repository: Repository,
    push: Push,
    *,
    create_pr: bool = False,
    where: str,
    stop: threading.Event | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Pushed:
    """Bring files up in one commit, and verify that the repository has them.

    Args:
        repository: where to; it exists.
        push: what.
        create_pr: open a pull request instead of a commit on the branch.
        where: the key or argument that named the repository, for messages.
        stop: ends the waits between attempts, and with them the push.
        note: told why another attempt is made.

    Returns:
        How it ended; an error is in it, not raised.

    Raises:
        Abandoned: `stop` was set while it waited.
    """
    started, stop = time.monotonic(), stop or threading.Event()
    hashes = {name: file_sha256(path) for name, path in push.files.items()}
    for attempt in range(1, ATTEMPTS + 1):
        try:
            commit, url = _commit(repository, push, hashes, create_pr=create_pr)
            return Pushed(push, commit, url, time.monotonic() - started, attempt)
        except _FAILURES as error:
            wait = _wait_seconds(error, attempt, time.monotonic() - started)
            if attempt == ATTEMPTS or wait is None:
                failure = explain(error, f"the push to {repository.name!r}", where=where)
                return Pushed(push, None, None, time.monotonic() - started, attempt, failure)
            note(f"push to {repository.name}: attempt {attempt} failed, the next one comes in {wait:.0f} s")
        if stop.wait(wait):
            raise Abandoned
    raise AssertionError("the last attempt returns")


def _wait_seconds(error: BaseException, attempt: int, seconds: float) -> float | None:
    if not may_pass(error) or (seconds > LONGEST_SILENCE_SECONDS and status_of(error) is None):
        return None
    asked = retry_after(error)
    if asked is not None:
        return asked if asked <= LONGEST_OBEYED_SECONDS else None
    return float(min(FIRST_WAIT_SECONDS * 4 ** (attempt - 1), LONGEST_WAIT_SECONDS))


def _commit(repository: Repository, push: Push, hashes: Mapping[str, str], *, create_pr: bool) -> tuple[str, str]:
    api = open_hub()
    additions = [CommitOperationAdd(name, str(path)) for name, path in push.files.items()]
    large = [each for each in additions if push.files[each.path_in_repo].stat().st_size >= _LARGE_BYTES]
    with without_bars(), without_remark():
        # Several at once go through a pool of threads, which keeps a process that was told to stop until they end.
        for each in large:
            api.preupload_lfs_files(
                repository.name, [each], revision=repository.revision, create_pr=create_pr, free_memory=False
            )
        made = api.create_commit(
            repository.name,
            additions,
            commit_message=push.title,
            commit_description=push.description,
            revision=repository.revision,
            create_pr=create_pr,
        )
    found = api.get_paths_info(repository.name, list(push.files), revision=made.pr_revision or made.oid)
    files = {file.path: file for file in found if isinstance(file, RepoFile)}
    wrong = [name for name, path in push.files.items() if not _arrived(files.get(name), path, hashes[name])]
    if wrong:
        raise ConnectionError(f"the repository does not have {wrong[0]} as it was sent")
    return made.oid, str(made.pr_url or made.commit_url)


def _arrived(file: RepoFile | None, path: Path, sha256: str) -> bool:
    if file is None:
        return False
    if file.lfs is not None:
        return bool(file.lfs.sha256 == sha256)
    content = path.read_bytes()
    # What git calls a file: no secret depends on it.
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return bool(file.blob_id == blob.hexdigest())


class BackgroundPushes:
    """One push at a time in a thread of its own; a newer one takes the place of one that still waits.

    Args:
        push: brings one up; gets the event that ends its waits.
    """

    def __init__(self, push: Callable[[Push, threading.Event], Pushed]) -> None:
        self._push = push
        self._lock = threading.Condition()
        self._waiting: Push | None = None
        self._active = False
        self._ended: list[Pushed] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def offer(self, push: Push, *, hurry: bool = False) -> Push | None:
        """Take a push; return the one whose place it took, if any.

        Args:
            push: what to bring up.
            hurry: give up on the one under way as soon as it would wait for another attempt.
        """
        with self._lock:
            replaced, self._waiting = self._waiting, push
            if hurry and self._active:
                self._stop.set()
            if self._thread is None:  # a daemon: a run that fails does not wait for an upload
                self._thread = threading.Thread(target=self._work, name="hub-pushes", daemon=True)
                self._thread.start()
            self._lock.notify_all()
        if replaced is not None:
            _remove(replaced)
        return replaced

    def ended(self) -> list[Pushed]:
        """Return the pushes that ended since the last call."""
        with self._lock:
            ended, self._ended = self._ended, []
        return ended

    def wait(self, seconds: float) -> bool:
        """Wait until nothing is under way; return whether that is so."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._active and self._waiting is None, timeout=seconds)

    def _work(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._waiting is not None)
                push, self._waiting = self._waiting, None
                if push is None:
                    continue
                self._active = True
                self._stop.clear()
            result = self._attempt(push)
            _remove(push)
            with self._lock:
                self._active = False
                if result is not None:
                    self._ended.append(result)
                self._lock.notify_all()

    def _attempt(self, push: Push) -> Pushed | None:
        started = time.monotonic()
        try:
            return self._push(push, self._stop)
        except Abandoned:
            return None
        except Exception as error:  # noqa: BLE001 - a thread that died would leave the run waiting for it
            failure = explain(error, "the push", where="key output.hub.repo")
            return Pushed(push, None, None, time.monotonic() - started, 1, failure)


def _remove(push: Push) -> None:
    if push.own_folder is not None:
        shutil.rmtree(push.own_folder, ignore_errors=True)
