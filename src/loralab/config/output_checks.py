"""Rules over `output.hub`: the form of a repository's name, and settings that would not act."""

import re
from collections.abc import Callable

from loralab.config.findings import Finding
from loralab.config.schema import Config
from loralab.lookup import suggest

PLACEHOLDERS = ("user", "run", "timestamp")
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_LONGEST_NAME = 96
_KEY = "output.hub.repo"


def is_repository_name(text: str) -> bool:
    """Return whether the Hub takes OWNER/NAME."""
    parts = text.split("/")
    formed = len(parts) == 2 and all(map(_PART.fullmatch, parts))
    return formed and "--" not in text and ".." not in text and len(text) <= _LONGEST_NAME


def _check_repository(config: Config) -> list[Finding]:
    repo = config.output.hub.repo
    if repo is None:
        return []
    unknown = [name for name in _PLACEHOLDER.findall(repo) if name not in PLACEHOLDERS]
    if unknown:
        fix = f"{suggest(unknown[0], PLACEHOLDERS)}; {{user}}, {{run}} and {{timestamp}} are filled in"
        return [Finding(_KEY, f"{{{unknown[0]}}} in {repo!r} is nothing that is filled in", fix)]
    if is_repository_name(_PLACEHOLDER.sub("x", repo)):
        return []
    fix = "write OWNER/NAME, such as {user}/price-{timestamp}: letters, digits, -, _ and ."
    return [Finding(_KEY, f"no name of a repository: {repo!r}", fix)]


def _check_push_effect(config: Config) -> list[Finding]:
    """Find settings of pushes that another one leaves without effect."""
    hub, training, findings = config.output.hub, config.training, []
    if hub.repo is None and hub.chosen("strategy"):
        what = f"strategy {hub.strategy} without a repository: nothing is pushed"
        findings.append(Finding("output.hub.strategy", what, "set output.hub.repo, or remove it"))
    elif hub.chosen("steps") and hub.strategy != "steps":
        what = f"steps {hub.steps} with strategy {hub.strategy}, which does not count steps"
        findings.append(Finding("output.hub.steps", what, "remove it, or set output.hub.strategy: steps"))
    if hub.repo is not None and hub.strategy == "every_save" and training.save_strategy == "no":
        what = "strategy every_save with training.save_strategy no, which saves nothing to push before the end"
        findings.append(
            Finding("output.hub.strategy", what, "set training.save_strategy, or output.hub.strategy: steps")
        )
    return findings


RULES: tuple[Callable[[Config], list[Finding]], ...] = (_check_repository, _check_push_effect)
