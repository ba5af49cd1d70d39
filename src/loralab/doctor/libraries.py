"""The versions of Python and of the libraries, against the ranges that loralab was tested with.

Owns reading the ranges from the package's own metadata. Nothing is imported here: a library that
cannot be imported must still be named.
"""

import importlib.metadata
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from loralab.doctor.findings import Finding, Section

_REQUIREMENT = re.compile(r"^\s*([\w.-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?\s*(?:;\s*(.*))?$")
_CLAUSE = re.compile(r"(>=|<=|==|!=|<|>)\s*([\w.+!-]+)")
_PLATFORM = re.compile(r"sys_platform\s*==\s*['\"](\w+)['\"]")


@dataclass(frozen=True, slots=True)
class Requirement:
    """A library that loralab needs.

    Attributes:
        name: of the distribution.
        clauses: pairs of an operator and a version, all of which must hold.
        platform: the only `sys.platform` that it is for, or None.
    """

    name: str
    clauses: tuple[tuple[str, str], ...]
    platform: str | None = None

    @property
    def range(self) -> str:
        """The tested versions, as they are written in requirements."""
        lower_first = sorted(self.clauses, key=lambda clause: clause[0].startswith("<"))
        return ",".join(f"{operator}{version}" for operator, version in lower_first)

    def allows(self, version: str) -> bool:
        """Return whether a version is in the range."""
        return all(_holds(version, operator, bound) for operator, bound in self.clauses)


def read_requirements(lines: Sequence[str]) -> list[Requirement]:
    """Return the libraries that a run needs; those of extras are left out.

    Args:
        lines: requirements as package metadata holds them.
    """
    found = []
    for line in lines:
        match = _REQUIREMENT.match(line)
        if match is None or "extra" in (match[3] or ""):
            continue
        only = _PLATFORM.search(match[3] or "")
        found.append(Requirement(match[1], tuple(_CLAUSE.findall(match[2])), only[1] if only else None))
    return found


def _holds(version: str, operator: str, bound: str) -> bool:
    have, want = _release(version), _release(bound)
    width = max(len(have), len(want))
    have, want = (numbers + (0,) * (width - len(numbers)) for numbers in (have, want))
    outcomes = {">=": have >= want, "<=": have <= want, "==": have == want, "!=": have != want, "<": have < want}
    return outcomes.get(operator, have > want)


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"v?(?:\d+!)?(\d+(?:\.\d+)*)", version)
    return tuple(map(int, match[1].split("."))) if match else (0,)


def installed_version(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine_libraries(
    requirements: Sequence[Requirement], find: Callable[[str], str | None] = installed_version, *, system: str
) -> Section:
    """Compare installed versions with the tested ranges.

    Args:
        requirements: what loralab needs.
        find: returns the installed version of a distribution, or None.
        system: `sys.platform`.
    """
    section = Section("libraries", {"loralab": find("loralab") or "not installed"})
    for requirement in requirements:
        version = find(requirement.name)
        needed = requirement.platform in (None, system)
        if version is not None:
            tested = "" if requirement.allows(version) else f", tested {requirement.range}"
            section.facts[requirement.name] = f"{version}{tested}"
        elif needed:
            section.facts[requirement.name] = f"not installed, tested {requirement.range}"
        else:
            section.facts[requirement.name] = f"not installed (used on {requirement.platform} only)"
        if needed:
            section.findings += _judge(requirement, version)
    return section


def _judge(requirement: Requirement, version: str | None) -> list[Finding]:
    install = f"pip install '{requirement.name}{requirement.range}'"
    if version is None:
        why = "loralab imports it; commands that need it end with an import error"
        return [Finding("problem", f"{requirement.name} is not installed", why, install)]
    if requirement.allows(version):
        return []
    why = "another series may behave otherwise, and no test of loralab has seen it"
    return [Finding("warning", f"{requirement.name} {version} is outside the tested {requirement.range}", why, install)]


def examine_python(
    version: tuple[int, int, int], *, required: str, system: str, in_environment: bool, environ: Mapping[str, str]
) -> Section:
    """Judge the interpreter.

    Args:
        version: of Python.
        required: the range that loralab's metadata asks for.
        system: name of the operating system, as `platform.system` gives it.
        in_environment: whether Python runs in a virtual environment.
        environ: environment variables.
    """
    text = ".".join(map(str, version))
    inside = in_environment or bool(environ.get("CONDA_PREFIX"))
    facts = {"version": text, "executable": sys.executable, "platform": platform.platform(), "environment": inside}
    section = Section("python", facts)
    requirement = Requirement("python", tuple(_CLAUSE.findall(required)))
    if not requirement.allows(text):
        why = "loralab's own code does not run on it"
        fix = f"make a new environment with Python {requirement.range}"
        section.findings.append(Finding("problem", f"Python {text}, needed is {requirement.range}", why, fix))
    if not inside:
        why = "another program's packages may replace the ones that loralab was tested with"
        fix = "python -m venv .venv && .venv/bin/pip install loralab"
        section.findings.append(Finding("note", "Python does not run in an environment of its own", why, fix))
    if system not in ("Linux", "Darwin"):
        why = "loralab was developed and tested on Linux; bitsandbytes has no tested wheels elsewhere"
        fix = "run it under Linux, on Windows in WSL 2"
        section.findings.append(Finding("note", f"the operating system is {system}", why, fix))
    return section
