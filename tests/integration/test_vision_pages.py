"""A run on rows with pictures: its pages show them, also when the data has moved, and its card's program runs."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import loralab
from loralab.progress import Reporter
from loralab.reports.facts import load_facts
from loralab.reports.pictures import MOST_PICTURES, pictures_folder
from loralab.reports.usage import describe_usage
from loralab.workflows.compare import ComparisonRequest, compare
from loralab.workflows.configure import load_run_config
from loralab.workflows.output import clear_run
from loralab.workflows.report import build_report
from loralab.workflows.train import train
from support.tiny import write_rows
from support.tiny_vision import VisionFamily, save_vision_base, vqa_rows


def trained(folder: Path, family: VisionFamily) -> loralab.Run:
    """Train a few steps on rows about pictures that lie in a folder of their own."""
    rows = write_rows(folder / "data" / "rows.json", vqa_rows(folder / "data", 5, questions=2))
    values: dict[str, dict[str, Any]] = {
        "model": {"name": str(save_vision_base(folder / "base", family)), "precision": "float32"},
        "data": {"train": str(rows), "validation": 0.3, "cache_dir": str(folder / "cache"), "num_workers": 0},
        "lora": {"r": 4},
        "training": {"max_steps": 3, "learning_rate": 0.01},
        "evaluation": {"metrics": ["exact_match"], "max_new_tokens": 6, "num_samples": 3, "bootstrap_samples": 100},
        "output": {"dir": str(folder / "run")},
    }
    train(load_run_config(values, name="pictures"), reporter=Reporter())
    return loralab.Run(folder / "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> loralab.Run:
    return trained(tmp_path_factory.mktemp("vision"), "qwen2_vl")


def test_samples_and_predictions_name_pictures_and_hold_short_prompts(run: loralab.Run) -> None:
    samples = json.loads(run.folder.samples.read_text(encoding="utf-8"))["samples"]
    predictions = [json.loads(line) for line in run.folder.predictions.read_text(encoding="utf-8").splitlines()]
    for record in (*samples, *predictions):
        assert record["prompt"].count("<|image_pad|>") == 1
        (image,) = record["images"]
        assert (run.path.parent / "data" / "images" / Path(image["path"]).name).is_file()


def test_pages_keep_their_pictures_when_the_data_is_gone(run: loralab.Run, tmp_path: Path) -> None:
    compare(run.path, ComparisonRequest(with_probe=False), reporter=Reporter())
    comparison = run.folder.comparison_page.read_text(encoding="utf-8")
    assert 1 <= comparison.count("<symbol ") <= MOST_PICTURES
    assert comparison.count("<use ") == len(json.loads(run.folder.comparison.read_text(encoding="utf-8"))["prompts"])
    build_report(run.folder)
    page = run.folder.report.read_text(encoding="utf-8")
    assert page.count("<use ") >= 3
    moved = shutil.copytree(run.path, tmp_path / "moved")
    data = run.path.parent / "data"
    data.rename(tmp_path / "elsewhere")
    try:
        build_report(loralab.Run(moved).folder)
        assert loralab.Run(moved).folder.report.read_text(encoding="utf-8").count("<use ") == page.count("<use ")
        shutil.rmtree(pictures_folder(loralab.Run(moved).folder))
        build_report(loralab.Run(moved).folder)
        without = loralab.Run(moved).folder.report.read_text(encoding="utf-8")
        assert "<use " not in without
        assert without.count("not shown here") == page.count("<use ")
    finally:
        (tmp_path / "elsewhere").rename(data)


def test_an_overwritten_run_loses_its_small_copies_and_nothing_else(run: loralab.Run, tmp_path: Path) -> None:
    copied = loralab.Run(shutil.copytree(run.path, tmp_path / "copied")).folder
    kept = pictures_folder(copied)
    assert list(kept.iterdir())
    (kept / "mine.png").write_bytes(b"mine")
    clear_run(copied)
    assert [path.name for path in kept.iterdir()] == ["mine.png"]


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_the_program_of_the_model_card_runs(
    family: VisionFamily, run: loralab.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = run if family == "qwen2_vl" else trained(tmp_path, family)
    base = own.path.parent / "base"
    usage = describe_usage(load_facts(own.folder), base=str(base), revision=None, run="run", adapter=str(own.adapter()))
    assert usage.command == "loralab generate run --image picture.png --prompt 'Your question'"
    card = (own.folder.adapter / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: image-text-to-text" in card
    assert "AutoModelForImageTextToText" in card
    sample = json.loads(own.folder.samples.read_text(encoding="utf-8"))["samples"][0]
    Image.open(sample["images"][0]["path"]).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    question = next(row["question"] for row in vqa_rows(tmp_path / "again", 1) if row["question"] in sample["prompt"])
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(usage.program.replace("Your question", question), "program", "exec"), {})
    assert said.getvalue().strip() == sample["adapter_output"].strip()
