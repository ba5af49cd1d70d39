"""The voting page's server: who is answered, what, and how it ends. All through real sockets."""

import errno
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loralab.errors import JudgingError, RunFolderError, StorageError
from loralab.judging.desk import VotingHandler
from loralab.judging.server import serve_sitting
from loralab.judging.sitting import Sitting
from loralab.judging.votes import read_votes
from support.voting import ITEMS, Reply, Served, make_pairs, open_sitting, reveal, served, swapped

PNG = b"\x89PNG\r\n\x1a\n" + b"pixels"
OWN_ROUTES = [("GET", ""), ("GET", "state"), ("GET", "pictures/0"), ("POST", "votes"), ("POST", "close")]


@pytest.fixture
def sitting(tmp_path: Path) -> Iterator[Sitting]:
    with open_sitting(tmp_path / "anna.jsonl", make_pairs(4)) as opened:
        yield opened


@pytest.fixture
def server(sitting: Sitting) -> Iterator[Served]:
    with served(sitting) as running:
        yield running


def check_headers(reply: Reply) -> None:
    """Check what every answer carries."""
    assert reply.headers["cache-control"] == "no-store"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"
    assert reply.headers["x-frame-options"] == "DENY"
    assert reply.headers["connection"] == "close"
    assert reply.headers["content-security-policy"].startswith("default-src 'none'; ")
    assert "frame-ancestors 'none'" in reply.headers["content-security-policy"]
    assert reply.headers["server"] == "loralab"
    assert int(reply.headers["content-length"]) == len(reply.body)


def refused(reply: Reply, status: int) -> None:
    check_headers(reply)
    assert reply.status == status
    assert reply.headers["content-type"] == "text/plain; charset=utf-8"
    assert b"Traceback" not in reply.body
    assert 0 < len(reply.body) < 400


# --- what is answered ---------------------------------------------------------------------------------------------


def test_the_page_and_its_state_are_served(server: Served, sitting: Sitting) -> None:
    page = server.ask("GET")
    check_headers(page)
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert b"Which answer is better?" in page.body
    for pair in sitting.pairs:
        assert pair.left.encode() in page.body
    state = server.ask("GET", "state")
    check_headers(state)
    assert (state.status, state.headers["content-type"]) == (200, "application/json")
    assert state.json() == {"answers": {}, "closed": False}


def test_a_vote_is_on_disk_before_it_is_answered(server: Served, tmp_path: Path) -> None:
    first, second = (pair.item for pair in make_pairs(2))
    reply = server.vote(first, "left", 2.5)
    check_headers(reply)
    assert (reply.status, reply.json()) == (200, {"answers": {first: "left"}, "closed": False})
    votes = read_votes(tmp_path / "anna.jsonl")
    assert votes is not None
    assert [(act.item, act.choice, act.seconds) for act in votes.acts] == [(first, "left", 2.5)]
    server.vote(second, "both_bad", None)
    server.vote(first, "tie")
    assert server.vote(second, None).json()["answers"] == {first: "tie"}
    votes = read_votes(tmp_path / "anna.jsonl")
    assert votes is not None
    assert votes.choices == {first: "tie"}
    assert len(votes.acts) == 4
    assert f'"{first}":"tie"'.encode() in server.ask("GET").body  # a page that is loaded again


def test_votes_of_several_tabs_are_taken_one_by_one(tmp_path: Path) -> None:
    pairs = make_pairs(40)
    with open_sitting(tmp_path / "votes.jsonl", pairs) as sitting, served(sitting) as server:
        halves = (pairs[::2], pairs[1::2])

        def vote(half: int) -> None:
            for pair in halves[half]:
                assert server.vote(pair.item, "left").status == 200

        tabs = [threading.Thread(target=vote, args=(half,)) for half in (0, 1)]
        for tab in tabs:
            tab.start()
        for tab in tabs:
            tab.join()
        assert dict(sitting.answers) == {pair.item: "left" for pair in pairs}
    votes = read_votes(tmp_path / "votes.jsonl")
    assert votes is not None
    assert len(votes.acts) == 40


