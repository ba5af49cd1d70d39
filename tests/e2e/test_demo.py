"""The demo's claim: the adapter answers held-out questions that the base model cannot."""

import json
from pathlib import Path

import pytest

import loralab
from loralab.errors import RunFolderError
from loralab.progress import Reporter
from loralab.workflows.demo import run_demo
from support import tiny
from support.demo import right_answers, run_demo_command

# Seen: base 0, adapter 90 of 100. The margin leaves room for other processors' rounding.
LEAST_BY_ADAPTER, MOST_BY_BASE = 70, 10


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("demo") / "run"
    return output, run_demo_command(output)


def test_adapter_answers_what_the_base_cannot(demo: tuple[Path, str]) -> None:
    output, said = demo
    adapter, base = right_answers(output, questions=100)
    assert base <= MOST_BY_BASE
    assert adapter >= LEAST_BY_ADAPTER
    assert f"answered word for word: base {base}, adapter {adapter}" in said


def test_held_out_questions_are_not_in_the_training_rows(demo: tuple[Path, str]) -> None:
    output, _ = demo
    rows = json.loads((output / "data.json").read_text())["splits"]
    assert rows["validation"]["rows_kept"] == 100
    assert rows["train"]["rows_kept"] + 100 == rows["train"]["source_rows"]
    source = Path(json.loads((output / "data.json").read_text())["sources"][0]["name"])
    questions = [(row["instruction"], row["input"]) for row in map(json.loads, source.read_text().splitlines())]
    assert len(set(questions)) == len(questions)


def test_demo_leaves_a_whole_run(demo: tuple[Path, str]) -> None:
    output, said = demo
    assert str(output / "report.html") in said
    assert json.loads((output / "run.json").read_text())["status"] == "completed"
    evaluation = json.loads((output / "evaluation.json").read_text())
    assert evaluation["difference"]["high"] < 0
    assert evaluation["differences"]["exact_match"]["verdict"] == "better"
    lines = [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]
    assert sum("eval_exact_match" in line for line in lines) == 3


def test_demo_never_replaces_another_run(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    rows = tiny.write_rows(tmp_path / "rows.json", tiny.alpaca_rows(8))
    run = loralab.train(tiny.run_config(base, rows, tmp_path / "demo"))
    before = (run.adapter() / "adapter_model.safetensors").read_bytes()
    with pytest.raises(RunFolderError, match="a run that is no demo"):
        run_demo(tmp_path / "demo", reporter=Reporter())
    assert (run.adapter() / "adapter_model.safetensors").read_bytes() == before
