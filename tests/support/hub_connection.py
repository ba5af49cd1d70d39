"""One connection to the Hub on the loopback: requests in, answers out, and going wrong where a test wants it."""

import contextlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Fault:
    """What goes wrong, at which requests, how often.

    Attributes:
        request: pattern of `METHOD PATH`.
        status: answered in the place of the truth; 0 cuts the connection in the middle of the body.
        times: how often; then it works again.
        headers: of the answer.
        seconds: waited before the truth is answered, where `status` is None.
        then: called when it strikes.
    """

    request: str
    status: int | None = None
    times: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    then: Callable[[], None] = lambda: None


class Answered(Exception):
    """The request was answered already."""


class Connection(BaseHTTPRequestHandler):
    """One connection: requests in, answers out, with the armed faults in between."""

    hub: Any
    routes: Sequence[tuple[str, tuple[str, ...], Callable[..., None]]] = ()
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        """Be known, so that a server that goes away takes its open connections along."""
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        """Be forgotten."""
        self.hub.connections.discard(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.content: bytes | None = None
        self.query = parse_qs(parts.query)
        self.at = unquote(parts.path)
        request = f"{self.command} {self.at}"
        self.hub.requests.append(request)
        try:
            self._strike(request)
            for pattern, method, answer in self.routes:
                found = re.fullmatch(pattern, self.at)
                if found and self.command in method:
                    answer(self, **found.groupdict())
                    return
            self._fail(404, "no such page")
        except Answered:
            pass
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_HEAD = _serve  # noqa: N815 - the names that http.server calls

    def _strike(self, request: str) -> None:
        with self.hub.lock:
            fault = next((f for f in self.hub.faults if f.times > 0 and re.search(f.request, request)), None)
            if fault is None:
                return
            fault.times -= 1
        fault.then()
        if fault.seconds:
            time.sleep(fault.seconds)
        if fault.status == 0 and self.command in ("PUT", "POST"):
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self._hang_up()
        elif fault.status == 0:
            self.cut = True
        elif fault.status is not None:
            self._body()
            self._fail(fault.status, "armed", dict(fault.headers))

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()
        raise Answered

    def _body(self) -> bytes:
        """Return the body of the request; it may be asked for again."""
        if self.content is None:
            self.content = self._read_body()
        return self.content

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, content: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if getattr(self, "cut", False):
            self.wfile.write(content[: len(content) // 2])
            self._hang_up()
        self.wfile.write(content)

    def _json(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._answer(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _fail(self, status: int, message: str, headers: Mapping[str, str] | None = None, code: str = "") -> None:
        shown = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self._json({"error": message}, status, shown)
        raise Answered
