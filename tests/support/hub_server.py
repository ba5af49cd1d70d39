"""A Hub on the loopback: a real HTTP server that speaks what the real clients ask, with faults on request.

Owns starting and stopping, repositories, tokens with roles, and faults. Large files go the way of LFS, in one part
or in several; the Xet protocol is not spoken: clients run with HF_HUB_DISABLE_XET=1.
"""

import contextlib
import socket
import threading
from collections.abc import Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from support.hub_answers import HubAnswers
from support.hub_connection import Fault
from support.hub_repos import Repo

WRITER, READER, STRANGER = "hf_writerwriterwriterwriterwriterwr", "hf_readerreaderreaderreaderreaderre", "hf_none"
USER = "ada"


class HubServer:
    """The server; use it as a context manager.

    Attributes:
        repos: by kind ("models", "datasets") and name.
        objects: large files by SHA-256.
        faults: armed ones.
        requests: what was asked, `METHOD PATH`.
        sent: headers of the requests, beside `requests`.
        part_bytes: size from which a large file goes up in parts, or None.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.part_bytes: int | None = None
        self.tokens = {WRITER: (USER, "write"), READER: (USER, "read")}
        self.lock = threading.RLock()
        self.connections: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0

    def __enter__(self) -> "HubServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen; on the port that it had before, if any."""
        handler = type("Handler", (HubAnswers,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Listen no more and end what is open; the repositories stay."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            for connection in list(self.connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    @property
    def is_up(self) -> bool:
        """Whether it listens."""
        return self._server is not None

    def add(self, kind: str, name: str, files: Mapping[str, bytes], **facts: Any) -> Repo:
        """Make a repository with one commit."""
        repo = self.repos.setdefault((kind, name), Repo(name, kind, **facts))
        repo.commit("initial commit", files)
        return repo

    def add_folder(self, kind: str, name: str, folder: Path) -> Repo:
        """Make a repository of the files of a folder."""
        return self.add(kind, name, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})

    def model(self, name: str) -> Repo:
        """Return a model's repository."""
        return self.repos[("models", name)]

    def arm(self, request: str, **what: Any) -> Fault:
        """Let something go wrong."""
        fault = Fault(request, **what)
        self.faults.append(fault)
        return fault

    def environment(self, home: Path, token: str | None = WRITER) -> dict[str, str]:
        """Return the variables under which a process talks to this server, with a cache of its own."""
        given = {} if token is None else {"HF_TOKEN": token}
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **given,
        }