def test_only_the_sittings_own_pictures_are_served(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one.png", "two.png", "gone.png", "words.png")]
    paths[0].write_bytes(PNG)
    paths[1].write_bytes(b"\xff\xd8\xff" + b"x")
    paths[3].write_text("no picture, and nobody's to read")
    (tmp_path / "secret").write_text("secret")
    first, second = make_pairs(2)
    pairs = (replace(first, pictures=(paths[1], paths[0])), replace(second, pictures=tuple(paths)))
    with open_sitting(tmp_path / "votes.jsonl", pairs) as sitting, served(sitting) as server:
        for number, kind, path in ((0, "image/jpeg", paths[1]), (1, "image/png", paths[0])):
            reply = server.ask("GET", f"pictures/{number}")
            check_headers(reply)
            assert (reply.status, reply.headers["content-type"]) == (200, kind)
            assert reply.body == path.read_bytes()
        names = ["2", "3", "4", "99999", "-1", "0/", "../secret", "%2e%2e/secret", "one.png", "0x1", "", "1e0", "٣"]
        for name in names:
            refused(server.ask("GET", f"pictures/{name}"), 404)


# --- who is answered ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "route"), OWN_ROUTES)
def test_nothing_is_answered_without_the_token(server: Served, sitting: Sitting, method: str, route: str) -> None:
    token = server.path.strip("/")
    assert len(token) >= 32
    for other in (
        "",
        "x" * len(token),
        token[:-1],
        f"{token}x",
        token.swapcase(),
        f"%{ord(token[0]):x}{token[1:]}",
        "\x7f",
    ):
        refused(server.ask(method, f"/{other}/{route}", b"{}"), 403)
    refused(server.ask(method, f"/{route}", b"{}"), 403)
    refused(server.ask(method, f"http://127.0.0.1:{server.port}/{token}/{route}".replace("http", "/http"), b"{}"), 403)
    refused(server.ask(method, f"/?{token}", b"{}"), 403)
    assert (dict(sitting.answers), sitting.closed) == ({}, False)


def test_tokens_are_new_for_every_server(tmp_path: Path) -> None:
    tokens = set()
    for number in range(3):
        path = tmp_path / f"{number}.jsonl"
        with open_sitting(path, make_pairs(1)) as sitting, served(sitting) as server:
            tokens.add(server.path)
    assert len(tokens) == 3


@pytest.mark.parametrize(("method", "route"), OWN_ROUTES)
def test_other_hosts_names_are_refused(server: Served, sitting: Sitting, method: str, route: str) -> None:
    others = (
        None, "", "evil.example", f"evil.example:{server.port}", "127.0.0.1", "localhost",
        f"127.0.0.1:{server.port + 1}",
        f"localhost:{server.port}.evil.example", f"127.0.0.1:{server.port}, evil.example", f"[::1]:{server.port}",
        f"127.0.0.2:{server.port}", f"127.0.0.1:{server.port}\r\nHost: evil.example",
    )  # fmt: skip
    for host in others:
        reply = server.ask(method, route, b"{}", Host=host)
        refused(reply, 403)
        assert f"127.0.0.1:{server.port} or localhost:{server.port}" in reply.body.decode()
    assert (dict(sitting.answers), sitting.closed) == ({}, False)


def test_both_of_its_own_names_are_answered(server: Served) -> None:
    item = make_pairs(1)[0].item
    for name in ("127.0.0.1", "localhost"):
        host = f"{name}:{server.port}"
        assert server.ask("GET", Host=host).status == 200
        assert server.vote(item, "left", Host=host, Origin=f"http://{host}").status == 200
        other = "localhost" if name == "127.0.0.1" else "127.0.0.1"
        refused(server.vote(item, "left", Host=host, Origin=f"http://{other}:{server.port}"), 403)


@pytest.mark.parametrize("origin", ["null", "", "http://evil.example", "http://127.0.0.1", "https://127.0.0.1:{port}"])
def test_pages_of_others_cannot_vote(server: Served, sitting: Sitting, origin: str) -> None:
    item = make_pairs(1)[0].item
    refused(server.vote(item, "left", Origin=origin.format(port=server.port)), 403)
    refused(server.ask("POST", "close", b"{}", Origin=origin.format(port=server.port)), 403)
    assert (dict(sitting.answers), sitting.closed) == ({}, False)


@pytest.mark.parametrize(
    "kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json"]
)
def test_votes_are_json_by_their_header(server: Served, sitting: Sitting, kind: str | None) -> None:
    refused(server.vote(make_pairs(1)[0].item, "left", Content_Type=kind), 415)
    assert not sitting.answers
    assert server.vote(make_pairs(1)[0].item, "left", Content_Type="application/json; charset=utf-8").status == 200


def test_it_listens_on_one_address_alone(server: Served) -> None:
    with pytest.raises(OSError, match=r"refused|not available|assign|timed out|unreachable"):
        socket.create_connection(("127.0.0.2", server.port), timeout=2)


