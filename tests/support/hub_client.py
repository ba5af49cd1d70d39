"""The real Hub client of this process, turned to a server on the loopback for one test."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from support.hub_server import WRITER, HubServer


@contextmanager
def talking_to(hub: HubServer, home: Path, *, token: str | None = WRITER) -> Iterator[None]:
    """Let the client in this process talk to `hub`: with that token, a cache in `home`, and without Xet."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in hub.environment(home, token).items():
            patch.setenv(name, value)
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        for name, value in (("HF_ENDPOINT", hub.url), ("HF_HUB_OFFLINE", False), ("HF_DATASETS_OFFLINE", False)):
            patch.setattr(datasets.config, name, value)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
        if token is None:
            patch.delenv("HF_TOKEN", raising=False)
        close_session()
        try:
            yield
        finally:
            close_session()
