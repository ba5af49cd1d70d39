"""The server of the voting page: one rater, one sitting, this machine only.

Owns where it listens, when it starts and when it ends. What it answers is `desk.py`'s.
"""

import logging
import socketserver
import threading
from collections.abc import Callable
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any

from loralab.errors import JudgingError
from loralab.judging.desk import Desk, Reveal, VotingHandler
from loralab.judging.sitting import Sitting

__all__ = ["Reveal", "serve_sitting"]

logger = logging.getLogger(__name__)

ADDRESS = "127.0.0.1"
_NAMES = (ADDRESS, "localhost")
# How long a vote that is being written may take when the server ends.
_LAST_VOTE_SECONDS = 10.0
_WAKE_SECONDS = 0.5


def serve_sitting(
    sitting: Sitting,
    *,
    title: str,
    port: int | None,
    on_ready: Callable[[str], None],
    result: Callable[[], Reveal],
) -> None:
    """Serve a rater's page until the rater finishes, or Ctrl-C.

    Args:
        sitting: what is voted on; every vote is on disk before the page learns of it.
        title: what the page is called; raters see it, so it must not tell the sides.
        port: on 127.0.0.1, or None for a free one.
        on_ready: called once with the address to open.
        result: what the page shows after the end; called once the sitting is closed.

    Raises:
        JudgingError: the port cannot be had, or the sitting is closed already.
    """
    if sitting.closed:
        raise JudgingError(
            f"the sitting of {sitting.rater!r} is closed",
            where=f"rater {sitting.rater}",
            fix="see its result (--result); somebody else may judge (--rater NAME)",
        )
    desk = Desk(sitting, title=title, result=result)
    with _bind(port, desk) as server:
        threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True).start()
        try:
            on_ready(f"http://{ADDRESS}:{server.server_port}/{desk.token}/")
            while not desk.finished.wait(_WAKE_SECONDS):
                pass
        except KeyboardInterrupt:
            logger.info("stopped before the rater finished; what was voted is kept")
        finally:
            server.shutdown()
            desk.end(wait_seconds=_LAST_VOTE_SECONDS)


def _bind(port: int | None, desk: Desk) -> "_Server":
    try:
        server = _Server((ADDRESS, port or 0), partial(VotingHandler, desk))
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise JudgingError(
            f"the page cannot be served on port {port}: {reason}",
            where=f"{ADDRESS}:{port}",
            fix="give another port with --port, or leave it away to get a free one",
        ) from None
    desk.hosts = tuple(f"{name}:{server.server_port}" for name in _NAMES)
    if server.server_port == 80:  # browsers leave it away
        desk.hosts += _NAMES
    return server


class _Server(ThreadingHTTPServer):
    """The library's server, without its look-up of names and without what it prints."""

    daemon_threads = True

    def server_bind(self) -> None:
        """Bind, without asking a name server what this machine is called."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = ADDRESS, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what went wrong with a request."""
        logger.warning("a request to the voting page failed", exc_info=True)  # noqa: LOG014 (called while handling it)
