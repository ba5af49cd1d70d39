"""How a process ends with an exit code: alone as Python does, among several without Python's own shutdown."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys
from loralab.cli.application import leave
atexit.register(print, "shut down")
sys.stdout.write("said")
leave(3)
"""


@pytest.mark.parametrize(("count", "said"), [("1", "saidshut down\n"), ("2", "said")])
def test_what_was_said_is_written_and_the_code_is_kept(count: str, said: str) -> None:
    """Shutting down beside a thread that still needs Python aborts the process, now and then: so it is left out."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "WORLD_SIZE": count},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, said, "")
