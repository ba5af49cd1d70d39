"""A disk that gets full while adapter files, a merged model or an export are written: three lines, nothing left."""

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import loralab
from loralab.workflows.adapter_folder import save_prompting
from support import tiny
from support.command import Answer, read_problems
from unit.data.prompters import build_prompter

resource = pytest.importorskip("resource", reason="no limit of a file's size on this system")

# The limit of a file's size stands for the disk; the program's own files are below it.
_PROGRAM = """
import resource, sys
from loralab.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.argv[:2] = ["loralab"]
main()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    rows = tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(12))
    base = tiny.save_base(folder / "base")
    return loralab.train(tiny.run_config(base, rows, folder / "run", training={"max_steps": 1})).path


@contextlib.contextmanager
def limited(count: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "command",
    [("merge", "--output"), ("export", "--to", "ollama", "--output"), ("export", "--to", "vllm", "--output")],
    ids=lambda command: " ".join(command[:3:2]),
)
def test_a_file_that_does_not_fit(run: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    name, *options = command
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, "15000", name, str(run), *options, str(tmp_path / "out")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    problem = read_problems(Answer(done.returncode, done.stdout, done.stderr))[0]
    assert problem.what.endswith(f": {os.strerror(errno.EFBIG)}")
    assert problem.where == "option --output"
    assert problem.fix.endswith("nothing was kept")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_does_not_fit_is_an_error_of_the_system(tmp_path: Path) -> None:
    with limited(1000), pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as caught:
        save_prompting(tmp_path, build_prompter())
    assert caught.value.errno == errno.EFBIG
