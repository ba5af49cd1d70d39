"""Rules over `output.trackers`: which packages they need, what they need besides, and what none may be told.

Owns what can be told before any data are read, and the hiding of secrets.
"""

import importlib
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from loralab.config.findings import Finding
from loralab.config.schema import Config
from loralab.errors import ConfigError, Problem

KEY = "output.trackers"
# A figure that blocks for minutes at a dead server would stop the run; and no program reports its use by itself.
NO_REPORTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "WANDB_ERROR_REPORTING": "false",
}
# Names of environment variables whose values are secret.
_SECRET_NAME = re.compile(r"TOKEN|API_?KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_LOGIN_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_SHORTEST_SECRET = 8
_HIDDEN = "***"


def check_tracker_names(config: Config) -> list[Finding]:
    """Return what is wrong with the list of trackers by itself."""
    twice = [name for name, times in Counter(config.output.trackers).items() if times > 1]
    return [Finding(KEY, f"trackers names {twice[0]!r} twice", "name it once")] if twice else []


def check_trackers(names: Sequence[str]) -> None:
    """Check that each tracker is installed and can begin without asking anybody.

    Args:
        names: `output.trackers`.

    Raises:
        ConfigError: one cannot.
    """
    os.environ.update({key: os.environ.get(key, value) for key, value in NO_REPORTS.items() if names})
    problems = [problem for name in names if (problem := _problem(name)) is not None]
    if problems:
        raise ConfigError.from_problems(problems)


def load_package(name: str) -> Any:
    """Return a module of a tracker's package, which is imported only where `output.trackers` names it."""
    return importlib.import_module(name)


def _problem(name: str) -> Problem | None:
    if importlib.util.find_spec(name) is None:
        return Problem(
            f"tracker {name}: the package {name} is not installed",
            f"key {KEY}",
            f"pip install 'loralab[{name}]', or remove it from {KEY}",
        )
    if name == "wandb":
        return _wandb_problem()
    if name == "mlflow" and not os.environ.get("MLFLOW_TRACKING_URI"):
        lacking = [each for each in ("sqlalchemy", "alembic") if importlib.util.find_spec(each) is None]
        if lacking:
            return Problem(
                f"tracker mlflow: MLFLOW_TRACKING_URI is not set, and a local database needs {' and '.join(lacking)}",
                f"key {KEY}",
                "set MLFLOW_TRACKING_URI to a server, or pip install mlflow, which brings a local database",
            )
    return None


def _wandb_problem() -> Problem | None:
    wandb = load_package("wandb")
    if wandb.setup().settings.mode in ("offline", "disabled", "dryrun"):
        return None
    if wandb.login(prompt=False, verify=False):
        return None
    return Problem(
        "tracker wandb: online, and nobody is logged in",
        f"key {KEY}",
        "log in with `wandb login`, or set WANDB_MODE=offline and send later with `wandb sync`",
    )


def hide_secrets(value: Any) -> Any:
    """Return a value without what must not leave the machine: secrets of the environment, logins in addresses.

    Args:
        value: text, or lists and mappings of it; anything else comes back as it is.
    """
    if isinstance(value, dict):
        return {key: hide_secrets(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [hide_secrets(each) for each in value]
    if not isinstance(value, str):
        return value
    for name, secret in os.environ.items():
        if _SECRET_NAME.search(name) and len(secret) >= _SHORTEST_SECRET:
            value = value.replace(secret, _HIDDEN)
    return _LOGIN_IN_ADDRESS.sub(_HIDDEN, value)
