"""Which rows task metrics are measured on: those whose answer is whole, read before training without their prompts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import loralab
from loralab.config.schema import Config
from loralab.data.dataset import PreparedData, prepare_data
from loralab.errors import DataError
from loralab.evaluation.perplexity import measure_loss
from loralab.layout.planner import Planner
from loralab.models.adapters import build_adapter
from loralab.progress import Reporter
from loralab.workflows.configure import load_run_config
from loralab.workflows.task import resolve_task
from loralab.workflows.task_meter import TaskMeter
from support import tiny

LONG = "one two three four five six seven eight nine ten " * 8


def prepare(folder: Path, rows: list[dict[str, str]], **evaluation: Any) -> tuple[Config, PreparedData]:
    made = {
        "model": {"name": str(tiny.save_base(folder / "base"))},
        "data": {
            "train": str(tiny.write_rows(folder / "rows.json", rows)),
            "validation": None,
            "template": "none",
            "format": "alpaca",
            "max_length": 64,
            "cache_dir": str(folder / "cache"),
        },
        "evaluation": {"max_new_tokens": 2, "split": "train", "bootstrap_samples": 100, **evaluation},
    }
    config = load_run_config(made, name="test").config
    return config, prepare_data(config.data, tiny.build_tokenizer(), reporter=Reporter())


def rows_of(*answers: str) -> list[dict[str, str]]:
    return [{"instruction": f"say {number}", "output": answer} for number, answer in enumerate(answers)]


def meter_of(config: Config, data: PreparedData, *, limit: int | None = None) -> tuple[TaskMeter, dict[str, Any], Any]:
    split = data.splits["train"]
    task, choices = resolve_task(config, data, splits={"train": split})
    model, _ = build_adapter(tiny.build_model(vocabulary=len(data.prompter.tokenizer)), config.lora, seed=0)
    meter = TaskMeter(
        task,
        model,
        split,
        limit=limit,
        prompter=data.prompter,
        evaluation=config.evaluation,
        device=torch.device("cpu"),
        reporter=Reporter(),
    )
    return meter, choices, model


def test_a_cut_answer_is_no_reference(tmp_path: Path) -> None:
    config, data = prepare(tmp_path, rows_of("red", LONG, "blue", LONG, "red"), metrics=["exact_match", "perplexity"])
    meter, choices, model = meter_of(config, data)
    assert choices["answered_rows"].value == "train 3 of 5"
    assert "cut at data.max_length" in choices["answered_rows"].reason
    planner = Planner(token_budget=256, layout="padded")
    losses = measure_loss(
        model,
        data.splits["train"],
        planner=planner,
        batch_size=4,
        device=torch.device("cpu"),
        reporter=Reporter(),
        label="loss",
    )
    measured = meter.measure(losses, planner, label="test")
    assert [answer.question.row for answer in measured.answers] == [1, 3, 5]
    assert [answer.question.reference for answer in measured.answers] == ["red", "blue", "red"]
    found = measured.as_dict()
    assert (found["answered_rows"], found["left_out"]) == (3, {"truncated": 2})
    assert found["metrics"]["exact_match"]["count"] == 3
    # Losses are of every row, cut or not.
    assert found["metrics"]["perplexity"]["count"] == int(data.splits["train"].supervised().sum())


def test_a_sample_is_taken_from_the_rows_that_are_whole(tmp_path: Path) -> None:
    config, data = prepare(tmp_path, rows_of(LONG, "red", LONG, "blue", LONG), metrics=["exact_match"])
    meter, _, _ = meter_of(config, data, limit=1)
    assert [question.row for question in meter._questions] == [4]


def test_nothing_is_said_where_no_answer_was_cut(tmp_path: Path) -> None:
    config, data = prepare(tmp_path, rows_of("red", "blue"), metrics=["exact_match"])
    _, choices, _ = meter_of(config, data)
    assert "answered_rows" not in choices


def test_rows_that_were_all_cut_are_refused(tmp_path: Path) -> None:
    config, data = prepare(tmp_path, rows_of(LONG, LONG), metrics=["exact_match"])
    with pytest.raises(DataError, match="the answers of all 2 rows were cut") as caught:
        resolve_task(config, data, splits=data.splits)
    assert caught.value.problems[0].where == "split train"


def test_a_cut_answer_gives_no_label(tmp_path: Path) -> None:
    config, data = prepare(tmp_path, rows_of("red", LONG, "blue", "red"), metrics=["label_accuracy"], answer_by="score")
    task, choices = resolve_task(config, data, splits=data.splits)
    assert choices["labels"].value == "'blue', 'red'"
    assert list(task.labels) == ["blue", "red"]


def test_the_longest_prompt_is_that_of_a_row_that_is_asked(tmp_path: Path) -> None:
    rows = [
        {"instruction": "say it", "output": "red"},
        {"instruction": "say it " * 6, "output": "blue"},
        {"instruction": "say it " * 8, "output": LONG},
    ]
    config, data = prepare(tmp_path, rows, metrics=["label_accuracy"], answer_by="score")
    task, _ = resolve_task(config, data, splits=data.splits)
    assert task.longest_prompt == len(data.splits["train"][1].branches[0].prompt_ids)


def test_every_reference_is_checked_before_training(tmp_path: Path) -> None:
    config, data = prepare(tmp_path, rows_of("12", "3.50", "none", LONG), metrics=["number"])
    with pytest.raises(DataError, match=r"'none' is not a text with a number \(1 of 3 references are not\)") as caught:
        resolve_task(config, data, splits=data.splits)
    assert "row 3" in str(caught.value.problems[0].where)


def test_prompts_are_not_read_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, data = prepare(tmp_path, rows_of(*["red", "blue"] * 3), metrics=["exact_match"])
    read: list[Any] = []
    decode = data.prompter.decode
    monkeypatch.setattr(data.prompter, "decode", lambda ids: read.append(ids) or decode(ids))
    resolve_task(config, data, splits=data.splits)
    assert read == []  # exact_match takes any references
    checked, _ = prepare(tmp_path, rows_of(*["red", "blue"] * 3), metrics=["rouge"])
    resolve_task(checked, data, splits=data.splits)
    assert len(read) == 2  # the same short answer once


def test_a_run_says_how_many_rows_were_answered(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    rows = tiny.write_rows(tmp_path / "rows.json", rows_of(*["red", LONG, "blue", "red"] * 3))
    run = loralab.train(
        tiny.run_config(
            base,
            rows,
            tmp_path / "run",
            data={"format": "alpaca", "template": "none", "max_length": 64, "validation": 8, "split_method": "first"},
            training={"max_steps": 1},
            evaluation={"metrics": ["exact_match"], "max_new_tokens": 2, "split": "validation"},
        )
    )
    assert run.record["resolved"]["answered_rows"]["value"] == "validation 6 of 8"
    evaluation = json.loads(run.folder.evaluation.read_text())
    for side in (evaluation, evaluation["base"]):
        assert (side["answered_rows"], side["left_out"]) == (6, {"truncated": 2})