# --- requests that are none ---------------------------------------------------------------------------------------


def test_unknown_paths_are_not_found(server: Served) -> None:
    for path in (
        "nothing",
        "votes/",
        "state/",
        "index.html",
        "..",
        "../",
        "%2e%2e/",
        "pictures",
        "page.html.jinja",
    ):
        refused(server.ask("GET", path), 404)
        refused(server.ask("POST", path, b"{}"), 404)
    assert server.ask("GET", "?utm=x").status == 200


def test_other_methods_are_not_allowed(server: Served) -> None:
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW"):
        for path in ("", "votes", "nothing"):
            reply = server.ask(method, path)
            refused(reply, 405)
            assert reply.headers["allow"] == "GET, POST"
    head = server.ask("HEAD")
    assert (head.status, head.body) == (405, b"")
    for method, path, allowed in (
        ("POST", "", "GET"),
        ("POST", "state", "GET"),
        ("GET", "votes", "POST"),
        ("GET", "close", "POST"),
    ):
        reply = server.ask(method, path, b"{}")
        refused(reply, 405)
        assert reply.headers["allow"] == allowed


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b'"left"', b"\xff\xfe", b"{}", b"[" * 4000, b'{"a":' * 800,
        b'{"item": "0000000000000001", "choice": "left"}',
        b'{"item": "0000000000000001", "choice": "left", "seconds": 1, "more": 1}',
        b'{"item": 1, "choice": "left", "seconds": 1}',
        b'{"item": "0000000000000001", "choice": "LEFT", "seconds": 1}',
        b'{"item": "0000000000000001", "choice": ["left"], "seconds": 1}',
        b'{"item": "0000000000000001", "choice": "left", "seconds": -1}',
        b'{"item": "0000000000000001", "choice": "left", "seconds": "1"}',
        b'{"item": "0000000000000001", "choice": "left", "seconds": true}',
        b'{"item": "0000000000000001", "choice": "left", "seconds": NaN}',
        b'{"item": "0000000000000001", "choice": "left", "seconds": Infinity}',
    ],
    ids=lambda body: repr(body[-36:]),
)  # fmt: skip
def test_what_is_no_vote_is_refused(server: Served, sitting: Sitting, body: bytes) -> None:
    refused(server.ask("POST", "votes", body), 400)
    assert not sitting.answers


def test_votes_that_the_sitting_refuses_say_why(server: Served, sitting: Sitting) -> None:
    reply = server.vote("f" * 16, "left")
    refused(reply, 409)
    assert "No such item: 'ffffffffffffffff'" in reply.body.decode()
    refused(server.vote("\ud800", "left"), 409)
    refused(server.vote("0" * 15 + "1", "left", 10.0**300), 409)
    refused(server.ask("POST", "close", b'{"now": true}'), 400)
    assert (dict(sitting.answers), sitting.closed) == ({}, False)


def test_bodies_are_bounded(server: Served, sitting: Sitting) -> None:
    padding = b" " * 3900
    body = json.dumps({"item": "0" * 15 + "1", "choice": "left", "seconds": 1}).encode() + padding
    assert server.ask("POST", "votes", body).status == 200
    refused(server.ask("POST", "votes", body + padding), 413)
    refused(server.ask("POST", "votes", b"", Content_Length=None), 411)
    refused(
        server.ask("POST", "votes", b"4\r\nnull\r\n0\r\n\r\n", Content_Length=None, Transfer_Encoding="chunked"), 411
    )
    for length in ("-1", "x", "1e3", "", "+2"):
        refused(server.ask("POST", "votes", b"{}", Content_Length=length), 411)
    assert len(sitting.answers) == 1


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 505),
        (b"GET /" + b"x" * (65537 - 5), 414),  # just too long: what a server leaves unread resets the connection
        (b"GET / HTTP/1.1\r\n" + b"".join(b"H%d: x\r\n" % n for n in range(200)) + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: " + b"x" * (65537 - 6), 431),
        (b"\x00\xff\xfe /\xff HTTP/1.1\r\n\r\n", 405),
        (b"GET * HTTP/1.1\r\n\r\n", 403),
    ],
)
def test_what_is_no_request_is_refused_in_plain_words(server: Served, request_bytes: bytes, status: int) -> None:
    reply = server.send(request_bytes)
    assert reply.status == status
    assert reply.headers["content-type"] == "text/plain; charset=utf-8"
    assert b"Python" not in reply.body
    assert b"Traceback" not in reply.body


