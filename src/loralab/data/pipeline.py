"""Rows to units, in order, in this process or in several.

Owns chunks, worker processes and the wording of row errors.
"""

import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Literal

from loralab.data.example import Example
from loralab.data.formats import FORMATS, RowError, rename_columns
from loralab.data.prompter import Prompter
from loralab.data.sources import Row
from loralab.data.tokenize import TokenizeSettings, Unit, tokenize_examples
from loralab.errors import DataError, WorkerError

CHUNK_ROWS = 256
# Below this many rows, starting processes costs more than they save.
ROWS_IN_PROCESS = 2048
_MAX_AUTO_WORKERS = 8
_CHUNKS_AHEAD = 4

RowUnits = tuple[int, list[Unit]]


@dataclass(frozen=True, slots=True)
class RowTokenizer:
    """Turns rows of one format into units.

    Attributes:
        prompter: the tokenizer with its template.
        format: name of the rows' format.
        columns: column of the data for each field of the format.
        settings: what decides on tokens.
        on_bad_row: "error" or "drop".
    """

    prompter: Prompter
    format: str
    columns: dict[str, str]
    settings: TokenizeSettings
    on_bad_row: Literal["error", "drop"]

    def __call__(self, rows: Sequence[Row]) -> list[RowUnits]:
        """Return number and units of each row.

        Raises:
            DataError: a bad row and `on_bad_row` is "error"; the message names it.
        """
        examples = [self._example(row) for row in rows]
        good = [(row, example) for row, example in zip(rows, examples, strict=True) if example is not None]
        units = iter(self._tokenize(good))
        return [
            (row.number, [Unit(dropped="bad_row")] if example is None else next(units))
            for row, example in zip(rows, examples, strict=True)
        ]

    def _example(self, row: Row) -> Example | None:
        try:
            form = FORMATS[self.format]
            return form.build(rename_columns(row.fields, self.columns, required=form.required))
        except RowError as error:
            if self.on_bad_row == "drop":
                return None
            raise DataError(
                str(error), where=row.describe(), fix="mend the row, map data.columns, or set data.on_bad_row: drop"
            ) from None

    def _tokenize(self, good: Sequence[tuple[Row, Example]]) -> list[list[Unit]]:
        examples = [example for _, example in good]
        try:
            return list(tokenize_examples(examples, prompter=self.prompter, settings=self.settings))
        except DataError as error:
            # Again one by one, to name the row: the common case stays one tokenizer call.
            for row, example in good:
                try:
                    list(tokenize_examples([example], prompter=self.prompter, settings=self.settings))
                except DataError as single:
                    problem = single.problems[0]
                    raise DataError(
                        problem.what, where=f"{row.describe()}, {problem.where}", fix=problem.fix
                    ) from error
            raise


def tokenize_rows(
    rows: Iterable[Row], tokenizer: RowTokenizer, *, workers: int | Literal["auto"]
) -> Iterator[RowUnits]:
    """Yield number and units of every row, in order.

    Args:
        rows: read as they are needed.
        tokenizer: what to do with them.
        workers: processes; 0 stays in this one, "auto" starts them once there are many rows.
    """
    iterator = iter(rows)
    if workers == "auto":
        for chunk in _chunks(itertools.islice(iterator, ROWS_IN_PROCESS)):
            yield from tokenizer(chunk)
        workers = _auto_workers()
    if workers > 1 or (workers == 1 and sys.platform != "linux"):
        yield from _tokenize_in_processes(iterator, tokenizer, workers)
        return
    for chunk in _chunks(iterator):
        yield from tokenizer(chunk)


def _auto_workers() -> int:
    # Only Linux forks cheaply and safely here; elsewhere a new process imports everything anew.
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 0
    return min(len(os.sched_getaffinity(0)), _MAX_AUTO_WORKERS)


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while chunk := list(itertools.islice(rows, CHUNK_ROWS)):
        yield chunk


_worker_tokenizer: RowTokenizer | None = None


def _install(tokenizer: RowTokenizer) -> None:
    global _worker_tokenizer  # noqa: PLW0603 - set once, when the worker process starts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_tokenizer = tokenizer


def _end_with_parent() -> None:
    """Wait for the end of the parent process and end this one, which would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _tokenize_chunk(chunk: list[Row]) -> list[RowUnits]:
    if _worker_tokenizer is None:
        raise RuntimeError("worker process was not installed")
    return _worker_tokenizer(chunk)


def _tokenize_in_processes(rows: Iterator[Row], tokenizer: RowTokenizer, workers: int) -> Iterator[RowUnits]:
    first = next(_chunks(rows), None)
    if first is None:
        return
    done = 0
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_install, initargs=(tokenizer,)) as pool:
        try:
            for finished in _results(pool, itertools.chain([first], _chunks(rows)), workers * _CHUNKS_AHEAD):
                done += len(finished)
                yield from finished
        except BrokenProcessPool as error:
            raise _worker_died(first[0], done, workers) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _results(pool: ProcessPoolExecutor, chunks: Iterable[list[Row]], ahead: int) -> Iterator[list[RowUnits]]:
    pending: deque[Future[list[RowUnits]]] = deque()
    for chunk in chunks:
        pending.append(pool.submit(_tokenize_chunk, chunk))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _worker_died(first: Row, done: int, workers: int) -> WorkerError:
    return WorkerError(
        f"one of {workers} worker processes that tokenize was killed, most often because memory ran out",
        where=f"{first.source}, after row {first.number - 1 + done}",
        fix="set data.num_workers: 0 (or fewer than now), or give the machine more memory",
    )
