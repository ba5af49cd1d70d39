"""Running the parts of the diagnosis that load compiled libraries, each in a process of its own.

A library that is built for another processor or driver can end its process or hang; the doctor must
live to tell. A part writes one JSON object a line on its stdout; what libraries print goes to stderr.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from loralab.run import render_json


@dataclass(frozen=True, slots=True)
class Output:
    """What a part gave.

    Attributes:
        lines: the objects that it wrote before it ended.
        failure: how it ended, or None where it came to its end.
    """

    lines: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None


def run_part(module: str, arguments: Sequence[str] = (), *, timeout_seconds: float = 240.0) -> Output:
    """Run a module of this package as a program and return what it wrote.

    Args:
        module: its dotted name.
        arguments: for its command line.
        timeout_seconds: after which it is ended.
    """
    # -P: a file of the current folder must not take the place of a library.
    command = [sys.executable, "-P", "-m", module, *arguments]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_seconds, check=False
        )
    except subprocess.TimeoutExpired as late:
        return Output(_read_lines(late.stdout), f"it did not end within {timeout_seconds:.0f} seconds")
    lines = _read_lines(done.stdout)
    return Output(lines, None if done.returncode == 0 else _describe_end(done.returncode, done.stderr))


def _read_lines(stdout: bytes | None) -> list[dict[str, Any]]:
    found = []
    for line in (stdout or b"").splitlines():
        try:
            value = json.loads(line)
        except ValueError:  # the last line of a process that was ended while it wrote
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _describe_end(code: int, stderr: bytes) -> str:
    if code < 0:
        try:
            return f"ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"ended by signal {-code}"
    said = [line.strip() for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    return said[-1][:300] if said else f"exit code {code}"


def open_output() -> Callable[[dict[str, Any]], None]:
    """Return a function that writes an object as one line on stdout, and turn other writers to stderr."""
    stream = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def write(value: dict[str, Any]) -> None:
        stream.write(json.dumps(json.loads(render_json(value))) + "\n")
        stream.flush()  # what follows may end the process

    return write
