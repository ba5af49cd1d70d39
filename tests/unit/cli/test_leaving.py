"""How a process ends with an exit code: as Python does, but where it is one of several, without Python's shutdown."""

import subprocess
import sys

import pytest

JOINS = """
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
"""
PROGRAM = """
import atexit, sys
from loralab.cli.application import leave
atexit.register(print, "shut down")
sys.stdout.write("said ")
leave(3)
"""


@pytest.mark.parametrize(("before", "said"), [("", "said shut down\n"), (JOINS, "said ")], ids=["alone", "in a group"])
def test_what_was_said_is_written_and_the_code_is_kept(before: str, said: str) -> None:
    """Shutting down beside a thread that still needs Python aborts the process, now and then: so it is left out."""
    done = subprocess.run([sys.executable, "-c", before + PROGRAM], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, said), done.stderr
