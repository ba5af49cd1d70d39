"""The page of a sweep, and what is said of the best run."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from loralab.reports.sweep_page import write_sweep_page
from loralab.reports.sweep_plots import draw_map, draw_setting
from loralab.reports.sweep_reading import read_sweep, shorten


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


def test_one_run_is_one(tmp_path: Path) -> None:
    one = content(entry(1, 1.0, interval=[0.9, 1.2], r="4"), entry(2, 1.1, r="8"))
    assert any("002. Its eval_loss" in text and "so it may be" in text for text in read_sweep(one)["cautions"])
    two = content(entry(1, 1.0, interval=[0.9, 1.2], r="4"), entry(2, 1.1, r="8"), entry(3, 1.1, r="9"))
    assert any("003. Their eval_loss" in text and "so they may be" in text for text in read_sweep(two)["cautions"])


@pytest.mark.parametrize("test", [None, 4])
def test_the_test_split_is_named_where_there_is_one(tmp_path: Path, test: int | None) -> None:
    runs = content(entry(1, 1.0, interval=[0.9, 1.2], r="4"), entry(2, 1.1, r="8"))
    page = write_sweep_page(tmp_path, runs | {"config": {"data": {"test": test}}}).read_text()
    assert ("--split test" in page) == (test is not None)
    assert ("the configuration has no test split" in page) == (test is None)


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
    beyond = content(entry(1, 1.2, r="4"), entry(2, 1.1, r="8"), entry(3, None, r="16"))  # it failed, and tells nothing
    assert any("lora.r=8" in text for text in read_sweep(beyond)["cautions"])
    assert not any("edge" in text for text in read_sweep(content(*edge["runs"][:2]))["cautions"])


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
    assert 'failed</span>: ran out of &lt;memory&gt; (<a href="logs/004.log">log</a>)' in page
    assert "1 of 4 runs failed." in page
    assert "not at their end" not in page
    assert "so far" not in page
    assert 'class="best"><th scope="row" title="002"><a href="002/report.html">002</a>' in page


def test_a_page_under_way_says_so(tmp_path: Path) -> None:
    waiting = {"status": "pending", "reason": ""}
    runs = [
        entry(1, 1.5, interval=[1.4, 1.6], r="4", rate="1e-4"),
        entry(2, None, r="4", rate="1e-3"),
        entry(3, None, r="8", rate="1e-4") | {"status": "running", "reason": "begun 2026-01-02T03:04:05+00:00"},
        entry(4, None, r="8", rate="1e-3") | waiting,
    ]
    page = write_sweep_page(tmp_path, content(*runs)).read_text(encoding="utf-8")
    assert "The best run so far" in page
    assert "1 of 4 runs failed." in page
    assert "2 of 4 runs not at their end yet." in page
    assert "running</span>: begun 2026-01-02T03:04:05+00:00</td>" in page


def test_the_map_has_every_point_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [entry(1, 1.5, r="4", rate="1e-4"), entry(2, None, r="8", rate="1e-3")]
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    assert draw_map(runs, ("lora.r", "training.learning_rate"), metric="eval_loss", lower=True)
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["4", "8"]
    assert [text.get_text() for text in axes.texts] == ["1.5", "failed"]


def test_a_page_without_results(tmp_path: Path) -> None:
    page = write_sweep_page(tmp_path, content(entry(1, None, r="4"))).read_text(encoding="utf-8")
    assert "No run has been completed." in page
    assert "<figure>" not in page


@pytest.mark.parametrize(
    "values", [("4", "4", "64"), ("1e-5", "1e-4", "1e-3"), ("[q_proj,v_proj]", "attention", "all")]
)
def test_every_run_stands_within_the_picture(values: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are moved aside from equal ones, which matplotlib's own bounds know nothing of."""
    runs = [entry(n, 1.0 + n, interval=[0.5 + n, 1.5 + n], r=value) for n, value in enumerate(values, 1)]
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    draw_setting(runs, "lora.r", metric="eval_loss", best="002")
    axes = figures[0].axes[0]
    seen = [line for line in axes.lines if line.get_marker() == "o"]
    places = [tuple(line.get_transform().transform(line.get_xydata()[0])) for line in seen]
    assert len(set(places)) == 3  # none hides another
    assert all(axes.bbox.contains(*place) for place in places)


def test_long_values_lose_their_middle() -> None:
    assert shorten("[q_proj,v_proj]") == "[q_proj,v_proj]"
    assert shorten("[q_proj,k_proj,v_proj,down_proj]") == "[q_proj,k_…down_proj]"
