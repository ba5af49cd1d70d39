"""`loralab` as several processes of one run, each with its own output: what torchrun starts, without its reactions.

Owns starting and collecting them, and the store where they meet, which outlives them as a launcher's does.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import TCPStore

from support.command import Answer

# Longer than anything that a test waits for takes; a hang is a failure, not a wait.
_LIMIT_SECONDS = 180.0


@dataclass(frozen=True)
class Team:
    """Processes of one run.

    Attributes:
        members: by rank.
        store: where they meet.
    """

    members: tuple[subprocess.Popen[str], ...]
    store: TCPStore

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds while all processes live."""
        end = time.monotonic() + _LIMIT_SECONDS
        while not condition():
            ended = [member.args for member in self.members if member.poll() is not None]
            assert not ended, f"ended before: {[answer.err for answer in self.answers()]}"
            assert time.monotonic() < end, "what was waited for did not come"
            time.sleep(0.01)

    def answers(self) -> list[Answer]:
        """Wait for the end of all processes, by rank; one that hangs fails the test."""
        answers = []
        try:
            for member in self.members:
                out, err = member.communicate(timeout=_LIMIT_SECONDS)
                answers.append(Answer(member.returncode, out, err))
        finally:
            for member in self.members:
                member.kill()
                member.wait()
        return answers


def start_team(*arguments: object, folder: Path, count: int = 2) -> Team:
    """Start `loralab` as `count` processes of one run in `folder`, one thread each."""
    return _start([sys.executable, "-m", "loralab.cli", *map(str, arguments)], folder=folder, count=count)


def run_team(*arguments: object, folder: Path, count: int = 2) -> list[Answer]:
    """Run `loralab` as `count` processes to its end and return their answers, by rank."""
    return start_team(*arguments, folder=folder, count=count).answers()


def start_program(program: str, *, folder: Path, count: int = 2) -> Team:
    """Start Python source as `count` processes."""
    return _start([sys.executable, "-c", program], folder=folder, count=count)


def run_program(program: str, *, folder: Path, count: int = 2) -> list[Answer]:
    """Run Python source as `count` processes and return their answers, by rank."""
    return start_program(program, folder=folder, count=count).answers()


def _start(command: Sequence[str], *, folder: Path, count: int) -> Team:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        "NO_COLOR": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    return Team(
        tuple(
            subprocess.Popen(
                command,
                cwd=folder,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(count)
        ),
        store,
    )
