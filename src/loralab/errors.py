"""The exception tree: every error that loralab raises on purpose.

    LoralabError
      UserError              exit 2: the user can mend it
        ConfigError            a value, key or combination in the configuration
        DataError              a file, row or split that cannot be used
          TemplateError          a prompt template that refuses a conversation, or that training cannot use
        ModelError             a base model, tokenizer or adapter that cannot be loaded
        HubError               the Hub refuses, lacks what was named, or cannot be reached
        RunFolderError         an output folder in the way, or not a run folder
        JudgingError           a vote, rater or set of items that cannot be used
        StorageError           a disk that is full or not writable
        WorkerError            a worker process that died
        OutOfMemoryError       not even one example fits into the accelerator
        TrainingDivergedError  a loss that is not finite
      ProofError             exit 3: a proof failed
        MaskError              what would carry loss is not the answer
        PromptContractError    the prompt is not the one that the adapter was trained on
        DeadAdapterError       something that is said to be trained is not
        AdapterIntegrityError  the adapter's tensors are not those that were saved
        MergeParityError       the merged model does not answer as the adapter does
      StoppedBySignal        exit 128 + signal: stopped on request

Owns the form of a message (what, where, fix); printing it is the CLI's.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake, in the three lines that a user reads.

    Attributes:
        what: what is wrong, with the value that was got.
        where: file and line, key, or row.
        fix: what to do about it.
    """

    what: str
    where: str
    fix: str

    def render(self) -> str:
        """Return the three lines."""
        return f"error: {self.what}\nwhere: {self.where}\nfix:   {self.fix}"


class LoralabError(Exception):
    """Root of all errors raised on purpose; carries one problem or several.

    Args:
        what: what is wrong, with the value that was got.
        where: file and line, key, or row.
        fix: what to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str, fix: str) -> None:
        self.problems: tuple[Problem, ...] = (Problem(what, where, fix),)
        super().__init__(what)

    @classmethod
    def from_problems(cls, problems: Sequence[Problem]) -> "LoralabError":
        """Build one error that reports all `problems`; at least one is needed."""
        first = problems[0]
        error = cls(first.what, where=first.where, fix=first.fix)
        error.problems = tuple(problems)
        return error

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.problems, self.exit_code)  # errors cross from worker processes

    def __str__(self) -> str:
        return "\n\n".join(problem.render() for problem in self.problems)


def _rebuild(kind: type[LoralabError], problems: tuple[Problem, ...], exit_code: int) -> LoralabError:
    error = kind.__new__(kind)
    Exception.__init__(error, problems[0].what)
    error.problems, error.exit_code = problems, exit_code
    return error


class UserError(LoralabError):
    """A mistake that the user can mend."""

    exit_code = 2


class ConfigError(UserError):
    """A value, key or combination in the configuration that cannot be used."""


class DataError(UserError):
    """A file, row or split that cannot be used."""


class TemplateError(DataError):
    """A prompt template that refuses a conversation, or that training cannot use."""


class ModelError(UserError):
    """A base model, tokenizer or adapter that cannot be loaded or used."""


class HubError(UserError):
    """The Hub refuses, does not have what was named, or cannot be reached."""


class RunFolderError(UserError):
    """An output folder that is in the way, or a folder that is no run folder."""


class JudgingError(UserError):
    """A vote, a rater or a set of items of a preference test that cannot be used."""


class StorageError(UserError):
    """A disk that is full or a folder that cannot be written."""


class WorkerError(UserError):
    """A worker process that died, as when the system ran out of memory and killed it."""


class OutOfMemoryError(UserError):
    """Not even one example fits into the accelerator's memory."""


class TrainingDivergedError(UserError):
    """A training loss that is not a finite number."""


class ProofError(LoralabError):
    """A proof failed: what was promised does not hold."""

    exit_code = 3


class MaskError(ProofError):
    """What would carry loss is not the answer, or the prompt is not what serving sends."""


class PromptContractError(ProofError):
    """The prompt that would be sent is not the one that the adapter was trained on."""


class DeadAdapterError(ProofError):
    """Tensors that are said to be trained have no gradient."""


class AdapterIntegrityError(ProofError):
    """The tensors of an adapter are not those that were saved, or are no numbers."""


class MergeParityError(ProofError):
    """A merged model does not answer as the live adapter does."""


class StoppedBySignal(LoralabError):
    """The run was asked to stop and did, after what it says in `fix`.

    Args:
        signal_number: the signal that asked (2 = SIGINT, 15 = SIGTERM).
        where: the run folder, or the stage that was under way.
        fix: how to go on.
    """

    def __init__(self, signal_number: int, *, where: str, fix: str) -> None:
        self.exit_code = 128 + signal_number
        name = signal.Signals(signal_number).name
        super().__init__(f"stopped by {name}", where=where, fix=fix)


def excerpt(error: BaseException, characters: int = 240) -> str:
    """Return what another library's error says, on one line and cut to `characters`."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= characters else f"{text[: characters - 3]}..."
