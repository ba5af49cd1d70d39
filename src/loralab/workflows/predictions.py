"""Every prompt with what both sides made of it, one JSON object a line."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loralab.errors import StorageError
from loralab.run import finite_json, replacing
from loralab.workflows.split_evaluation import SplitEvaluation


def write_predictions(path: Path, result: SplitEvaluation) -> None:
    """Write the predictions of an evaluation; a file of an earlier one goes where there are none.

    Raises:
        StorageError: the file cannot be written.
    """
    if result.adapter is None or result.adapter.way is None:
        path.unlink(missing_ok=True)
        return
    write_lines(path, result.predictions())


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, in one step (UTF-8); numbers that JSON does not have become null.

    Raises:
        StorageError: the file cannot be written.
    """
    try:
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
            for row in rows:
                stream.write(json.dumps(finite_json(row), ensure_ascii=False) + "\n")
    except OSError as error:
        raise StorageError(
            f"cannot write {str(path)!r}: {error.strerror}", where="predictions", fix="free space, or name another file"
        ) from error
