"""A report that cannot be written."""

import errno
import os
from pathlib import Path

import pytest

from loralab.errors import StorageError
from loralab.run import RunFolder
from loralab.workflows import report
from loralab.workflows.report import build_report


def fail_with(number: int, monkeypatch: pytest.MonkeyPatch, folder: Path) -> RunFolder:
    def refuse(_: RunFolder) -> None:
        raise OSError(number, os.strerror(number), str(folder / "plots"))

    monkeypatch.setattr(report, "write_plots", refuse)
    return RunFolder(folder)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_read_only_run_folder(number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught:
        build_report(fail_with(number, monkeypatch, tmp_path))
    (problem,) = caught.value.problems
    assert problem.what == f"cannot write the report: {os.strerror(number)}"
    assert problem.where == str(tmp_path / "plots")
    assert "copy it" in problem.fix


def test_full_disk_is_the_runs_to_explain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space"):
        build_report(fail_with(errno.ENOSPC, monkeypatch, tmp_path))
