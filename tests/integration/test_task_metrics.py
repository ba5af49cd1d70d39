"""Task metrics through a whole run: measured while training, deciding on the adapter, compared at the end."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import loralab
from loralab.errors import ConfigError, DataError, ModelError
from loralab.models.adapters import WEIGHTS_FILE
from loralab.progress import Reporter
from loralab.workflows.evaluate import evaluate, evaluate_adapters
from loralab.workflows.replay import replay
from support import tiny

QUESTIONS = ("cat", "dog", "bird")


def yes_no_rows(count: int, *, seed: int = 0, noise: float = 0.0) -> list[dict[str, Any]]:
    """Return questions that a red animal answers by yes and a blue one by no; some at random."""
    source = random.Random(seed)
    rows = []
    for _ in range(count):
        colour, animal = source.choice(("red", "blue")), source.choice(QUESTIONS)
        right = (colour == "red") != (source.random() < noise)
        rows.append({"passage": f"the {animal} is {colour}", "question": f"is the {animal} red", "answer": right})
    return rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.json", yes_no_rows(80))


def config(base: Path, rows: Path, run: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    made = {
        "model": {"name": str(base), "precision": "float32"},
        "data": {
            "train": str(rows),
            "validation": 20,
            "template": "none",
            "max_length": 128,
            "cache_dir": str(run.parent / "cache"),
        },
        "training": {"max_steps": 24, "learning_rate": 0.02, "save_total_limit": None},
        "evaluation": {"strategy": "steps", "steps": 4, "num_samples": 2, "max_new_tokens": 4, "split": "validation"},
        "output": {"dir": str(run)},
    }
    return {name: {**made.get(name, {}), **sections.get(name, {})} for name in {**made, **sections}}


def evaluations(run: loralab.Run, figure: str) -> dict[int, float]:
    return {line["step"]: line[f"eval_{figure}"] for line in run.metrics if f"eval_{figure}" in line}


@pytest.fixture(scope="module")
def learned(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> loralab.Run:
    training = {
        "load_best_model_at_end": True,
        "early_stopping": {"metric": "yes_no_macro_f1", "patience": 2},
    }
    return loralab.train(config(base, rows, tmp_path_factory.mktemp("learned") / "run", training=training))


def test_yes_no_rows_are_measured_without_being_asked_for(learned: loralab.Run) -> None:
    choices = learned.record["resolved"]
    assert choices["metrics"]["value"] == "yes_no"
    assert choices["answer_by"]["value"] == "score"
    assert choices["labels"]["value"] == "'no', 'yes'"
    evaluation = json.loads(learned.folder.evaluation.read_text())
    assert evaluation["answered_by"] == "score"
    assert evaluation["answered_rows"] == 20
    assert evaluation["yes_no_accuracy"] == evaluation["metrics"]["yes_no_accuracy"]["value"] > 0.9
    assert evaluation["base"]["yes_no_accuracy"] < 0.9
    assert evaluation["differences"]["yes_no_accuracy"]["verdict"] == "better"
    assert sum(map(sum, evaluation["details"]["yes_no"]["confusion_matrix"])) == 20


def test_early_stopping_by_f1_fires_and_the_best_checkpoint_is_the_one_restored(learned: loralab.Run) -> None:
    figures = evaluations(learned, "yes_no_macro_f1")
    best = max(figures, key=lambda step: (figures[step], -step))
    assert learned.record["steps"] == best + 8 < 24  # two evaluations without improvement
    assert learned.record["stopped_because"] == (
        f"early stopping: yes_no_macro_f1 has not been above {figures[best]:.4f} (step {best}) for 2 observations"
    )
    saved = load_file(learned.folder.checkpoints / f"checkpoint-{best}" / WEIGHTS_FILE)
    kept = load_file(learned.adapter() / WEIGHTS_FILE)
    assert all(bool((saved[name] == kept[name]).all()) for name in kept)
    # The final evaluation is of the same rows: the best step's figure comes back.
    evaluation = json.loads(learned.folder.evaluation.read_text())
    assert evaluation["yes_no_macro_f1"] == pytest.approx(figures[best], abs=1e-12)


def test_predictions_hold_what_the_figures_are_made_of(learned: loralab.Run) -> None:
    lines = [json.loads(text) for text in learned.folder.predictions.read_text().splitlines()]
    evaluation = json.loads(learned.folder.evaluation.read_text())
    assert len(lines) == 20
    for side, figures in (("adapter", evaluation), ("base", evaluation["base"])):
        right = [line[side]["answer"] == line["reference"].strip() for line in lines]
        assert sum(right) / 20 == pytest.approx(figures["yes_no_accuracy"])
        assert [line[side]["scores"]["yes_no"] for line in lines] == [float(each) for each in right]
        scores = [line[side]["label_scores"] for line in lines]
        assert all(sum(map(math.exp, each.values())) < 1.0 for each in scores)
        assert [max(each, key=each.get) for each in scores] == [line[side]["answer"] for line in lines]


def test_eval_measures_the_same_again(learned: loralab.Run) -> None:
    before = json.loads(learned.folder.evaluation.read_text())
    assert learned.evaluate() == before


def test_resume_brings_the_same_run(base: Path, rows: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "training": {
            "early_stopping": {"metric": "exact_match", "patience": 3},
            "max_steps": 12,
            "save_strategy": "steps",
        },
        "evaluation": {"metrics": ["exact_match", "length"], "metric_rows": 7},
    }
    sections["training"]["save_steps"] = 4
    whole = loralab.train(config(base, rows, tmp_path / "run", **sections))
    figures = evaluations(whole, "exact_match")
    assert set(figures) == {4, 8, 12}
    assert all(round(value * 7) == pytest.approx(value * 7) for value in figures.values())
    sha = whole.record["adapter_sha256"]
    (whole.folder.checkpoints / "checkpoint-12" / "manifest.json").unlink()
    whole.folder.record.write_text(json.dumps(whole.record | {"status": "running"}))
    changed = config(
        base, rows, tmp_path / "run", **(sections | {"evaluation": {"metrics": ["exact_match"], "metric_rows": 9}})
    )
    with pytest.raises(loralab.LoralabError, match=r"evaluation\.metric_rows was 7, now 9"):
        loralab.train(changed, resume=True)
    resumed = loralab.train(config(base, rows, tmp_path / "run", **sections), resume=True)
    assert resumed.record["adapter_sha256"] == sha
    assert evaluations(resumed, "exact_match") == figures


@pytest.mark.parametrize("way", ["generate", "score", "teacher_forced"])
def test_every_way_of_answering_is_named_in_the_results(way: str, base: Path, rows: Path, tmp_path: Path) -> None:
    evaluation = {"metrics": ["yes_no", "perplexity"], "answer_by": way}
    run = loralab.train(config(base, rows, tmp_path / "run", training={"max_steps": 2}, evaluation=evaluation))
    found = json.loads(run.folder.evaluation.read_text())
    assert found["answered_by"] == found["base"]["answered_by"] == way
    assert ("note" in found) == (way == "teacher_forced")
    assert found["perplexity"] == pytest.approx(math.exp(found["eval_loss"]))
    assert found["bits_per_byte"] > 0


def test_metrics_do_not_change_what_is_trained(base: Path, rows: Path, tmp_path: Path) -> None:
    plain, measured = (
        loralab.train(
            config(
                base,
                rows,
                tmp_path / name,
                model={"base_dropout": "as_configured"},
                training={"max_steps": 6},
                lora={"dropout": 0.1},
                evaluation={"metrics": metrics, **({} if not metrics else {"answer_by": "generate"}), "steps": 2},
            )
        )
        for name, metrics in (("plain", []), ("measured", ["exact_match"]))
    )
    assert plain.record["adapter_sha256"] == measured.record["adapter_sha256"]


def test_what_the_data_cannot_answer_is_told_before_training(base: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="number"):
        loralab.train(config(base, rows, tmp_path / "run", evaluation={"metrics": ["number"]}))
    text = tmp_path / "text.txt"
    text.write_text("the cat is red\n" * 40)
    data = {"train": str(text), "format": "text", "max_length": 8, "template": "auto"}
    with pytest.raises(DataError, match="plain text"):
        loralab.train(config(base, rows, tmp_path / "run", data=data, evaluation={"metrics": ["exact_match"]}))
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_label_that_has_no_room_is_told_before_training(base: Path, tmp_path: Path) -> None:
    long = tiny.write_rows(tmp_path / "long.json", [{"question": "red " * 125, "answer": "a"}] * 8)
    data = {"train": str(long), "format": "question_answer", "max_length": 256, "validation": 2}
    labels = {"metrics": ["label_accuracy"], "labels": ["a", "the river and the house of the bird"]}
    with pytest.raises(ModelError, match="and label of"):
        loralab.train(config(base, long, tmp_path / "run", data=data, evaluation=labels))
    assert not (tmp_path / "run" / "run.json").exists()


def test_functions_of_the_users_own(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "def shortness(answers, references):\n    return [-float(len(text)) for text in answers]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    evaluation = {"metrics": ["mine:shortness"], "answer_by": "generate"}
    training = {"max_steps": 4, "early_stopping": {"metric": "shortness", "patience": 9}}
    run = loralab.train(config(base, rows, tmp_path / "run", training=training, evaluation=evaluation))
    assert set(evaluations(run, "shortness")) == {4}
    # A run folder may come from someone else: its word runs no code, and what was measured stays.
    before = run.folder.evaluation.read_bytes()
    assert "shortness" not in run.evaluate()
    assert run.folder.evaluation.read_bytes() == before
    assert run.folder.predictions.is_file()
    with pytest.raises(ConfigError, match="code that a run folder names is not run"):
        replay(run.path, output=tmp_path / "again", reporter=Reporter())
    assert "shortness" in run.evaluate(overrides=["evaluation.metrics=[mine:shortness]"])
    with pytest.raises(ConfigError, match="no_such_module"):
        loralab.train(config(base, rows, tmp_path / "other", evaluation={"metrics": ["no_such_module:f"]}))


def test_what_training_watched_is_measured_whatever_else_is_set(base: Path, rows: Path, tmp_path: Path) -> None:
    training = {"max_steps": 8, "early_stopping": {"metric": "bits_per_byte", "patience": 9}}
    run = loralab.train(config(base, rows, tmp_path / "run", training=training))
    assert set(evaluations(run, "bits_per_byte")) == {4, 8}
    assert "bits_per_byte" in run.evaluate(overrides=["evaluation.batch_size=3"])
    assert "bits_per_byte" not in run.evaluate(overrides=["evaluation.metrics=[exact_match]"])


def test_yes_no_rows_of_one_answer_are_measured(base: Path, tmp_path: Path) -> None:
    always = tiny.write_rows(tmp_path / "always.json", [row | {"answer": "yes"} for row in yes_no_rows(30)])
    run = loralab.train(config(base, always, tmp_path / "run", training={"max_steps": 2}))
    assert run.record["resolved"]["labels"]["value"] == "'no', 'yes'"


def test_a_setting_of_answers_that_nothing_asks_for_is_refused(base: Path, tmp_path: Path) -> None:
    plain = tiny.write_rows(tmp_path / "plain.json", tiny.alpaca_rows(12))
    data = {"template": "alpaca", "validation": 4}
    with pytest.raises(ConfigError, match="metric_rows has no effect"):
        loralab.train(config(base, plain, tmp_path / "run", data=data, evaluation={"metric_rows": 3}))


def test_a_run_is_asked_on_no_other_base(learned: loralab.Run, tmp_path: Path) -> None:
    other = tiny.save_base(tmp_path / "other", "llama", seed=1)
    with pytest.raises(ModelError, match="not the base of this adapter"):
        evaluate(learned.path, base_model=str(other), reporter=Reporter())


def test_several_adapters_are_measured_on_the_same_rows(
    learned: loralab.Run, base: Path, rows: Path, tmp_path: Path
) -> None:
    other = loralab.train(config(base, rows, tmp_path / "other", training={"max_steps": 2}))
    held_out = tiny.write_rows(tmp_path / "held_out.json", yes_no_rows(12, seed=5))
    written = tmp_path / "answers.jsonl"
    assert other.record["resolved"]["metrics"]["reason"] == "rows are answered by yes or no"
    results = evaluate_adapters(
        [learned.path, other.path], data=str(held_out), predictions=written, reporter=Reporter()
    )
    assert results[0]["base"] == results[1]["base"]
    assert results[0]["yes_no_accuracy"] > results[1]["yes_no_accuracy"]
    lines = [json.loads(text) for text in written.read_text().splitlines()]
    assert [line["run"] for line in lines] == [str(learned.path)] * 12 + [str(other.path)] * 12
    (tmp_path / "own").mkdir()
    generating = loralab.train(
        config(base, rows, tmp_path / "own/run", training={"max_steps": 2}, evaluation={"answer_by": "generate"})
    )
    with pytest.raises(ConfigError, match="asks for metrics auto by generate"):
        evaluate_adapters([other.path, generating.path], data=str(held_out), reporter=Reporter())
    before = held_out.read_bytes()
    with pytest.raises(ConfigError, match="would replace the data"):
        evaluate(learned.path, data=str(held_out), predictions=held_out, reporter=Reporter())
    assert held_out.read_bytes() == before
    with pytest.raises(ConfigError, match="no data that all of them are measured on"):
        evaluate_adapters([learned.path, other.path], reporter=Reporter())
    with pytest.raises(ConfigError, match="not a file"):
        evaluate(learned.path, predictions=tmp_path, reporter=Reporter())
    with pytest.raises(ConfigError, match="no metric that is measured needs answers"):
        evaluate(learned.path, overrides=["evaluation.metrics=[]"], predictions=written, reporter=Reporter())
