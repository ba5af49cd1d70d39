"""The files around the source: nothing of one machine in them, and the commands that they name exist."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from architecture.source import ROOT, fail_if_any

TEXT_NAMES = {"Makefile", "run", "LICENSE", ".gitignore"}
TEXT_SUFFIXES = {".py", ".toml", ".txt", ".md", ".yaml", ".yml", ".json", ".sh", ".cfg", ".jinja", ".html"}
VISIBLE_DOT_NAMES = {".ci", ".github", ".gitignore"}
NOT_TRACKED = {"__pycache__", "build", "dist", "runs", "shared"}  # see .gitignore

# Written in parts, so that this file passes its own test.
MACHINE_PATHS = re.compile(rf"(?<![\w.~])/(?:{'|'.join(('work', 'root', 'farm', 'home'))})/")
ADDRESSES = ("pypi" + ".org", "python" + "hosted", "index" + "-url", "find" + "-links", "file" + "://", "pip" + ".conf")


@cache
def tracked_text_files() -> tuple[Path, ...]:
    """Return the text files that belong to the repository, by their names: a source archive has no git."""
    return tuple(_text_files(ROOT))


def _text_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".") and path.name not in VISIBLE_DOT_NAMES
        if hidden or path.name in NOT_TRACKED or path.suffix == ".egg-info":
            continue
        if path.is_dir():
            yield from _text_files(path)
        elif path.name in TEXT_NAMES or path.suffix in TEXT_SUFFIXES:
            yield path


def _matching_lines(pattern: re.Pattern[str]) -> Iterator[str]:
    for path in tracked_text_files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if pattern.search(line):
                yield f"{path.relative_to(ROOT)}:{number} {line.strip()[:100]}"


def test_no_paths_of_one_machine() -> None:
    fail_if_any(_matching_lines(MACHINE_PATHS), "paths that exist on one machine only:")


def test_no_registry_addresses() -> None:
    pattern = re.compile("|".join(map(re.escape, ADDRESSES)))
    fail_if_any(_matching_lines(pattern), "package registries are the user's choice; no address in the repository:")


def test_constraints_are_exact_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    entry = re.compile(r"[A-Za-z0-9][\w.-]*==[\w.]+")
    fail_if_any(
        (line for line in lines if line and not line.startswith("#") and not entry.fullmatch(line)),
        "lines of constraints.txt that are not `name==version`:",
    )


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_named_make_targets_exist(name: str) -> None:
    path = ROOT / name
    if not path.is_file():
        pytest.skip(f"no {name}")
    text = path.read_text(encoding="utf-8")
    code = "\n".join(_code_parts(text)) if path.suffix == ".md" else text
    named = set(re.findall(r"(?:^|[\s;&])make\s+([a-z][\w-]*)", code))
    fail_if_any(sorted(named - _make_targets()), f"make targets that {name} names and the Makefile lacks:")


def _code_parts(text: str) -> list[str]:
    """Return the fenced blocks and the inline code of a Markdown text."""
    fenced = re.findall(r"^```.*?\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    without_fences = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return fenced + re.findall(r"`([^`\n]+)`", without_fences)


def _make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][\w-]*):", text, flags=re.MULTILINE))
