"""The exception tree: exit codes, the three lines, several problems, the way through a process."""

import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest

from loralab.errors import (
    AdapterIntegrityError,
    ConfigError,
    DataError,
    DeadAdapterError,
    HubError,
    JudgingError,
    LoralabError,
    MaskError,
    MergeParityError,
    ModelError,
    OutOfMemoryError,
    Problem,
    PromptContractError,
    ProofError,
    RunFolderError,
    StoppedBySignal,
    StorageError,
    TemplateError,
    TrainingDivergedError,
    UserError,
    WorkerError,
)

EXIT_CODES = {
    LoralabError: 1,
    UserError: 2,
    ConfigError: 2,
    DataError: 2,
    ModelError: 2,
    HubError: 2,
    JudgingError: 2,
    RunFolderError: 2,
    StorageError: 2,
    TrainingDivergedError: 2,
    WorkerError: 2,
    OutOfMemoryError: 2,
    ProofError: 3,
    TemplateError: 2,
    MaskError: 3,
    PromptContractError: 3,
    DeadAdapterError: 3,
    AdapterIntegrityError: 3,
    MergeParityError: 3,
}
THREE_LINES = "error: what 7\nwhere: there\nfix:   so"


def _classes(root: type[LoralabError] = LoralabError) -> set[type[LoralabError]]:
    return {root}.union(*(_classes(child) for child in root.__subclasses__()))


def test_every_class_has_an_exit_code_here() -> None:
    assert _classes() == {*EXIT_CODES, StoppedBySignal}


@pytest.mark.parametrize(("kind", "code"), EXIT_CODES.items())
def test_class_has_exit_code_and_renders_three_lines(kind: type[LoralabError], code: int) -> None:
    error = kind("what 7", where="there", fix="so")
    assert error.exit_code == code
    assert str(error) == THREE_LINES
    assert issubclass(kind, UserError) == (code == 2)
    assert issubclass(kind, ProofError) == (code == 3)


@pytest.mark.parametrize(("number", "code", "name"), [(2, 130, "SIGINT"), (15, 143, "SIGTERM")])
def test_stop_by_signal_has_the_shell_exit_code(number: int, code: int, name: str) -> None:
    error = StoppedBySignal(number, where="runs/a", fix="--resume")
    assert error.exit_code == code
    assert str(error) == f"error: stopped by {name}\nwhere: runs/a\nfix:   --resume"
    assert not isinstance(error, UserError | ProofError)


def test_several_problems_are_rendered_apart() -> None:
    problems = [Problem("a", "b", "c"), Problem("d", "e", "f")]
    error = ConfigError.from_problems(problems)
    assert isinstance(error, ConfigError)
    assert error.problems == tuple(problems)
    assert str(error) == "error: a\nwhere: b\nfix:   c\n\nerror: d\nwhere: e\nfix:   f"


@pytest.mark.parametrize("kind", EXIT_CODES)
def test_pickling_keeps_class_and_all_problems(kind: type[LoralabError]) -> None:
    error = kind.from_problems([Problem("a", "b", "c"), Problem("d", "e", "f")])
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert copy.problems == error.problems
    assert copy.exit_code == error.exit_code


def _fail() -> None:
    raise DataError.from_problems([Problem("a", "b", "c"), Problem("d", "e", "f")])


def test_error_crosses_from_a_worker_process() -> None:
    with (
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool,
        pytest.raises(DataError) as caught,
    ):
        pool.submit(_fail).result()
    assert [problem.what for problem in caught.value.problems] == ["a", "d"]
