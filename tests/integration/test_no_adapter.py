"""A run without an adapter: every command that needs one says how far the run came and what to do."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import loralab
from loralab.errors import StoppedBySignal
from support import tiny
from support.command import read_problems, run_here
from support.reporters import StopAt

COMMANDS = {
    "eval": (),
    "compare": (),
    "generate": ("--prompt", "a"),
    "merge": ("--output", "OUT/merged"),
    "export": ("--to", "vllm", "--output", "OUT/exported"),
}
_HOLD = """
import sys
from pathlib import Path
from loralab.run import RunFolder
from loralab.workflows.output import claim_output
with claim_output(RunFolder(Path(sys.argv[1])), resume=True, overwrite=False):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("no adapter")  # a blank in the path of what is to be typed
    rows = tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(16))
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    config = tiny.run_config(tiny.save_base(folder / "base"), rows, folder / "run", training=steps)
    with pytest.raises(StoppedBySignal):
        loralab.train(config, reporter=StopAt(2))
    return folder / "run"


@pytest.fixture
def held(stopped: Path) -> Iterator[int]:
    """Let another process hold the run's lock."""
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(stopped)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "held\n"
        yield process.pid
        process.stdin.close()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_stopped_run_is_to_be_finished(stopped: Path, tmp_path: Path, command: str) -> None:
    options = [each.replace("OUT", str(tmp_path)) for each in COMMANDS[command]]
    problem = read_problems(run_here(command, stopped, *options))[0]
    assert problem.what == f"the run {str(stopped)!r} (interrupted) has no adapter: it was left at step 2"
    assert problem.where == "argument RUN"
    assert problem.fix == f"finish it: loralab train '{stopped}/config.yaml' --resume"
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_checkpoint_is_to_be_trained_again(stopped: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(stopped, tmp_path / "bare")
    shutil.rmtree(bare / "checkpoints")
    problem = read_problems(run_here("eval", bare))[0]
    assert "has no adapter: it has no checkpoint either" in problem.what
    assert problem.fix.startswith("train it again: loralab train ")
    assert problem.fix.endswith("--overwrite")


def test_a_run_under_way_is_to_be_waited_for(stopped: Path, held: int) -> None:
    for command in ("eval", "push"):
        problem = read_problems(run_here(command, stopped))[0]
        assert f"process {held} is at work there" in problem.what
        assert problem.fix.startswith("wait until it has ended")


def test_a_push_of_a_stopped_run_says_how_to_finish_it(stopped: Path) -> None:
    problem = read_problems(run_here("push", stopped))[0]
    assert "the run is not complete (interrupted): its adapter is not final" in problem.what
    assert f"loralab train '{stopped}/config.yaml' --resume" in problem.fix
