"""What a sweep refuses before anything is written."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loralab.errors import ConfigError, StorageError
from loralab.progress import Reporter
from loralab.workflows.configure import load_run_config
from loralab.workflows.sweep import Search, _own_name, sweep
from support import tiny
from support.command import write_config


def config(folder: Path, **sections: dict[str, Any]) -> Path:
    rows = tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(8))
    values = tiny.run_config(folder / "base", rows, folder / "none", **({"data": {"validation": 2}} | sections))
    return write_config(folder / "tiny.yaml", values | {"output": {}})


def refuse(folder: Path, search: Search) -> str:
    with pytest.raises(ConfigError) as caught:
        sweep(search, reporter=Reporter())
    assert not (folder / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ("lora.r=4,zero", "run 002 (lora.r=zero)"),
        ("lora.rnak=4,8", "unknown key: 'lora.rnak'"),
        ("data.validation=2,4", "data.validation cannot vary"),
        ("output.dir=a,b", "output.dir cannot vary"),
        ("lora.r=4,8,4.0", "run 003 (lora.r=4.0) is the same as run 001 (lora.r=4)"),
        ("data.train=a.json,b.json", "measured on different rows"),
    ],
)
def test_a_point_that_cannot_be_trained(grid: str, words: str, tmp_path: Path) -> None:
    assert words in refuse(tmp_path, Search(config(tmp_path), [grid], output=tmp_path / "out"))


def test_runs_do_not_push_to_one_repository(tmp_path: Path) -> None:
    for repo in ("me/price", "{user}/price-{timestamp}"):
        search = Search(config(tmp_path), ["lora.r=4,8"], [f"output.hub.repo={repo}"], output=tmp_path / "out")
        assert "one repository" in refuse(tmp_path, search)


def test_a_sweep_is_no_process_of_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one of 2 processes" in refuse(tmp_path, Search(config(tmp_path), ["lora.r=4,8"], output=tmp_path / "out"))


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot make"):
        sweep(Search(config(tmp_path), ["lora.r=4,8"], output=tmp_path / "file"), reporter=Reporter())


def test_the_validation_split_decides(tmp_path: Path) -> None:
    search = Search(config(tmp_path, data={"validation": None}), ["lora.r=4,8"], output=tmp_path / "out")
    assert "there is none" in refuse(tmp_path, search)
    data = {"validation": 2, "test": 2}
    on_test = config(tmp_path, data=data, evaluation={"split": "test"})
    assert "must not choose by it" in refuse(tmp_path, Search(on_test, ["lora.r=4,8"], output=tmp_path / "out"))


@pytest.mark.parametrize(
    ("metric", "words"),
    [("rougeL", "evaluation.metrics=[rouge]"), ("eval_los", "did you mean 'eval_loss'"), ("loss", "no such figure")],
)
def test_the_metric_must_be_measured(metric: str, words: str, tmp_path: Path) -> None:
    search = Search(config(tmp_path), ["lora.r=4,8"], metric=metric, output=tmp_path / "out")
    assert words in refuse(tmp_path, search)


def test_a_metric_that_does_not_exist_is_named_whole(tmp_path: Path) -> None:
    asked = config(tmp_path, evaluation={"metrics": ["exact_match", "rouge"]})
    words = refuse(tmp_path, Search(asked, ["lora.r=4,8"], metric="eval_lss", output=tmp_path / "out"))
    assert "no such figure: 'eval_lss'" in words
    assert "did you mean 'eval_loss'? known: eval_loss, perplexity, token_accuracy, exact_match, rouge1," in words


def test_values_in_brackets_are_written_without(tmp_path: Path) -> None:
    words = refuse(tmp_path, Search(config(tmp_path), ["lora.r=[4, 8]"], output=tmp_path / "out"))
    assert "fix:   write lora.r=4,8" in words


def test_the_configuration_of_a_run_is_called_as_the_run(tmp_path: Path) -> None:
    file = tmp_path / "price" / "config.yaml"
    file.parent.mkdir()
    assert _own_name(file, load_run_config(config(tmp_path), [])) == "tiny"
    file.write_text(config(tmp_path).read_text())
    assert _own_name(file, load_run_config(file, [])) == "price"


def test_the_process_of_a_sweep_holds_no_torch() -> None:
    """The memory of a run is that of its own process; the sweep's beside it stays small."""
    program = "import sys, loralab.workflows.sweep; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
