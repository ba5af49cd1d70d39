"""Sittings to vote in, a server that runs while a test does, and requests written by hand."""

import json
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loralab.judging.server import Reveal, serve_sitting
from loralab.judging.sitting import BlindPair, Sitting
from loralab.judging.votes import open_votes

ITEMS = "ab" * 32


def make_pairs(count: int, **changed: Any) -> tuple[BlindPair, ...]:
    """Return pairs of short texts."""
    return tuple(
        replace(
            BlindPair(f"{number:016x}", f"Question {number}?", f"A red fox {number}.", f"A green frog {number}.", ()),
            **changed,
        )
        for number in range(1, count + 1)
    )


def swapped(pair: BlindPair) -> BlindPair:
    """Return a pair with its sides changed."""
    return replace(pair, left=pair.right, right=pair.left)


@contextmanager
def open_sitting(path: Path, pairs: tuple[BlindPair, ...], rater: str = "anna") -> Iterator[Sitting]:
    """Yield a rater's sitting, with its votes in a file."""
    with open_votes(path, rater=rater, items_sha256=ITEMS) as log:
        yield Sitting(rater, pairs, log)


def reveal(sitting: Sitting) -> Reveal:
    """Return what a rater is shown at the end, the second model standing on the left of every pair."""
    choices = list(sitting.answers.values())
    return {
        "names": ("the base model", "the adapter"),
        "wins": (choices.count("right"), choices.count("left")),
        "ties": choices.count("tie"),
        "both_bad": choices.count("both_bad"),
        "same_text": 2,
        "not_judged": len(sitting.pairs) - len(choices),
        "reading": "No difference was seen.",
        "left": {pair.item: 1 for pair in sitting.pairs},
    }


@dataclass(frozen=True)
class Reply:
    """An answer of the server; header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Served:
    """A running server.

    Attributes:
        address: what the rater opens.
        thread: where `serve_sitting` runs; ends when it returns.
    """

    address: str
    thread: threading.Thread

    @property
    def port(self) -> int:
        return int(self.address.split("/")[2].split(":")[1])

    @property
    def path(self) -> str:
        """The part of the address behind the host, with the token."""
        return "/" + self.address.split("/", 3)[3]

    def ask(self, method: str, path: str | None = None, body: bytes = b"", **headers: str | None) -> Reply:
        """Send a request; `path` goes behind the token, or is all of it if it begins with a slash.

        A header given as None is left out; underscores in names are hyphens.
        """
        whole = path if path is not None and path.startswith("/") else self.path + (path or "")
        sent: dict[str, str | None] = {"Host": f"127.0.0.1:{self.port}"}
        if method == "POST":
            sent |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = [
            f"{method} {whole} HTTP/1.1",
            *(f"{name}: {value}" for name, value in sent.items() if value is not None),
        ]
        return self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    def vote(self, item: str, choice: str | None, seconds: float | None = 1.5, **headers: str | None) -> Reply:
        """Send a vote as the page does."""
        body = json.dumps({"item": item, "choice": choice, "seconds": seconds}).encode()
        return self.ask("POST", "votes", body, **headers)

    def finish(self) -> Reply:
        """End the sitting as the page does, and wait for the server's end."""
        reply = self.ask("POST", "close", b"{}")
        self.thread.join(10)
        return reply

    def send(self, data: bytes) -> Reply:
        """Send bytes and return the answer to them."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as connection:
            connection.sendall(data)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        pairs = [line.partition(": ") for line in lines]
        assert len({name.lower() for name, _, _ in pairs}) == len(pairs), "a header twice"
        return Reply(int(status.split()[1]), {name.lower(): value for name, _, value in pairs}, body)


@contextmanager
def served(
    sitting: Sitting, *, title: str = "A test", port: int | None = None, result: Callable[[], Reveal] | None = None
) -> Iterator[Served]:
    """Run the server of a sitting; what is left of it at the end is finished."""
    ready = threading.Event()
    addresses: list[str] = []

    def on_ready(address: str) -> None:
        addresses.append(address)
        ready.set()

    def serve() -> None:
        serve_sitting(sitting, title=title, port=port, on_ready=on_ready, result=result or (lambda: reveal(sitting)))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(10)
    running = Served(addresses[0], thread)
    try:
        yield running
    finally:
        if not sitting.closed:
            running.finish()
        thread.join(10)
        assert not thread.is_alive()