def test_a_slow_client_holds_up_nobody_and_is_let_go(sitting: Sitting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VotingHandler, "timeout", 0.3)
    with served(sitting) as server:
        slow = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        slow.sendall(b"GET / HT")
        slower = socket.create_connection(("127.0.0.1", server.port), timeout=10)
        slower.sendall(f"POST {server.path}votes HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n".encode())
        slower.sendall(b"Content-Type: application/json\r\nContent-Length: 70\r\n\r\n{")
        assert server.ask("GET").status == 200
        for connection in (slow, slower):
            assert connection.recv(100) == b""
            connection.close()


def test_nothing_is_printed_and_no_token_logged(
    sitting: Sitting, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="loralab.judging")
    with served(sitting) as server:
        server.ask("GET")
        server.ask("GET", "nothing")
        server.ask("POST", "votes", b"{")
        server.vote("f" * 16, "left")
        server.send(b"nonsense\r\n\r\n")
        with socket.create_connection(("127.0.0.1", server.port)) as gone:
            gone.sendall(f"GET {server.path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
        token = server.path.strip("/")
    assert capfd.readouterr() == ("", "")
    assert "GET /(token)/ HTTP/1.1" in caplog.text
    assert token not in caplog.text


# --- what cannot be written, what fails ---------------------------------------------------------------------------


def test_a_vote_that_cannot_be_written_is_told(
    sitting: Sitting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Sitting, item: str, choice: str, *, seconds: float | None) -> None:
        raise StorageError("the vote could not be written: no space left", where="votes", fix="make room")

    with served(sitting) as server:
        with monkeypatch.context() as patch:
            patch.setattr(Sitting, "record", full)
            reply = server.vote(sitting.pairs[0].item, "left")
        refused(reply, 507)
        assert reply.body.decode() == "The vote could not be written: no space left. To mend it: make room."
        assert "no space left" in caplog.text
        assert server.vote(sitting.pairs[0].item, "left").status == 200


def test_a_bug_is_logged_and_not_sent(
    sitting: Sitting, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    def broken(self: Sitting, item: str, choice: str, *, seconds: float | None) -> None:
        raise ZeroDivisionError("a secret of the program")

    with served(sitting) as server:
        with monkeypatch.context() as patch:
            patch.setattr(Sitting, "record", broken)
            body = json.dumps({"item": sitting.pairs[0].item, "choice": "left", "seconds": 1}).encode()
            head = (
                f"POST {server.path}votes HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json"
            )
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
                connection.sendall(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
                assert connection.recv(1000) == b""
        assert "ZeroDivisionError: a secret of the program" in caplog.text
        assert server.vote(sitting.pairs[0].item, "left").status == 200
    assert capfd.readouterr() == ("", "")


# --- the end ------------------------------------------------------------------------------------------------------


def test_finishing_shows_the_names_and_ends_the_server(sitting: Sitting, tmp_path: Path) -> None:
    with served(sitting) as server:
        items = [pair.item for pair in sitting.pairs]
        for item, choice in zip(items, ("left", "tie", "both_bad"), strict=False):
            server.vote(item, choice)
        before = server.ask("GET", "state").body + server.ask("GET").body
        assert b"the adapter" not in before
        reply = server.finish()
        check_headers(reply)
        state = reply.json()
        assert state["closed"] is True
        assert state["answers"] == dict(zip(items, ("left", "tie", "both_bad"), strict=False))
        assert state["result"]["names"] == ["the base model", "the adapter"]
        assert (state["result"]["wins"], state["result"]["not_judged"]) == ([0, 1], 1)
        assert not server.thread.is_alive()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port), timeout=2)
    votes = read_votes(tmp_path / "anna.jsonl")
    assert votes is not None
    assert votes.closed


def test_the_result_is_made_once_the_sitting_is_closed(sitting: Sitting) -> None:
    closed: list[bool] = []

    def result() -> Any:
        closed.append(sitting.closed)
        return reveal(sitting)

    with served(sitting, result=result) as server:
        assert not closed
        server.finish()
    assert closed == [True]


def test_a_result_that_fails_leaves_the_sitting_closed(sitting: Sitting, caplog: pytest.LogCaptureFixture) -> None:
    def result() -> Any:
        raise RunFolderError("cannot be read", where="run.json", fix="restore it")

    with served(sitting, result=result) as server:
        assert server.finish().json()["result"] is None
    assert sitting.closed
    assert "cannot be read" in caplog.text


def test_a_rater_who_is_gone_ends_the_server_too(sitting: Sitting) -> None:
    with served(sitting) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = (
                f"POST {server.path}close HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json"
            )
            connection.sendall(f"{head}\r\nContent-Length: 2\r\n\r\n{{}}".encode())
        server.thread.join(10)
        assert not server.thread.is_alive()
    assert sitting.closed


def test_a_closed_sitting_is_not_served(sitting: Sitting) -> None:
    sitting.close()
    with pytest.raises(JudgingError, match=r"the sitting of 'anna' is closed"):
        serve_sitting(sitting, title="", port=None, on_ready=pytest.fail, result=lambda: reveal(sitting))


def test_a_port_in_use_is_named_in_three_lines(sitting: Sitting) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(JudgingError) as caught:
            serve_sitting(sitting, title="", port=port, on_ready=pytest.fail, result=lambda: reveal(sitting))
    assert str(caught.value) == (
        f"error: the page cannot be served on port {port}: {os.strerror(errno.EADDRINUSE)}\n"
        f"where: 127.0.0.1:{port}\n"
        "fix:   give another port with --port, or leave it away to get a free one"
    )
    with pytest.raises(JudgingError, match="port 70000"):
        serve_sitting(sitting, title="", port=70000, on_ready=pytest.fail, result=lambda: reveal(sitting))
    with served(sitting, port=port) as server:  # and it can be had again at once
        assert server.port == port


def test_an_error_of_the_caller_ends_the_server(sitting: Sitting) -> None:
    addresses: list[str] = []

    def on_ready(address: str) -> None:
        addresses.append(address)
        raise ValueError("no browser")

    with pytest.raises(ValueError, match="no browser"):
        serve_sitting(sitting, title="", port=None, on_ready=on_ready, result=lambda: reveal(sitting))
    port = int(re.findall(r":(\d+)/", addresses[0])[0])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=2)


