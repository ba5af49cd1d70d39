"""Who we are on the Hub, and the words in which its refusals reach the user.

Owns the client, the token's role and which errors may pass by themselves. The token itself stays with
`huggingface_hub`: nothing here keeps, prints or returns it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi, constants, get_session, get_token
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError

from loralab.errors import HubError, excerpt

# Whatever HTTP library the client is built on: its errors are no OSErrors, but those of the client are both.
NETWORK_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], OSError)
# 412: somebody else's commit came first.
_PASSING = {408, 412, 429, 500, 502, 503, 504}
# The client itself waits for ever for a server that takes a connection and never answers.
SILENCE_SECONDS = 60.0
_LOGIN = "run `hf auth login`, or set HF_TOKEN"
# What a token looks like; errors of libraries are shown, and none of them should hold one.
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")


@dataclass(frozen=True, slots=True)
class Account:
    """The name and rights behind the token.

    Attributes:
        user: name on the Hub.
        writes: whether the token may write at all; of fine-grained ones only the Hub knows where.
    """

    user: str
    writes: bool


def open_hub() -> HfApi:
    """Return the client, which finds the token by itself, and gives up on a server that is silent for a minute."""
    session = get_session()
    limits = session.timeout
    if limits.connect is None and limits.read is None:  # whoever set limits of their own keeps them
        session.timeout = SILENCE_SECONDS
    return HfApi(endpoint=constants.ENDPOINT, library_name="loralab")


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE keeps the libraries off the network."""
    return bool(constants.HF_HUB_OFFLINE)


def identify(*, where: str) -> Account:
    """Ask the Hub whose token this is.

    Args:
        where: the key or argument that needs one, for messages.

    Raises:
        HubError: offline, no token, or one that the Hub does not take.
    """
    if is_offline():
        raise HubError(
            "nothing can be pushed: HF_HUB_OFFLINE is set",
            where=where,
            fix="unset HF_HUB_OFFLINE; or leave output.hub.repo out, and push later with: loralab push RUN",
        )
    if get_token() is None:
        raise HubError("there is no Hub token, and nothing is pushed without one", where=where, fix=_LOGIN)
    try:
        answer: dict[str, Any] = open_hub().whoami()
    except NETWORK_ERRORS as error:
        if status_of(error) == 401:
            raise HubError(
                "the Hub does not know this token (HTTP 401): it is mistyped, expired or revoked",
                where=where,
                fix="make one with write access on the Hub's settings page, then `hf auth login` or HF_TOKEN",
            ) from error
        raise explain(error, "the name behind the token", where=where) from error
    role = answer.get("auth", {}).get("accessToken", {}).get("role", "write")
    return Account(str(answer["name"]), writes=role != "read")


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status behind an error, or None where there was no answer."""
    seen: BaseException | None = error
    while seen is not None:
        status = getattr(getattr(seen, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        seen = seen.__cause__ or seen.__context__
    return None


def may_pass(error: BaseException) -> bool:
    """Return whether another attempt may succeed: the server is busy or down, or a connection broke."""
    if isinstance(error, OfflineModeIsEnabled):
        return False
    status = status_of(error)
    if status is not None:
        return status in _PASSING
    # An error page where the client expects JSON is a server in trouble; other values will not change.
    return isinstance(error, json.JSONDecodeError) or not isinstance(error, ValueError)


def retry_after(error: BaseException) -> float | None:
    """Return the seconds that the server asked us to wait, or None."""
    seen: BaseException | None = error
    while seen is not None:
        headers = getattr(getattr(seen, "response", None), "headers", None)
        if headers is not None:
            try:
                return max(0.0, float(headers.get("Retry-After", "")))
            except ValueError:
                return None
        seen = seen.__cause__ or seen.__context__
    return None


def explain(error: BaseException, what: str, *, where: str, instead: str | None = None) -> HubError:
    """Return a failed call to the Hub in three lines.

    Args:
        error: what the client raised.
        what: what was asked for, as in "the model 'OWNER/NAME'".
        where: the key or argument that named it.
        instead: what may be done without the Hub, or None.
    """
    what, fix = _explain(error, what)
    return HubError(what, where=where, fix=fix if instead is None else f"{fix}; {instead}")


def _explain(error: BaseException, what: str) -> tuple[str, str]:
    """Return what is wrong, and how to fix it."""
    status = status_of(error)
    if isinstance(error, GatedRepoError):
        said = f"{what} is gated, and this token has no access (HTTP {status})"
        return said, f"accept its terms on its page with the account of the token; {_LOGIN}"
    if isinstance(error, RevisionNotFoundError):
        return f"{what} has no such revision (HTTP {status})", "name a branch, tag or commit that it has"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{what} cannot be had: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
    causes = list(_causes(error))
    said = _TOKEN.sub("hf_...", excerpt(causes[-1]))
    if status is None and not any(isinstance(each, NETWORK_ERRORS) for each in causes):
        return f"{what} failed: {said}", "try again later"
    if status is None:
        said = f"{what} cannot be had: the connection to {constants.ENDPOINT} failed ({said})"
        return said, "check the network (`loralab doctor`), and try again; what was fetched is kept"
    said, fix = _STATUS.get(
        status, ("the Hub has a problem" if status >= 500 else "the Hub refuses", "try again later")
    )
    return f"{what}: {said} (HTTP {status})", fix


_STATUS = {
    401: ("not there, or not for this token", f"check the name and the token; {_LOGIN}"),
    403: ("this token has no right to it", f"take a token with that right; {_LOGIN}"),
    404: ("not there, or private", f"check the name; for a private one {_LOGIN}"),
    429: ("too many requests", "wait some minutes and try again; with a token the limits are wider"),
}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it came from, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__
