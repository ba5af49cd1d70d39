"""Rows to units, in order, in this process or in several.

Owns chunks, worker processes and the wording of row errors.
"""

import gc
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
from typing import Literal, TypeAlias

from loralab.data.example import Example
from loralab.data.formats.fields import RowError
from loralab.data.formats.table import build_example
from loralab.data.images.files import ImageFolder
from loralab.data.prompts.prompter import Prompter
from loralab.data.reading.json_rows import parse_row
from loralab.data.reading.rows import JsonLine, Row, UnparsedRow
from loralab.data.reading.sources import Source
from loralab.data.tokens.packing import PackedRows, RowUnits, pack_rows
from loralab.data.tokens.tokenize import TokenizeSettings, Unit, tokenize_examples
from loralab.errors import DataError, MaskError, TemplateError, WorkerError

# A chunk is what a process gets at a time: at most so many rows and, more or less, bytes.
CHUNK_ROWS, CHUNK_BYTES = 256, 2**20
# Below this many rows, starting processes costs more than they save.
ROWS_IN_PROCESS = 2048
_MAX_AUTO_WORKERS = 8
_CHUNKS_AHEAD = 4

# Number of the source, and rows of it.
Chunk: TypeAlias = tuple[int, list[UnparsedRow]]
PackedChunk: TypeAlias = tuple[int, PackedRows]


@dataclass(frozen=True, slots=True)
class RowTokenizer:
    """Turns rows of one format into units.

    Attributes:
        prompter: the tokenizer with its template.
        format: name of the rows' format.
        columns: column of the data for each field of the format.
        settings: what decides on tokens.
        on_bad_row: "error" or "drop".
        images: where the pictures of these rows lie.
    """

    prompter: Prompter
    format: str
    columns: dict[str, str]
    settings: TokenizeSettings
    on_bad_row: Literal["error", "drop"]
    images: ImageFolder

    def __call__(self, rows: Sequence[UnparsedRow]) -> list[RowUnits]:
        """Return number and units of each row.

        Raises:
            DataError: a row cannot be read; or it is bad and `on_bad_row` is "error". The message names it.
            MaskError: what would carry loss is not the answer.
        """
        parsed = [parse_row(row) for row in rows]
        examples = [self._example(row) for row in parsed]
        good = [(row, example) for row, example in zip(parsed, examples, strict=True) if example is not None]
        units = iter(self._tokenize(good))
        return [
            (row.number, [Unit(dropped="bad_row")] if example is None else next(units))
            for row, example in zip(parsed, examples, strict=True)
        ]

    def explain(self, unparsed: UnparsedRow) -> str:
        """Return what is wrong with a row that was dropped, in words."""
        try:
            row = parse_row(unparsed)
            example = self.images.open_all(build_example(self.format, row.fields, self.columns))
            list(tokenize_examples([example], prompter=self.prompter, settings=self.settings))
        except RowError as error:
            return str(error)
        except (DataError, MaskError) as error:
            return error.problems[0].what
        return "nothing is wrong with it any more"

    def _example(self, row: Row) -> Example | None:
        try:
            return self.images.open_all(build_example(self.format, row.fields, self.columns))
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
        except (DataError, MaskError):
            # Again one by one, to name the row: the common case stays one tokenizer call.
            return [self._tokenize_one(row, example) for row, example in good]

    def _tokenize_one(self, row: Row, example: Example) -> list[Unit]:
        try:
            (units,) = tokenize_examples([example], prompter=self.prompter, settings=self.settings)
            return units
        except (DataError, MaskError) as error:
            # Not what another setting refuses, and never a proof that failed.
            if self.on_bad_row == "drop" and isinstance(error, TemplateError):
                return [Unit(dropped="template_refused")]
            problem = error.problems[0]
            where = f"{row.describe()}, {problem.where}"
            raise type(error)(problem.what, where=where, fix=problem.fix) from error


