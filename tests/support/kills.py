"""`loralab train`, killed where a test wants it: with SIGKILL, in a process of its own.

Owns where kills fall. The process notes what it enters and a second thread of it kills it, so that
what it was doing in that moment is known exactly.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# Function: what the run is doing in it. The innermost that is named here counts.
PHASES: Mapping[str, str] = {
    "prepare_run": "start-up",
    "_begin_record": "first files",
    "_save_checkpoint": "save",
    "on_save": "save",
    "measure": "evaluation",
    "training_step": "step",
    "run_steps": "between steps",
    "save_adapter": "adapter",
    "evaluate_at_end": "final evaluation",
    "find_start": "finding the checkpoint",
    "_finish_record": "end",
    "build_report": "report",
}
# Where the harness aims; the rest is hit in passing.
AIMS = (
    *("step", "save", "evaluation", "between steps") * 2,
    *("start-up", "first files", "adapter", "final evaluation"),
)
_PROGRAM = """
import json, os, pathlib, signal, sys, threading, time
phases, aim, occurrence, delay, note = json.loads(sys.argv[1])
inside, seen, armed = [], 0, threading.Event()

def follow(frame, event, _):
    # Told of calls by the main thread itself: another thread must not walk a running thread's frames.
    global seen
    if event not in ("call", "return"):
        return
    where = phases.get(frame.f_code.co_name)
    if where is None:
        return
    if event == "return":
        if inside:
            inside.pop()
        return
    inside.append(where)
    if where == aim:
        seen += 1
        if seen >= occurrence:
            armed.set()

def kill():
    armed.wait()
    time.sleep(delay)
    pathlib.Path(note).write_text(inside[-1] if inside else "between stages")
    os.kill(os.getpid(), signal.SIGKILL)

sys.setswitchinterval(0.0002)
threading.Thread(target=kill, daemon=True).start()
sys.argv = ["loralab", *sys.argv[2:]]
from loralab.cli import main
sys.setprofile(follow)
main()
"""


@dataclass(frozen=True)
class Kill:
    """Where a process is to be killed.

    Attributes:
        aim: a value of `PHASES`.
        occurrence: at which entry into it, from 1; a run that enters it less often is not killed.
        delay: seconds after that.
    """

    aim: str
    occurrence: int
    delay: float

    @classmethod
    def draw(cls, source: random.Random) -> "Kill":
        """Draw a place."""
        aim = source.choice(AIMS)
        many = {"step": 14, "save": 5, "between steps": 14, "evaluation": 3}
        long = {"start-up": 0.8, "final evaluation": 0.2, "first files": 0.02}
        return cls(aim, source.randint(1, many.get(aim, 1)), source.uniform(0, long.get(aim, 0.01)))


def train_until_killed(kill: Kill, *arguments: object, folder: Path) -> str | None:
    """Run `loralab train` until it is killed.

    Returns:
        What it was doing when it was killed, or None where it came to its end before.
    """
    note = folder / ".killed-in"
    note.unlink(missing_ok=True)
    plan = json.dumps([PHASES, kill.aim, kill.occurrence, kill.delay, str(note)])
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, plan, "train", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return None
    assert done.returncode == -9, f"exit code {done.returncode}:\n{done.stderr}"
    return note.read_text(encoding="utf-8")


def train_through(kills: Sequence[Kill], *arguments: object, run: Path, folder: Path) -> list[str]:
    """Train with one kill after another, each time resumed, and leave the run as the last kill did.

    A run that was killed before its folder was there has nothing to resume and is started again.

    Returns:
        Where the kills fell.
    """
    fell = []
    for kill in kills:
        options = ["--resume"] if run.exists() else []
        where = train_until_killed(kill, *arguments, *options, folder=folder)
        if where is None:
            break
        fell.append(where)
    return fell
