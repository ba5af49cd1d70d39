"""What README and docs show can be typed: commands, options and settings exist, files that are linked are there."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import typer
import typer.main
import yaml

import loralab
from loralab.cli import app
from loralab.config.load import field_by_key, load_config

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FILES = {"data.json", "evaluation.json"}  # of a run folder, which look like settings
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_SETTING = re.compile(r"^((?:model|data|lora|training|evaluation|output|advanced)(?:\.\w+)+)(?:: .*|=.*)?$")
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")
# What click raises for a wrong command line; typer shows it only as the base of its own.
UsageError = cast(type[Exception], typer.BadParameter.__base__)
page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


def _blocks(path: Path, *languages: str) -> Iterator[str]:
    yield from (text for kind, text in _FENCE.findall(path.read_text(encoding="utf-8")) if kind in languages)


def _inline(path: Path) -> Iterator[str]:
    yield from _INLINE.findall(_FENCE.sub("", path.read_text(encoding="utf-8")))


def _commands(path: Path) -> Iterator[list[str]]:
    """Yield the arguments of every `loralab ...` that a page shows as a line or in its text.

    A synopsis is read with all that it says may be left out, and the first of its alternatives.
    """
    lines = [line for block in _blocks(path, "", "bash", "sh") for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *_inline(path)]:
        found = re.match(r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?loralab (.+)", line.strip())
        if found and not found[1].startswith("-"):
            words = shlex.split(found[1], comments=True)
            yield [word.strip("[]").partition("|")[0] for word in words if word not in ("...", "[...]")]


def _parse(arguments: list[str]) -> dict[str, Any]:
    """Read a command's arguments as the command line does, without running it.

    Raises:
        UsageError: no such command or option, or an option without its value.
    """
    group: Any = typer.main.get_command(app)
    context = group.make_context("loralab", list(arguments), resilient_parsing=True)
    command = group.get_command(context, arguments[0])
    if command is None:
        raise UsageError(f"no command {arguments[0]!r}")
    parser = command.make_parser(type(context)(command, info_name=arguments[0], parent=context))
    values, _, _ = parser.parse_args(args=arguments[1:])
    return dict(values)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _texts(each)


@page
def test_commands_are_understood(page: Path) -> None:
    for arguments in _commands(page):
        try:
            values = _parse(arguments)
        except UsageError as error:
            pytest.fail(f"{page.name}: loralab {shlex.join(arguments)}: {error}")
        for text in _texts(list(values.values())):
            key = text.partition("=")[0]
            if "=" in text and _SETTING.match(key):
                assert field_by_key(key) is not None, f"{page.name}: loralab {shlex.join(arguments)}: no setting {key}"


@page
def test_settings_exist(page: Path) -> None:
    named = [match[1] for text in _inline(page) if (match := _SETTING.match(text)) and text not in FILES]
    unknown = [key for key in named if field_by_key(key) is None and not key.startswith("advanced.trainer_args.")]
    assert not unknown


@page
def test_linked_files_are_there(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    assert [link for link in _LINK.findall(text) if not (page.parent / link).exists()] == []


@page
def test_yaml_is_a_configuration(page: Path) -> None:
    for block in _blocks(page, "yaml"):
        given = yaml.safe_load(block)
        whole = {
            "model": {"name": "m"},
            **given,
            "data": {"train": "t.jsonl", "validation": 0.1, **given.get("data", {})},
        }
        assert load_config(whole).config


@page
def test_python_runs_up_to_its_files(page: Path) -> None:
    """Each block compiles, and what it takes from `loralab` is there."""
    for block in _blocks(page, "python"):
        compile(block, page.name, "exec")
        for name in re.findall(r"\bloralab\.(\w+)", block):
            assert hasattr(loralab, name), f"loralab.{name}"


def test_pages_show_commands() -> None:
    """The control: commands are found, and a wrong one is seen."""
    shown = [arguments[0] for path in PAGES for arguments in _commands(path)]
    assert {"train", "merge", "sweep", "launch", "compare"} <= set(shown)
    assert _parse(["train", "CONFIG.yaml", "lora.r=4"])
    for wrong in (["tarin", "CONFIG.yaml"], ["train", "CONFIG.yaml", "--resumee"], ["merge", "RUN", "--output"]):
        with pytest.raises(UsageError):
            _parse(wrong)
