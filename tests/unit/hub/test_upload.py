"""Pushes through the real client against a real server: what arrives, and what each fault does."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import get_session

from loralab.errors import HubError
from loralab.hub import access, upload
from loralab.hub.access import identify
from loralab.hub.repository import Repository, open_repository
from loralab.hub.upload import Abandoned, BackgroundPushes, Push, Pushed, push_files
from support.hub_client import talking_to
from support.hub_server import USER, WRITER, HubServer

WHERE = "key output.hub.repo"
REPO = Repository(f"{USER}/price", private=True)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(upload, "FIRST_WAIT_SECONDS", 0.01)
    with HubServer() as server, talking_to(server, tmp_path / "home"):
        open_repository(REPO, identify(where=WHERE), where=WHERE)
        yield server


@pytest.fixture
def push(tmp_path: Path) -> Push:
    weights, card = tmp_path / "adapter_model.safetensors", tmp_path / "README.md"
    weights.write_bytes(bytes(range(256)) * 40)
    card.write_text("---\ntags: [lora]\n---\n\n# Card\n", encoding="utf-8")
    return Push({path.name: path for path in (weights, card)}, "loralab: step 5, adapter abc", "loralab-run: 1", step=5)


def content(push: Push) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in push.files.items()}


def arrived(hub: HubServer) -> dict[str, bytes]:
    return {name: data for name, data in hub.model(REPO.name).head.files.items() if name != ".gitattributes"}


@pytest.mark.parametrize("part_bytes", [None, 4000])
def test_files_arrive(hub: HubServer, push: Push, part_bytes: int | None) -> None:
    hub.part_bytes = part_bytes
    pushed = push_files(REPO, push, where=WHERE)
    head = hub.model(REPO.name).head
    assert pushed.error is None
    assert (pushed.commit, pushed.attempts) == (head.sha, 1)
    assert arrived(hub) == content(push)
    assert (head.title, head.message) == (push.title, push.description)
    assert hub.model(REPO.name).private


def test_what_is_there_is_not_sent_again(hub: HubServer, push: Push) -> None:
    first = push_files(REPO, push, where=WHERE)
    asked = len(hub.requests)
    again = push_files(REPO, push, where=WHERE)
    assert again.commit == first.commit
    assert not any("/lfs/" in request and request.startswith("PUT") for request in hub.requests[asked:])
    assert not any("/commit/" in request for request in hub.requests[asked:])


@pytest.mark.parametrize(
    ("request_", "fault"),
    [
        ("POST .*/commit/", {"status": 500}),
        ("POST .*/commit/", {"status": 503, "times": 2}),
        ("POST .*/commit/", {"status": 429, "headers": {"Retry-After": "0"}}),
        ("POST .*/commit/", {"status": 0}),
        ("PUT /lfs/", {"status": 0}),
        ("POST /api/validate-yaml", {"status": 500}),
    ],
)
def test_passing_faults_are_tried_again(hub: HubServer, push: Push, request_: str, fault: dict[str, object]) -> None:
    armed = hub.arm(request_, **fault)
    pushed = push_files(REPO, push, where=WHERE)
    assert pushed.error is None, pushed.error
    assert armed.times == 0
    assert arrived(hub) == content(push)


@pytest.mark.parametrize(
    ("status", "said", "attempts"),
    [
        (401, "HTTP 401", 1),
        (403, "no right", 1),
        (404, "not there", 1),
        (500, "the Hub has a problem", upload.ATTEMPTS),
    ],
)
def test_lasting_faults_end_in_three_lines(hub: HubServer, push: Push, status: int, said: str, attempts: int) -> None:
    hub.arm("POST .*/commit/", status=status, times=99)
    pushed = push_files(REPO, push, where=WHERE)
    assert pushed.error is not None
    assert (pushed.commit, pushed.attempts) == (None, attempts)
    problem = pushed.error.problems[0]
    assert said in problem.what
    assert REPO.name in problem.what
    assert problem.fix
    assert not arrived(hub)


def test_too_long_a_wait_is_not_obeyed(hub: HubServer, push: Push) -> None:
    hub.arm("POST .*/commit/", status=429, headers={"Retry-After": "9999"})
    pushed = push_files(REPO, push, where=WHERE)
    assert pushed.error is not None
    assert pushed.attempts == 1
    assert "too many requests" in pushed.error.problems[0].what


def test_retry_after_is_obeyed(hub: HubServer, push: Push) -> None:
    hub.arm("POST .*/commit/", status=429, headers={"Retry-After": "7"})
    notes: list[str] = []
    stop = threading.Event()
    stop.set()
    with pytest.raises(Abandoned):
        push_files(REPO, push, where=WHERE, stop=stop, note=notes.append)
    assert "comes in 7 s" in notes[0]


def test_what_arrives_changed_is_no_success(hub: HubServer, push: Push) -> None:
    def damage() -> None:
        repo = hub.model(REPO.name)
        repo.commits[repo.head.sha].files["adapter_model.safetensors"] = b"other"

    hub.arm("POST .*/paths-info/", times=99, then=damage)
    pushed = push_files(REPO, push, where=WHERE)
    assert pushed.error is not None
    assert "as it was sent" in pushed.error.problems[0].what


def test_a_pull_request_leaves_the_branch(hub: HubServer, push: Push) -> None:
    before = hub.model(REPO.name).head.sha
    pushed = push_files(REPO, push, create_pr=True, where=WHERE)
    assert pushed.error is None
    assert pushed.url == f"{hub.url}/{REPO.name}/discussions/1"
    assert hub.model(REPO.name).head.sha == before


def test_newer_pushes_replace_waiting_ones(tmp_path: Path) -> None:
    going, release, seen = threading.Event(), threading.Event(), []

    def slow(push: Push, _: threading.Event) -> Pushed:
        going.set()
        release.wait(10)
        seen.append(push.step)
        return Pushed(push, "c", "u", 0.0, 1)

    background = BackgroundPushes(slow)
    pushes = []
    for step in range(3):
        folder = tmp_path / str(step)
        folder.mkdir()
        pushes.append(Push({}, "t", step=step, own_folder=folder))
    assert background.offer(pushes[0]) is None
    assert going.wait(10)
    assert background.offer(pushes[1]) is None
    assert background.offer(pushes[2]) is pushes[1]
    assert not (tmp_path / "1").exists()
    assert not background.wait(0.01)
    release.set()
    assert background.wait(10)
    assert seen == [0, 2]
    assert [each.push.step for each in background.ended()] == [0, 2]
    assert not background.ended()
    assert not list(tmp_path.iterdir())


def test_a_push_that_waits_is_given_up_for_the_last_one() -> None:
    def waits(push: Push, stop: threading.Event) -> Pushed:
        if push.step == 0 and stop.wait(10):
            raise Abandoned
        return Pushed(push, "c", "u", 0.0, 1)

    background = BackgroundPushes(waits)
    background.offer(Push({}, "t", step=0))
    while background.wait(0):  # until it has begun
        pass
    background.offer(Push({}, "t", step=1), hurry=True)
    assert background.wait(5)
    assert [each.push.step for each in background.ended()] == [1]


def test_large_files_go_up_one_by_one(hub: HubServer, push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "_LARGE_BYTES", 1)
    assert push_files(REPO, push, where=WHERE).error is None
    assert arrived(hub) == content(push)
    assert [each.partition("/")[0] for each in hub.requests if "PUT" in each] == ["PUT "]


def test_a_silent_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "SILENCE_SECONDS", 0.2)
    with HubServer() as hub, talking_to(hub, tmp_path / "home"):
        hub.arm("GET /api/whoami-v2", seconds=60)
        with pytest.raises(HubError) as caught:
            identify(where=WHERE)
    assert "the connection to" in caught.value.problems[0].what


def test_limits_of_somebody_else_are_kept(tmp_path: Path) -> None:
    with HubServer() as hub, talking_to(hub, tmp_path / "home"):
        get_session().timeout = 7.0
        access.open_hub()
        assert get_session().timeout.read == 7.0


def test_a_hub_that_stays_silent_ends_the_attempts(push: Push, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "LONGEST_SILENCE_SECONDS", -1.0)
    with HubServer() as hub, talking_to(hub, next(iter(push.files.values())).parent / "home"):
        hub.add("models", REPO.name, {"README.md": b""})
        hub.arm("POST .*/commit/", status=0, times=9)
        pushed = push_files(REPO, push, where=WHERE)
    assert (pushed.commit, pushed.attempts) == (None, 1)


def test_no_token_is_in_an_error(hub: HubServer) -> None:
    for error in (OSError(f"refused for {WRITER}"), RuntimeError(f"Bearer {WRITER}")):
        assert WRITER not in str(access.explain(error, "the push", where=WHERE))
