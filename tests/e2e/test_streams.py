"""What the command meets at its ends: closed pipes, terminals of few characters, odd locales."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
LOCALES = {"C": PLAIN, "ascii": {**PLAIN, "PYTHONIOENCODING": "ascii"}, "latin": {"PYTHONIOENCODING": "latin-1"}}


def run(*arguments: str, stdout: IO[bytes] | int = subprocess.PIPE, **environment: str) -> tuple[int, bytes, bytes]:
    done = subprocess.run(
        [sys.executable, "-m", "loralab.cli", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "100", **environment},
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [["recipes"], ["recipes", "--json"], ["schema"], ["--help"], ["train", "--help"]])
def test_closed_stdout_is_quiet(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as after `| head -0`
    with os.fdopen(writer, "wb") as closed:
        code, _, err = run(*arguments, stdout=closed)
    assert (code, err) == (141, b"")


@pytest.mark.parametrize("locale", LOCALES.values(), ids=LOCALES)
@pytest.mark.parametrize("arguments", [["recipes"], ["--help"], ["train", "--help"]])
def test_any_locale_gets_the_tables(arguments: list[str], locale: dict[str, str]) -> None:
    code, out, err = run(*arguments, **locale)
    assert (code, err) == (0, b"")
    assert out == out.decode("ascii" if "LC_ALL" in locale else "latin-1").encode("latin-1")
    assert b"Alpaca" in out or b"Usage" in out


@pytest.mark.parametrize("locale", LOCALES.values(), ids=LOCALES)
def test_any_locale_gets_the_error(locale: dict[str, str], tmp_path: Path) -> None:
    code, out, err = run("train", str(tmp_path / "größe-世界.yaml"), **locale)
    assert (code, out) == (2, b"")
    # Where the locale has no letters for the path, that is what to mend.
    assert err.startswith(b"error: the path " if "LC_ALL" in locale else b"error: no such file: ")
    assert (b"set LC_ALL=C.UTF-8" in err) == ("LC_ALL" in locale)
    assert err.count(b"\n") == 3


# Prints one value as --json prints it.
JSON = "from loralab.cli.application import print_json; print_json({'text': 'größe 世界'})"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_keeps_its_values_in_every_encoding(encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    out = subprocess.run([sys.executable, "-c", JSON], capture_output=True, env=environment, check=True).stdout
    assert json.loads(out.decode(encoding)) == {"text": "größe 世界"}


# A pipe that broke elsewhere, while the command ran.
ELSEWHERE = """
import sys
from loralab import cli
def broken(): raise BrokenPipeError(32, 'Broken pipe')
from loralab.workflows import recipes
recipes.list_recipes = broken
sys.argv = ['loralab', 'recipes']
cli.main()
"""


def test_pipe_that_broke_elsewhere_is_not_taken_for_stdout() -> None:
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the pipe to another process broke" in done.stderr
