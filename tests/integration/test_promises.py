"""What a run promises when it is stopped, resumed, or measured again."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralab
from loralab.config.schema import DataConfig
from loralab.data.dataset import prepare_data
from loralab.errors import ConfigError, DataError, ModelError
from loralab.progress import Reporter
from loralab.training.checkpoint import list_checkpoints
from loralab.training.state import STATE_FILE, RunState
from support import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return tiny.write_rows(tmp_path / "rows.json", tiny.alpaca_rows(20))


def unfinish(run: loralab.Run) -> None:
    """Leave the run as a kill in its final evaluation does."""
    shutil.rmtree(run.folder.adapter)
    run.folder.record.write_text(json.dumps(run.record | {"status": "running"}))


def test_an_early_stop_stays_one_after_a_resume(base: Path, rows: Path, tmp_path: Path) -> None:
    training = {"early_stopping": {"metric": "loss", "patience": 2, "min_delta": 100.0}, "num_train_epochs": 3}
    config = tiny.run_config(base, rows, tmp_path / "run", training=training)
    whole = loralab.train(config)
    before = whole.record
    unfinish(whole)
    resumed = loralab.train(config, resume=True)
    assert (resumed.record["steps"], resumed.record["adapter_sha256"]) == (before["steps"], before["adapter_sha256"])


def test_a_resume_behind_the_last_step_takes_no_step_more(base: Path, rows: Path, tmp_path: Path) -> None:
    # Three steps of five in an epoch, and a kill in the evaluation of the last one: its checkpoint is there.
    training = {"max_steps": 3, "lr_scheduler_type": "constant"}
    config = tiny.run_config(base, rows, tmp_path / "run", training=training, data={"validation": 2})
    whole = loralab.train(config)
    sha, metrics = whole.record["adapter_sha256"], whole.metrics
    last = list_checkpoints(whole.folder.checkpoints)[-1]
    state = json.loads((last / STATE_FILE).read_text())
    unfinish(whole)
    for evaluated in (3, 0):
        (last / STATE_FILE).write_text(json.dumps(state | {"evaluated_step": evaluated}))
        manifest = json.loads((last / "manifest.json").read_text())
        manifest["files"].pop(STATE_FILE, None)  # its hash has changed with it
        (last / "manifest.json").write_text(json.dumps(manifest))
        resumed = loralab.train(config, resume=True)
        assert (resumed.record["steps"], resumed.record["adapter_sha256"]) == (3, sha)
        assert [line["step"] for line in resumed.metrics] == [line["step"] for line in metrics]
        unfinish(resumed)


def test_last_step_is_saved_whatever_the_strategy(base: Path, rows: Path, tmp_path: Path) -> None:
    config = tiny.run_config(base, rows, tmp_path / "run", training={"save_strategy": "no"})
    whole = loralab.train(config)
    sha = whole.record["adapter_sha256"]
    assert [path.name for path in list_checkpoints(whole.folder.checkpoints)] == ["checkpoint-5"]
    unfinish(whole)
    assert loralab.train(config, resume=True).record["adapter_sha256"] == sha


def test_resume_by_the_stored_configuration(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = tiny.write_rows(tmp_path / "validation.json", tiny.alpaca_rows(4, seed=3))
    monkeypatch.chdir(tmp_path)
    config = tiny.run_config(base, rows, tmp_path / "run", data={"validation": validation.name})
    whole = loralab.train(config)
    sha = whole.record["adapter_sha256"]
    unfinish(whole)
    assert loralab.train(whole.folder.config, resume=True).record["adapter_sha256"] == sha


def test_evaluation_that_a_signal_prevented_is_made_up_for(base: Path, rows: Path, tmp_path: Path) -> None:
    sections: dict[str, dict[str, Any]] = {"data": {"validation": 4}, "training": {"num_train_epochs": 2}}
    whole = loralab.train(tiny.run_config(base, rows, tmp_path / "whole", **sections))
    sections["training"]["save_strategy"] = "steps"
    sections["training"]["save_steps"] = 4
    config = tiny.run_config(base, rows, tmp_path / "cut", **sections)
    cut = loralab.train(config)
    first, *later = list_checkpoints(cut.folder.checkpoints)
    for path in later:
        shutil.rmtree(path)
    state = RunState.load(first)
    state.evaluated_step = 0
    state.save(first)
    manifest = json.loads((first / "manifest.json").read_text())
    manifest["files"].pop(STATE_FILE)  # its hash has changed with it
    (first / "manifest.json").write_text(json.dumps(manifest))
    lines = [line for line in cut.metrics if "eval_loss" not in line]
    cut.folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    unfinish(cut)
    resumed = loralab.train(config, resume=True)
    measured = [line["eval_loss"] for line in resumed.metrics if "eval_loss" in line]
    assert measured == [line["eval_loss"] for line in whole.metrics if "eval_loss" in line]


def test_best_adapter_is_the_best_whatever_min_delta_says(base: Path, rows: Path, tmp_path: Path) -> None:
    training = {
        "num_train_epochs": 3,
        "learning_rate": 1e-3,
        "load_best_model_at_end": True,
        "early_stopping": {"metric": "eval_loss", "min_delta": 50.0, "patience": 9},
    }
    run = loralab.train(tiny.run_config(base, rows, tmp_path / "run", data={"validation": 4}, training=training))
    measured = [line["eval_loss"] for line in run.metrics if "eval_loss" in line]
    evaluation = json.loads(run.folder.evaluation.read_text())
    assert evaluation["eval_loss"] == pytest.approx(min(measured), rel=1e-6)


def test_windows_of_a_document_stay_together(base: Path, tmp_path: Path) -> None:
    texts = [" ".join(["red cat runs"] * (6 + number)) + f" {number}" for number in range(12)]
    file = tiny.write_rows(tmp_path / "texts.json", [{"text": text} for text in texts])
    data = DataConfig(train=str(file), validation=0.25, max_length=16, cache_dir=str(tmp_path / "cache"))
    prepared = prepare_data(data, tiny.build_tokenizer(), reporter=Reporter())
    owners = {name: set(np.unique(split.origins[:, 1]).tolist()) for name, split in prepared.splits.items()}
    assert len(owners["validation"]) == 3
    assert not owners["train"] & owners["validation"]
    assert len(prepared.splits["train"]) > len(owners["train"])


def test_evaluation_refuses_data_that_has_changed(base: Path, rows: Path, tmp_path: Path) -> None:
    run = loralab.train(tiny.run_config(base, rows, tmp_path / "run", data={"validation": 4}))
    stored = run.folder.evaluation.read_bytes()
    tiny.write_rows(rows, tiny.alpaca_rows(21))
    with pytest.raises(DataError, match="the data has changed since the run"):
        run.evaluate()
    assert run.folder.evaluation.read_bytes() == stored


def test_one_of_several_processes_without_a_launcher_is_refused(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK is not set in a run of 2 processes"):
        loralab.train(tiny.run_config(base, rows, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_tokens_that_the_model_does_not_have_are_refused(base: Path, tmp_path: Path) -> None:
    file = tiny.write_rows(tmp_path / "ids.json", [{"input_ids": [1, 2, 70_000], "labels": [-100, 2, 70_000]}] * 4)
    with pytest.raises(ModelError, match="token id 70000"):
        loralab.train(tiny.run_config(base, file, tmp_path / "run"))
