"""The command line as a user runs it: in this process where only the answer matters, in its own where the process does.

Owns running `loralab` and the form of what comes back: exit code, stdout, stderr.
"""

import contextlib
import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from loralab import cli
from loralab.errors import Problem

# What help and configuration errors must not wait for.
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets")
# Runs the command line and, whatever its end, writes which of the heavy packages it imported.
_WATCHED = """
import atexit, json, pathlib, sys
report, heavy = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
atexit.register(lambda: report.write_text(json.dumps([name for name in heavy if name in sys.modules])))
sys.argv = ["loralab", *sys.argv[3:]]
from loralab.cli import main
main()
"""


@dataclass(frozen=True)
class Answer:
    """What a command answered.

    Attributes:
        code: exit code.
        out: stdout.
        err: stderr.
        imported: the packages of `HEAVY` that it imported; None where nobody looked.
    """

    code: int
    out: str
    err: str
    imported: list[str] | None = None


def run_here(*arguments: object, stdin: str = "") -> Answer:
    """Run `loralab.cli.main` in this process; an exception that it lets through goes on to the test."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(_process_state(["loralab", *map(str, arguments)], stdin))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Answer(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _process_state(argv: list[str], stdin: str) -> Iterator[None]:
    before = sys.argv, sys.stdin
    levels = {name: logging.getLogger(name).level for name in ("loralab", "bitsandbytes")}
    sys.argv, sys.stdin = argv, io.StringIO(stdin)
    try:
        yield
    finally:
        sys.argv, sys.stdin = before
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def start(*arguments: object, folder: Path) -> subprocess.Popen[str]:
    """Start `loralab` as a process of its own in `folder`, with as many threads as this one."""
    return subprocess.Popen(
        [sys.executable, "-m", "loralab.cli", *map(str, arguments)],
        cwd=folder,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_watched(*arguments: object, folder: Path) -> Answer:
    """Run `loralab` as a process of its own in `folder` and look at what it imported."""
    report = folder / ".imported.json"
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED, str(report), json.dumps(HEAVY), *map(str, arguments)],
        cwd=folder,
        env=_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    imported = json.loads(report.read_text(encoding="utf-8"))
    report.unlink()
    return Answer(done.returncode, done.stdout, done.stderr, imported)


def _environment() -> dict[str, str]:
    # The same number of threads, for bit-equal sums; a width that leaves help texts in one piece.
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "COLUMNS": "200", "NO_COLOR": "1"}


def write_config(path: Path, config: Mapping[str, Any]) -> Path:
    """Write a configuration as YAML and return the path."""
    path.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
    return path


def snapshot(folder: Path) -> dict[str, bytes | None] | None:
    """Return the bytes of every file below `folder` (None for a folder), or None where it does not exist."""
    if not folder.exists():
        return None
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in found}


def read_problems(answer: Answer, *, code: int = 2) -> list[Problem]:
    """Return the problems of a refusal, after checking that it is nothing but three lines for each."""
    assert answer.code == code, f"exit code {answer.code}:\n{answer.err}"
    assert not answer.out
    assert "Traceback" not in answer.err
    start = re.search(r"^error: ", answer.err, re.MULTILINE)
    assert start is not None, answer.err
    blocks = [block.split("\n") for block in answer.err[start.start() :].removesuffix("\n").split("\n\n")]
    marks = ("error: ", "where: ", "fix:   ")
    for lines in blocks:
        assert len(lines) == len(marks), answer.err
        assert all(line.startswith(mark) and line != mark for line, mark in zip(lines, marks, strict=True)), answer.err
    return [Problem(*(line[len(mark) :] for line, mark in zip(lines, marks, strict=True))) for lines in blocks]
