"""What the voting page's server answers to a request, and to whom.

Owns the checks of a request (host, token, method, origin, type, size) and its answer. When the server starts and ends
is `server.py`'s, what the page looks like `page.py`'s, whether a vote may count `sitting.py`'s. Nothing that is sent
before the rater finishes says which side is which: this module never learns it.
"""

import hmac
import json
import logging
import math
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any, TypedDict

from loralab.errors import JudgingError, LoralabError, excerpt
from loralab.judging.page import picture_type, render_live, shown_pictures
from loralab.judging.sitting import CHOICES, Sitting

logger = logging.getLogger(__name__)

# A vote has less than 200 bytes.
_LONGEST_BODY = 4096
_SOCKET_SECONDS = 15.0
_PICTURE = re.compile(r"pictures/([0-9]{1,5})")
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Connection": "close",
}
_NOTHING_ALLOWED = "default-src 'none'; frame-ancestors 'none'"


class Reveal(TypedDict):
    """What the page shows a rater who has finished: this rater's own votes with the names behind them.

    Attributes:
        names: what the two models are called in a sentence, such as "the base model" and "the adapter".
        wins: pairs in which each of them was preferred, in the order of `names`.
        ties: pairs that were called about the same.
        both_bad: pairs in which both were called bad.
        same_text: pairs that were not shown, since both answers are the same text.
        not_judged: pairs that the rater left open.
        reading: what it comes to, in one sentence or two.
        left: which of `names` (0 or 1) stood on the left, by item.
    """

    names: tuple[str, str]
    wins: tuple[int, int]
    ties: int
    both_bad: int
    same_text: int
    not_judged: int
    reading: str
    left: Mapping[str, int]


class _RefusedError(Exception):
    """A request that is not served; its text is for the rater.

    Args:
        status: of the answer.
        words: why.
        allow: methods that the address takes, where another one was used.
    """

    def __init__(self, status: HTTPStatus, words: str, *, allow: str = "") -> None:
        self.status = status
        self.allow = allow
        super().__init__(words)


class Desk:
    """What one server serves: a rater's sitting behind a token.

    Args:
        sitting: what is voted on.
        title: of the page.
        result: what a rater is shown at the end.

    Attributes:
        token: the first part of every address.
        hosts: the names under which the page answers; set once the port is known.
        finished: set when the rater has finished, and knows it.
    """

    def __init__(self, sitting: Sitting, *, title: str, result: Callable[[], Reveal]) -> None:
        self.sitting = sitting
        self.title = title
        self.result = result
        self.token = secrets.token_urlsafe(24)
        self.hosts: tuple[str, ...] = ()
        self.pictures = shown_pictures(sitting.pairs)
        self.finished = threading.Event()
        self._acting = threading.Lock()
        self._ended = False

    def act(self, action: Callable[[Mapping[str, Any]], dict[str, Any]], value: Mapping[str, Any]) -> dict[str, Any]:
        """Let a vote or the end count, one at a time."""
        with self._acting:
            if self._ended:
                raise _RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "loralab has stopped.")
            return action(value)

    def end(self, *, wait_seconds: float) -> None:
        """Take no more votes; one that is being written is waited for."""
        held = self._acting.acquire(timeout=wait_seconds)
        self._ended = True
        if held:
            self._acting.release()


