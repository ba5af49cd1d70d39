"""The preview as data: what it needs, what it keeps apart, and figures that agree with the tokens."""

import json
from pathlib import Path
from typing import Any

import pytest

from loralab.config.load import LoadedConfig
from loralab.data.dataset import prepare_data
from loralab.data.prompts.contract import CONTRACT_FILE, build_contract
from loralab.errors import DataError
from loralab.layout.planner import Planner
from loralab.models.load import load_tokenizer
from loralab.progress import Reporter
from loralab.workflows import preview as workflow
from loralab.workflows.configure import load_run_config
from loralab.workflows.prepare import prepare
from loralab.workflows.preview import PreviewRequest, preview
from support import tiny
from unit.data.prompters import CHATML, build_tokenizer


def load(folder: Path, rows: list[dict[str, Any]] | None = None, **sections: dict[str, Any]) -> LoadedConfig:
    """Return the configuration of a tokenizer without a model."""
    build_tokenizer(CHATML).save_pretrained(folder / "base")
    path = tiny.write_rows(folder / "rows.json", rows or tiny.alpaca_rows(30))
    values: dict[str, dict[str, Any]] = {
        "model": {"name": str(folder / "base")},
        "data": {"train": str(path), "cache_dir": str(folder / "cache"), "max_length": 128},
    }
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
    return load_run_config(values, name="rows")


def show(loaded: LoadedConfig, **request: Any) -> dict[str, Any]:
    return preview(loaded, PreviewRequest(**request), reporter=Reporter())


def test_a_tokenizer_is_all_it_needs(tmp_path: Path) -> None:
    result = show(load(tmp_path))
    assert not list((tmp_path / "base").glob("*.safetensors"))
    assert [row["row"] for row in result["rows"]] == [1, 2, 3]
    assert result["findings"] == []
    assert result["proofs"]["spans"] == 30
    json.dumps(result)


def test_epoch_counts_what_the_planner_lays_out(tmp_path: Path) -> None:
    loaded = load(tmp_path, training={"per_device_train_batch_size": 7, "num_train_epochs": 2})
    epoch = show(loaded)["report"]["epoch"]
    data = prepare_data(loaded.config.data, load_tokenizer(loaded.config.model), reporter=Reporter())
    train = data.splits["train"]
    assert (epoch["rows"], epoch["steps"], epoch["total_steps"], epoch["laid_out_steps"]) == (30, 5, 10, 5)
    assert epoch["supervised_tokens"] == int(train.supervised().sum())
    assert epoch["tokens_without_sharing"] == sum(
        len(b.prompt_ids) + len(b.answer_ids) - 1 for example in train for b in example.branches
    )
    whole = Planner(token_budget=100_000)(list(train)).tokens
    assert whole <= epoch["tokens_with_sharing"] <= epoch["tokens_without_sharing"]


def test_sampled_steps_are_scaled_to_the_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(tmp_path, [{"instruction": "red", "output": "cat"}] * 40, training={"per_device_train_batch_size": 4})
    every = show(loaded)["report"]["epoch"]
    monkeypatch.setattr(workflow, "_SAMPLED_STEPS", 3)
    some = show(loaded)["report"]["epoch"]
    assert (every["laid_out_steps"], some["laid_out_steps"]) == (10, 3)
    assert some["tokens_with_sharing"] == every["tokens_with_sharing"]
    assert some["tokens_without_sharing"] == every["tokens_without_sharing"]


def test_tokens_without_sharing_are_counted_not_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": "red " * length, "output": "cat"} for length in range(1, 21)]
    monkeypatch.setattr(workflow, "_SAMPLED_STEPS", 1)
    report = show(load(tmp_path, rows, training={"per_device_train_batch_size": 1}))["report"]
    assert report["epoch"]["tokens_without_sharing"] == report["splits"]["train"]["total_tokens"] - len(rows)


def test_the_verdict_counts_what_the_whole_split_shows(tmp_path: Path) -> None:
    result = show(
        load(tmp_path, [{"instruction": f"red {n}", "output": "cat" if n < 30 else f"{n}"} for n in range(60)])
    )
    assert [group["kind"] for group in result["findings"]] == ["repeated_answer"]
    assert (result["proofs"]["errors"], result["proofs"]["warnings"]) == (0, 1)


def test_weights_count_rows_as_often_as_they_are_taken(tmp_path: Path) -> None:
    tiny.write_rows(tmp_path / "more.json", tiny.alpaca_rows(10, seed=1))
    loaded = load(tmp_path)
    train = [loaded.config.data.train, {"path": str(tmp_path / "more.json"), "weight": 2}]
    result = show(load(tmp_path, data={"train": train}))
    assert result["report"]["epoch"]["rows"] == 50
    assert result["proofs"]["rows"] == 40
    assert show(load(tmp_path, data={"train": train}), named=["3"])["rows"][1]["source"].endswith("more.json")


def test_prepared_folder_is_proven_under_its_own_contract(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)
            ]
        }
    ] * 3
    prepare(load(tmp_path, rows), tmp_path / "prepared", overwrite=False, reporter=Reporter())
    loaded = load(tmp_path, data={"train": str(tmp_path / "prepared")})
    result = show(loaded)
    assert result["findings"] == []
    assert result["report"]["template"]["name"] == "prepared"
    assert result["proofs"]["spans"] == 6


def test_an_adapter_of_another_template_breaks_its_contract(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    data = prepare_data(loaded.config.data, load_tokenizer(loaded.config.model), reporter=Reporter())
    adapter = tmp_path / "adapter"
    data.prompter.tokenizer.save_pretrained(adapter)
    (adapter / CONTRACT_FILE).write_text(json.dumps(build_contract(data.prompter)), encoding="utf-8")
    assert preview(loaded, PreviewRequest(), reporter=Reporter(), adapter=adapter)["findings"] == []
    other = load(tmp_path, data={"template": "alpaca"})
    (found,) = preview(other, PreviewRequest(), reporter=Reporter(), adapter=adapter)["findings"]
    assert found["kind"] == "contract_broken"
    assert CONTRACT_FILE in found["rows"][0]["source"]


def test_rows_of_an_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such split: 'test'"):
        show(load(tmp_path), split="test")


def test_repeated_answer_is_named(tmp_path: Path) -> None:
    rows = [{"instruction": f"red {i}", "output": f"cat {i}" if i % 2 else "dog"} for i in range(60)]
    (found,) = show(load(tmp_path, rows))["findings"]
    assert (found["kind"], found["severity"]) == ("repeated_answer", "warning")
    assert "30 of 60 train rows have the answer 'dog'" in found["rows"][0]["what"]
