"""`loralab merge` as a user runs it."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

import loralab
from loralab.cli.merging import _describe
from support import tiny
from support.command import read_problems, run_here, start


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    base = tiny.save_base(folder / "base", "qwen2")
    rows = tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(8))
    patch = pytest.MonkeyPatch()
    patch.setattr("loralab.workflows.train.build_report", lambda _: None)
    sections = {"training": {"max_steps": 1}, "data": {"validation": 2}, "evaluation": {"split": "train"}}
    found = loralab.train(tiny.run_config(base, rows, folder / "run", **sections)).path
    patch.undo()
    return found


@pytest.fixture(autouse=True)
def no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector's walk over all that tests have loaded takes more time than a merge."""
    monkeypatch.setattr("loralab.workflows.merge.release_models", lambda: None)


def test_prints_a_few_lines_or_one_document(run: Path, tmp_path: Path) -> None:
    lines = run_here("merge", run, "--output", tmp_path / "merged")
    assert lines.code == 0, lines.err
    names = ["merged model", "onto", "dtype", "compared on", "logits", "KL", "greedy", "peak memory"]
    assert [line.partition(":")[0] for line in lines.out.splitlines()] == names
    assert str(tmp_path / "merged") in lines.out
    document = run_here("merge", run, "--output", tmp_path / "again", "--json", "--dtype", "float32", "--device", "cpu")
    content = json.loads(document.out)
    stored = json.loads((tmp_path / "again" / "merge.json").read_text())
    assert content == {"output": str(tmp_path / "again"), **stored}
    assert content["dtype_reason"] == "set in --dtype"


def test_adds_adapters_with_their_weights(run: Path, tmp_path: Path) -> None:
    other = f"{run / 'adapter'}=0.25"
    answer = run_here("merge", run, "--output", tmp_path / "sum", "--weight", 0.5, "--adapter", other, "--json")
    assert answer.code == 0, answer.err
    assert "one adapter is named 2 times" in answer.err
    assert "its weight is 0.75 in all" in answer.err
    assert [each["weight"] for each in json.loads(answer.out)["adapters"]] == [0.5, 0.25]


def test_ties_are_told_from_tokens_that_are_the_same() -> None:
    proof = {"rows": 2, "positions": 8, "max_logit_difference": 0.1, "relative_logit_difference": 0.1}
    proof |= {"kl_adapter_merged": 0.0, "kl_adapter_base": 0.1, "kl_trained_merged": None, "greedy_tokens": 200}
    content = {"onto": "", "dtype": "", "dtype_reason": "", "compared_on": "", "proof": proof}
    content |= {"peak_memory_bytes": {"writing": 0, "proof": 0}}
    for strict, words in ((1.0, ""), (0.985, " (98.50% strictly, the others are ties)")):
        proof |= {"greedy_agreement": 1.0, "greedy_agreement_strict": strict}
        assert f"greedy:       100.00% of 200 tokens the same{words}" in _describe(Path("out"), content)


@pytest.mark.parametrize("given", ["other", "other=much", "=0.5", "other=nan"])
def test_refuses_an_adapter_without_a_weight(run: Path, tmp_path: Path, given: str) -> None:
    (problem,) = read_problems(run_here("merge", run, "--output", tmp_path / "out", "--adapter", given))
    assert problem.what == f"not an adapter with its weight: {given!r}"


@pytest.mark.slow
def test_a_kill_leaves_nothing_and_the_next_merge_cleans_up(run: Path, tmp_path: Path) -> None:
    process = start("merge", run, "--output", "merged", folder=tmp_path)
    while process.poll() is None and not list(tmp_path.glob(".merged.merging-*")):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "merged").exists()
    assert [path.name for path in tmp_path.iterdir()] == [f".merged.merging-{process.pid}"]
    assert run_here("merge", run, "--output", tmp_path / "merged").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
