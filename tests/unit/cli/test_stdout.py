"""With `--json` stdout holds one JSON document, whatever libraries print."""

import json
from pathlib import Path

import pytest

from loralab.run import RunFolder
from support.command import run_here, write_config


def test_what_a_library_prints_goes_to_stderr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run")

    def train(*_: object, **__: object) -> RunFolder:
        print("[WARNING] as deepspeed does when it is imported")
        folder.path.mkdir()
        folder.record.write_text('{"status": "completed"}')
        return folder

    monkeypatch.setattr("loralab.workflows.train.train", train)
    config = write_config(tmp_path / "config.yaml", {"model": {"name": "base"}, "data": {"train": "rows.json"}})
    answer = run_here("train", config, "--json")
    assert answer.code == 0, answer.err
    assert json.loads(answer.out) == {"status": "completed"}
    assert "as deepspeed does" in answer.err
