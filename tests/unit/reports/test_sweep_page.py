"""The page of a sweep, and what is said of the best run."""

import json
from pathlib import Path
from typing import Any

from loralab.reports.sweep_page import write_sweep_page
from loralab.reports.sweep_reading import read_sweep


def entry(number: int, metric: float | None, *, interval: list[float] | None = None, **settings: str) -> dict[str, Any]:
    keys = {"r": "lora.r", "rate": "training.learning_rate", "seed": "training.seed"}
    return {
        "number": number,
        "name": f"{number:03}",
        "settings": {keys[name]: value for name, value in settings.items()},
        "status": "completed" if metric is not None else "failed",
        "reason": "" if metric is not None else "ran out of <memory>",
        "metric": metric,
        "interval": interval,
        "examples": 8,
        "supervised_tokens": 80,
        "steps": 6,
        "trainable_parameters": 4096,
        "train_seconds": 1.0,
        "peak_memory_bytes": 1 << 30,
    }


def content(*runs: dict[str, Any], mode: str = "min") -> dict[str, Any]:
    space = dict.fromkeys(runs[0]["settings"], "...")
    return {
        "metric": "eval_loss", "split": "validation", "mode": mode, "search": "grid", "seed": None, "space": space,
        "runs": list(runs),
    }  # fmt: skip


def test_the_best_goes_by_the_mode() -> None:
    runs = [entry(1, 2.0, r="4"), entry(2, 1.0, r="8")]
    assert read_sweep(content(*runs))["order"] == ["002", "001"]
    assert read_sweep(content(*runs, mode="max"))["order"] == ["001", "002"]


def test_a_lead_within_the_interval_is_said() -> None:
    near = content(entry(1, 1.0, interval=[0.9, 1.2], r="4"), entry(2, 1.1, r="8"), entry(3, 1.3, r="9"))
    assert any("002." in text and "003" not in text for text in read_sweep(near)["cautions"])
    far = content(entry(1, 1.0, interval=[0.95, 1.05], r="4"), entry(2, 1.1, r="8"))
    assert read_sweep(far)["cautions"] == []


def test_seeds_rows_and_edges_are_said() -> None:
    wide = [0.99, 1.0]
    seeds = content(entry(1, 1.0, interval=wide, r="4", seed="1"), entry(2, 1.4, r="4", seed="2"))
    assert any("up to 0.4 apart" in text for text in read_sweep(seeds)["cautions"])
    other = entry(2, 1.4, r="8") | {"supervised_tokens": 81}
    assert any(
        "same tokens" in text for text in read_sweep(content(entry(1, 1.0, interval=wide, r="4"), other))["cautions"]
    )
    edge = content(entry(1, 1.2, r="4"), entry(2, 1.1, r="8"), entry(3, 1.0, interval=wide, r="16"))
    assert any("lora.r=16" in text for text in read_sweep(edge)["cautions"])


def test_the_page_has_every_run_and_its_pictures(tmp_path: Path) -> None:
    runs = [
        entry(1, 1.5, interval=[1.4, 1.6], r="4", rate="1e-4"),
        entry(2, 1.2, interval=[1.1, 1.3], r="4", rate="1e-3"),
        entry(3, 1.4, r="8", rate="1e-4"),
        entry(4, None, r="8", rate="1e-3"),
    ]
    for run in runs[:3]:
        (tmp_path / run["name"]).mkdir()
        lines = [{"step": step, "eval_loss": run["metric"] + 1 / step} for step in (2, 4)]
        (tmp_path / run["name"] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_sweep_page(tmp_path, content(*runs)).read_text(encoding="utf-8")
    assert page.count("<figure>") == 4  # both settings in one, each alone, the curves
    assert "3 of 4 runs complete" in page
    assert "ran out of &lt;memory&gt;" in page
    assert 'class="best"><th scope="row" title="002"' in page


def test_a_page_without_results(tmp_path: Path) -> None:
    page = write_sweep_page(tmp_path, content(entry(1, None, r="4"))).read_text(encoding="utf-8")
    assert "No run has been completed." in page
    assert "<figure>" not in page
