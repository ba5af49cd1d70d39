"""The commands about data as a user runs them."""

import json
from pathlib import Path

from support import tiny
from support.command import read_problems, run_here, write_config


def test_prepare_writes_what_train_takes(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    rows = tiny.write_rows(tmp_path / "rows.json", tiny.alpaca_rows(20))
    config = tiny.run_config(base, rows, tmp_path / "run", data={"validation": 5})
    file = write_config(tmp_path / "config.yaml", config)
    command = ["prepare", file, "--output", tmp_path / "tokens"]

    written = run_here(*command, "--json")

    assert written.code == 0, written.err
    result = json.loads(written.out)
    assert result["path"] == str(tmp_path / "tokens")
    assert {name: split["rows"] for name, split in result["splits"].items()} == {"train": 15, "validation": 5}
    (problem,) = read_problems(run_here(*command))
    assert (problem.where, problem.fix) == ("option --output", "replace it with --overwrite")
    again = run_here(*command, "--overwrite")
    assert again.code == 0, again.err
    assert again.out.endswith(f"{tmp_path / 'tokens'}\n")
    assert f"train on it with data.train={tmp_path / 'tokens'} data.validation=validation data.max_length=" in again.err
    for name, split in result["splits"].items():
        (line,) = [line for line in again.out.splitlines() if name in line and "tokens" not in line]
        assert all(f"{number:,}" in line for number in split.values())
    trained = run_here("train", file, f"data.train={tmp_path / 'tokens'}", "data.validation=validation")
    assert trained.code == 0, trained.err
    record = json.loads((tmp_path / "run" / "data.json").read_text(encoding="utf-8"))
    found = {name: split["supervised_tokens"] for name, split in record["splits"].items()}
    assert found == {name: split["supervised_tokens"] for name, split in result["splits"].items()}