class RowPipeline:
    """Tokenizes the rows of several sources, each with its own tokenizer of rows.

    Args:
        sources: read as their rows are needed.
        tokenizers: one for each source.
        workers: processes; 0 stays in this one, "auto" starts them once there are many rows.

    Attributes:
        processes: how many processes tokenize, as far as is known by now.
    """

    def __init__(
        self, sources: Sequence[Source], tokenizers: Sequence[RowTokenizer], *, workers: int | Literal["auto"]
    ) -> None:
        self.processes = 1
        self._sources = sources
        self._tokenizers = list(tokenizers)
        self._workers = workers

    def run(self, *, source: int = 0, row: int = 0) -> Iterator[PackedChunk]:
        """Yield the units of all rows, in order: number of the source, and units of some of its rows.

        Args:
            source: number of the source to begin with.
            row: rows of it to leave out.
        """
        chunks = self._chunks(source, row)
        workers = self._workers
        if workers == "auto":
            done = 0
            while done < ROWS_IN_PROCESS and (chunk := next(chunks, None)) is not None:
                done += len(chunk[1])
                yield _tokenize(self._tokenizers, chunk)
            workers = _auto_workers()
        if workers > 1 or (workers == 1 and sys.platform != "linux"):
            first = next(chunks, None)
            if first is not None:
                self.processes = workers
                yield from self._run_processes(first, chunks, workers)
            return
        for chunk in chunks:
            yield _tokenize(self._tokenizers, chunk)

    def _chunks(self, first: int, row: int) -> Iterator[Chunk]:
        for index in range(first, len(self._sources)):
            rows = self._sources[index].unparsed(row if index == first else 0)
            for chunk in chunked(rows):
                yield index, chunk

    def _run_processes(self, first: Chunk, rest: Iterator[Chunk], workers: int) -> Iterator[PackedChunk]:
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        chunks = itertools.chain([first], rest)
        place = f"{self._sources[first[0]].name}, from row {first[1][0].number} on"
        with ProcessPoolExecutor(
            workers, mp_context=context, initializer=_install, initargs=(self._tokenizers,)
        ) as pool:
            try:
                for (index, rows), packed in _results(pool, chunks, workers * _CHUNKS_AHEAD):
                    place = f"{self._sources[index].name}, after row {rows[-1].number}"
                    yield index, packed
            except BrokenProcessPool as error:
                raise _worker_died(place, workers) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def chunked(rows: Iterable[UnparsedRow]) -> Iterator[list[UnparsedRow]]:
    """Yield rows in lists of at most `CHUNK_ROWS` rows and hardly more than `CHUNK_BYTES` bytes."""
    chunk: list[UnparsedRow] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += len(row.raw) if isinstance(row, JsonLine) else _size(row.fields)
        if len(chunk) >= CHUNK_ROWS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _size(value: object) -> int:
    """Return about how much text there is in a field."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, list | tuple):
        return sum(map(_size, value)) if value and isinstance(value[0], str | list | dict) else 8 * len(value)
    return sum(map(_size, value.values())) if isinstance(value, dict) else 8


def _auto_workers() -> int:
    # Only Linux forks cheaply and safely here; elsewhere a new process imports everything anew.
    if sys.platform != "linux" or multiprocessing.current_process().daemon:
        return 0
    return min(len(os.sched_getaffinity(0)), _MAX_AUTO_WORKERS)


def _tokenize(tokenizers: Sequence[RowTokenizer], chunk: Chunk) -> PackedChunk:
    index, rows = chunk
    return index, pack_rows(tokenizers[index](rows))


_worker_tokenizers: list[RowTokenizer] | None = None


def _install(tokenizers: list[RowTokenizer]) -> None:
    global _worker_tokenizers  # noqa: PLW0603 - set once, when the worker process starts
    gc.freeze()  # looking for garbage in what came from the parent would copy that memory, page by page
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_tokenizers = tokenizers


def _end_with_parent() -> None:
    """Wait for the end of the parent process and end this one, which would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _tokenize_chunk(chunk: Chunk) -> PackedChunk:
    if _worker_tokenizers is None:
        raise RuntimeError("worker process was not installed")
    return _tokenize(_worker_tokenizers, chunk)


def _results(pool: ProcessPoolExecutor, chunks: Iterable[Chunk], ahead: int) -> Iterator[tuple[Chunk, PackedRows]]:
    pending: deque[tuple[Chunk, Future[PackedChunk]]] = deque()
    for chunk in chunks:
        pending.append((chunk, pool.submit(_tokenize_chunk, chunk)))
        if len(pending) > ahead:
            done, future = pending.popleft()
            yield done, future.result()[1]
    while pending:
        done, future = pending.popleft()
        yield done, future.result()[1]


def _worker_died(place: str, workers: int) -> WorkerError:
    return WorkerError(
        f"one of {workers} worker processes that tokenize was killed, most often because memory ran out",
        where=place,
        fix="set data.num_workers: 0 (or fewer than now), or give the machine more memory",
    )