PROGRAM = """
import sys
from pathlib import Path
from loralab.judging.server import serve_sitting
from support.voting import make_pairs, open_sitting, reveal
with open_sitting(Path(sys.argv[1]), make_pairs(3)) as sitting:
    show = lambda address: print(address, flush=True)
    serve_sitting(sitting, title="A test", port=None, on_ready=show, result=lambda: reveal(sitting))
    print("ended", sitting.closed, flush=True)
"""


def test_ctrl_c_ends_it_and_keeps_the_votes(tmp_path: Path) -> None:
    path = tmp_path / "votes.jsonl"
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{root / 'src'}:{root / 'tests'}"},
    )
    try:
        assert process.stdout is not None
        server = Served(process.stdout.readline().strip(), threading.current_thread())
        assert server.vote("0" * 15 + "2", "right").status == 200
        idle = socket.create_connection(("127.0.0.1", server.port))  # does not hold it up
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert time.monotonic() - began < 10
        idle.close()
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out, err) == (0, "ended False\n", "")
    votes = read_votes(path)
    assert votes is not None
    assert (votes.choices, votes.closed) == ({"0" * 15 + "2": "right"}, False)


# --- which side is which ------------------------------------------------------------------------------------------


def conversation(path: Path, pairs: Any) -> bytes:
    """Return all that a rater is sent before the end, the token taken out."""
    with open_sitting(path, pairs) as sitting, served(sitting) as server:
        replies = [server.ask("GET"), server.ask("GET", "state")]
        replies += [server.vote(pair.item, "left") for pair in pairs]
        replies += [
            server.vote("f" * 16, "left"),
            server.vote(pairs[0].item, None),
            server.ask("GET"),
            server.ask("GET", "x"),
        ]
        sent = b"\n".join(str(sorted(reply.headers.items())).encode() + reply.body for reply in replies)
        return re.sub(rb"'date', '[^']*'", b"", sent).replace(server.path.encode(), b"")


def test_all_that_is_sent_before_the_end_is_the_same_for_swapped_sides(tmp_path: Path) -> None:
    pairs = make_pairs(5)
    turned = tuple(swapped(pair) if number % 2 else pair for number, pair in enumerate(pairs))
    sent, other = conversation(tmp_path / "1.jsonl", pairs), conversation(tmp_path / "2.jsonl", turned)
    assert ITEMS.encode() not in sent
    for pair in pairs:
        for text in (pair.left, pair.right):
            assert text.encode() in sent
            sent, other = (each.replace(text.encode(), b"TEXT") for each in (sent, other))
    assert sent == other
