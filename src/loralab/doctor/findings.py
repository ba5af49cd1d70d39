"""The form of a diagnosis: facts by section, findings by severity.

Owns what a finding holds and the words for amounts of memory. What is found is each topic's own.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

# A problem stops a run or makes it wrong; a warning costs time, memory or surprises; a note is good to know.
Severity: TypeAlias = Literal["problem", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "note")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a person should know.

    Attributes:
        severity: how much it matters.
        what: what was found, with the value.
        why: what it does to a run.
        fix: the command or setting that mends it.
    """

    severity: Severity
    what: str
    why: str
    fix: str


@dataclass(slots=True)
class Section:
    """What is known about one topic.

    Attributes:
        name: its heading.
        facts: figures and names; a name that ends in `_bytes` holds bytes.
        findings: what follows from them.
    """

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return the section as JSON holds it."""
        return asdict(self)


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings, the gravest first."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def render_bytes(count: float) -> str:
    """Return an amount of memory in the unit that reads best."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"