class VotingHandler(BaseHTTPRequestHandler):
    """One request.

    Args:
        desk: what is served.
        arguments: the library's.
    """

    timeout = _SOCKET_SECONDS  # of one read or write

    def __init__(self, desk: Desk, *arguments: Any) -> None:
        self.desk = desk
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Serve the page, its state or a picture."""
        self._serve()

    def do_POST(self) -> None:
        """Take a vote or the end."""
        self._serve()

    def _serve(self) -> None:
        try:
            self._check_host()
            self._answer(self._name())
        except _RefusedError as refused:
            self._drain()
            self._refuse(refused)

    def _answer(self, name: str) -> None:
        picture = _PICTURE.fullmatch(name)
        if picture is not None:
            self._only("GET")
            self._send_picture(int(picture[1]))
        elif name == "":
            self._only("GET")
            self._send_page()
        elif name == "state":
            self._only("GET")
            self._send_json(self._state())
        elif name in {"votes", "close"}:
            self._only("POST")
            self._act(name, self._body())
        else:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "There is no such page.")

    def _check_host(self) -> None:
        """Refuse names of other hosts: a page elsewhere may have its own name lead here."""
        if (self.headers.get_all("Host") or []) not in [[host] for host in self.desk.hosts]:
            raise _RefusedError(
                HTTPStatus.FORBIDDEN,
                f"This page answers as {' or '.join(self.desk.hosts)} only. Through a tunnel, take the same port "
                "at both ends.",
            )

    def _name(self) -> str:
        """Return what is asked for, behind the token."""
        _, token, name = [*self.path.partition("?")[0].split("/", 2), "", ""][:3]
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.desk.token.encode()):
            raise _RefusedError(HTTPStatus.FORBIDDEN, "Open the address that loralab printed, as a whole.")
        return name

    def _only(self, method: str) -> None:
        if self.command != method:
            raise _RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, f"Only {method} is answered here.", allow=method)

    def _body(self) -> dict[str, Any]:
        """Return the JSON object that was sent, by this page and nobody else."""
        origins = self.headers.get_all("Origin") or []
        if origins not in ([], [f"http://{self.headers['Host']}"]):
            raise _RefusedError(HTTPStatus.FORBIDDEN, "Only the page itself may send votes.")
        if self.headers.get_content_type() != "application/json":
            raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Votes are sent as application/json.")
        length = self._length()
        if length is None:
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing.")
        if length > _LONGEST_BODY:
            raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"A vote has at most {_LONGEST_BODY} bytes.")
        data = self.rfile.read(length)
        self.headers.replace_header("Content-Length", "0")  # read
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "That is no JSON object.")
        return value

    def _length(self) -> int | None:
        lengths = self.headers.get_all("Content-Length") or []
        if len(lengths) != 1 or re.fullmatch("[0-9]{1,12}", lengths[0]) is None:
            return None
        return int(lengths[0])

    def _drain(self) -> None:
        """Read what a refused request still sends, within bounds: the answer would be lost with it."""
        self.rfile.read(min(self._length() or 0, 16 * _LONGEST_BODY))

    def _act(self, name: str, value: Mapping[str, Any]) -> None:
        """Let a vote or the end count, then say so."""
        act = self._close if name == "close" else self._vote
        try:
            answer = self.desk.act(act, value)
        except LoralabError as error:
            logger.warning("a vote was refused: %s", excerpt(error))
            own = isinstance(error, JudgingError)
            status = HTTPStatus.CONFLICT if own else HTTPStatus.INSUFFICIENT_STORAGE
            what, fix = error.problems[0].what, error.problems[0].fix
            raise _RefusedError(status, f"{what[:1].upper()}{what[1:]}. To mend it: {fix}.") from None
        try:
            self._send_json(answer)
        finally:
            if name == "close":
                self.desk.finished.set()

    def _vote(self, value: Mapping[str, Any]) -> dict[str, Any]:
        item, choice, seconds = _read_vote(value)
        sitting = self.desk.sitting
        if choice is None:
            sitting.withdraw(item)
        else:
            sitting.record(item, choice, seconds=seconds)
        return self._state()

    def _close(self, value: Mapping[str, Any]) -> dict[str, Any]:
        if value:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "Nothing is sent with the end.")
        self.desk.sitting.close()
        try:
            reveal = self.desk.result()
        except LoralabError as error:  # the sitting is closed all the same, and the command says why
            logger.warning("the result could not be shown: %s", excerpt(error))
            return {**self._state(), "result": None}
        return {**self._state(), "result": reveal}

    def _state(self) -> dict[str, Any]:
        return {"answers": dict(self.desk.sitting.answers), "closed": self.desk.sitting.closed}

    def _send_page(self) -> None:
        sitting = self.desk.sitting
        page = render_live(
            sitting.pairs, rater=sitting.rater, title=self.desk.title, answers=sitting.answers, closed=sitting.closed
        )
        self._send(page.text.encode(), "text/html; charset=utf-8", policy=page.policy)

    def _send_picture(self, number: int) -> None:
        paths = self.desk.pictures
        try:
            data = paths[number].read_bytes() if number < len(paths) else b""
        except OSError:
            data = b""
        kind = picture_type(data)
        if kind is None:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "That picture is not there.")
        self._send(data, kind)

    def _send_json(self, value: Mapping[str, Any]) -> None:
        self._send(json.dumps(value).encode(), "application/json")

    def _refuse(self, refused: _RefusedError) -> None:
        allow = {"Allow": refused.allow} if refused.allow else {}
        words = str(refused).encode("utf-8", "replace")
        self._send(words, "text/plain; charset=utf-8", status=refused.status, more=allow)

    def _send(
        self,
        data: bytes,
        kind: str,
        *,
        status: HTTPStatus = HTTPStatus.OK,
        policy: str = _NOTHING_ALLOWED,
        more: Mapping[str, str] | None = None,
    ) -> None:
        self.close_connection = True
        self.request_version = self.protocol_version  # where a request has none, the library would leave headers away
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(data)), "Content-Security-Policy": policy}
        for header, value in {**headers, **_HEADERS, **(more or {})}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that is no HTTP, or has an unknown method; the library's page says more than needed."""
        unknown = code == HTTPStatus.NOT_IMPLEMENTED
        status = HTTPStatus.METHOD_NOT_ALLOWED if unknown else HTTPStatus(code)
        allow = "GET, POST" if unknown else ""
        self._refuse(_RefusedError(status, f"{status.phrase}.", allow=allow))

    def version_string(self) -> str:
        """Return the name of the program, without versions."""
        return "loralab"

    def log_message(self, format: str, *args: Any) -> None:
        """Log a request, without the token; the library prints it."""
        logger.debug("%s", (format % args).replace(self.desk.token, "(token)"))


def _read_vote(value: Mapping[str, Any]) -> tuple[str, Any, float | None]:
    """Return item, choice (None: taken back) and seconds of what the page sent."""
    item, choice, seconds = (value.get(name) for name in ("item", "choice", "seconds"))
    measured = isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 <= seconds < math.inf
    if (
        value.keys() != {"item", "choice", "seconds"}
        or not isinstance(item, str)
        or not (choice is None or (isinstance(choice, str) and choice in CHOICES))
        or not (seconds is None or measured)
    ):
        raise _RefusedError(HTTPStatus.BAD_REQUEST, "That is no vote.")
    return item, choice, seconds
