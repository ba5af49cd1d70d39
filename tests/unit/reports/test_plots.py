"""Plots: what is drawn, from every kind of metrics, as pictures that are the same each time."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure
from PIL import Image

from loralab.reports.facts import load_facts
from loralab.reports.plots import PLOTS, smooth, write_plots
from loralab.run import RunFolder
from unit.reports.run_folders import build_run, config_values, evaluation, metrics, task_evaluation

ALL = ["loss.png", "learning_rate.png", "gradient_norm.png"]
SIZE = (1440, 624)


def draw(folder: RunFolder, name: str) -> Any:
    axes = Figure().add_subplot()
    PLOTS[name](load_facts(folder), axes)
    return axes


def labels(axes: Any) -> list[str]:
    return [line.get_label() for line in axes.lines]


@pytest.mark.parametrize("count", [1, 3, 300, 10_000])
def test_every_plot_is_a_picture_with_content(tmp_path: Path, count: int) -> None:
    folder = build_run(tmp_path, config=config_values(), metrics=metrics(count), evaluation=evaluation())
    paths = write_plots(folder)
    assert [path.name for path in paths] == ALL
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        with Image.open(path) as picture:
            assert picture.size == SIZE
            assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
            assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 20
    assert sorted(path.name for path in folder.plots.iterdir()) == sorted(ALL)  # no temporary file is left


def test_loss_shows_training_validation_best_and_base(tmp_path: Path) -> None:
    axes = draw(build_run(tmp_path, metrics=metrics(300), evaluation=evaluation()), "loss.png")
    assert labels(axes) == ["training", "smoothed", "validation", "lowest: 1.704 at step 300", "base model (test)"]
    raw, _, validation, best, base = axes.lines
    assert len(raw.get_xdata()) == 300
    assert list(validation.get_xdata()) == [75, 150, 225, 300]
    assert (list(best.get_xdata()), best.get_ydata()[0]) == ([300], pytest.approx(1.704))
    assert list(base.get_ydata()) == [2.9273, 2.9273]
    assert base.is_dashed()
    assert axes.get_ylabel() == "nats per supervised token"
    assert axes.get_xlabel() == "optimizer step"


def test_best_is_the_lowest_validation_loss_and_not_the_last(tmp_path: Path) -> None:
    rows = [{"step": s, "eval_loss": value} for s, value in ((10, 2.0), (20, 1.5), (30, 1.8))]
    assert "lowest: 1.500 at step 20" in labels(draw(build_run(tmp_path, metrics=rows), "loss.png"))


def test_the_step_whose_adapter_was_kept_is_marked_where_it_is_not_the_lowest(tmp_path: Path) -> None:
    config = config_values()
    config["training"] |= {"load_best_model_at_end": True, "metric_for_best_model": "yes_no_macro_f1"}
    scores = ((10, 2.0, 0.4), (20, 1.5, 0.6), (30, 1.8, 0.7), (40, 1.7, 0.7))
    rows = [{"step": step, "eval_loss": loss, "eval_yes_no_macro_f1": f1} for step, loss, f1 in scores]
    folder = build_run(tmp_path, config=config, metrics=rows)
    axes = draw(folder, "loss.png")
    assert labels(axes) == ["validation", "lowest: 1.500 at step 20", "adapter kept: step 30"]
    assert (list(axes.lines[-1].get_xdata()), list(axes.lines[-1].get_ydata())) == ([30], [1.8])
    config["training"]["metric_for_best_model"] = "eval_loss"
    folder.config.write_text(json.dumps(config))
    assert labels(draw(folder, "loss.png")) == ["validation", "lowest: 1.500 at step 20"]


def test_few_points_are_not_smoothed_and_one_evaluation_is_no_best(tmp_path: Path) -> None:
    rows = [*metrics(3)[:1], {"step": 3, "eval_loss": 1.0}]
    assert labels(draw(build_run(tmp_path, metrics=rows), "loss.png")) == ["training", "validation"]


def test_gradient_norm_shows_the_clipping_norm_of_the_configuration(tmp_path: Path) -> None:
    config = config_values()
    config["training"]["max_grad_norm"] = 0.7
    folder = build_run(tmp_path, config=config, metrics=metrics(5))
    axes = draw(folder, "gradient_norm.png")
    assert list(axes.lines[-1].get_ydata()) == [0.7, 0.7]
    assert labels(axes)[-1] == "clipped to 0.7"
    config["training"]["max_grad_norm"] = 0.0
    folder.config.write_text(json.dumps(config))
    assert len(draw(folder, "gradient_norm.png").lines) == 1


def task_rows(**figures: tuple[float, ...]) -> list[dict[str, Any]]:
    lines = [{"step": 10 * place, **{f"eval_{name}": values[place - 1] for name, values in figures.items()}}
             for place in (1, 2, 3)]  # fmt: skip
    return [{**line, "eval_loss": 1.0} for line in lines]


def test_task_metrics_show_the_watched_figure_first_with_its_best_and_the_base(tmp_path: Path) -> None:
    config = config_values()
    config["training"]["early_stopping"] = {"metric": "yes_no_macro_f1", "patience": 2}
    rows = task_rows(yes_no_accuracy=(0.5, 0.6, 0.7), yes_no_macro_f1=(0.4, 0.6, 0.5), number_mae=(90.0, 80.0, 70.0))
    folder = build_run(tmp_path, config=config, metrics=rows, evaluation=task_evaluation())
    assert [path.name for path in write_plots(folder)] == ["loss.png", "metrics.png"]
    axes = draw(folder, "metrics.png")
    assert labels(axes) == [
        "yes_no_macro_f1", "yes_no_accuracy", "best: 0.600 at step 20", "yes_no_macro_f1\nof the base (test)",
    ]  # fmt: skip
    watched, accuracy, best, base = axes.lines
    assert list(watched.get_ydata()) == [0.4, 0.6, 0.5]
    assert watched.get_color() == best.get_markeredgecolor() == base.get_color() != accuracy.get_color()
    assert watched.get_marker() != accuracy.get_marker()
    assert list(base.get_ydata()) == [0.7501, 0.7501]


def test_of_a_figure_where_lower_is_better_the_lowest_is_best(tmp_path: Path) -> None:
    axes = draw(build_run(tmp_path, metrics=task_rows(number_mae=(90.0, 70.0, 80.0))), "metrics.png")
    assert labels(axes) == ["number_mae", "best: 70.000 at step 20"]
    assert axes.get_ylabel() == "number_mae"


def test_figures_without_a_better_direction_are_not_drawn(tmp_path: Path) -> None:
    folder = build_run(tmp_path, metrics=task_rows(length_tokens=(9.0, 8.0, 7.0)))
    assert [path.name for path in write_plots(folder)] == ["loss.png"]


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    rows = [*metrics(3), {"step": 4, "loss": float("nan"), "learning_rate": float("inf"), "grad_norm": None}]
    folder = build_run(tmp_path, metrics=rows)
    assert len(write_plots(folder)) == 3
    assert list(draw(folder, "loss.png").lines[0].get_xdata()) == [1, 2, 3]


def test_a_last_line_cut_short_is_left_out(tmp_path: Path) -> None:
    folder = build_run(tmp_path, metrics=metrics(3))
    with folder.metrics.open("a") as stream:
        stream.write('{"step": 4, "loss": 1.')
    assert len(write_plots(folder)) == 3
    assert list(draw(folder, "loss.png").lines[0].get_xdata()) == [1, 2, 3]


def test_without_numbers_there_is_no_plot_and_an_old_one_goes(tmp_path: Path) -> None:
    folder = build_run(tmp_path, metrics=metrics(3))
    write_plots(folder)
    folder.metrics.write_text('{"step": 5, "eval_loss": 2.5}\n')
    assert [path.name for path in write_plots(folder)] == ["loss.png"]
    assert [path.name for path in folder.plots.iterdir()] == ["loss.png"]
    folder.metrics.unlink()
    assert write_plots(folder) == []


def test_a_spike_gets_a_logarithmic_axis(tmp_path: Path) -> None:
    rows = [{"step": s, "grad_norm": 9e4 if s == 5 else 0.4} for s in range(1, 20)]
    axes = draw(build_run(tmp_path, metrics=rows), "gradient_norm.png")
    assert axes.get_yscale() == "log"
    assert "log scale" in axes.get_ylabel()


def test_the_same_metrics_give_the_same_bytes_whatever_the_users_style(tmp_path: Path) -> None:
    folder = build_run(tmp_path, config=config_values(), metrics=metrics(50), evaluation=evaluation())
    first = [path.read_bytes() for path in write_plots(folder)]
    assert all(b"atplotlib" not in content for content in first)  # a version would change the bytes
    with matplotlib.rc_context({"figure.facecolor": "black", "font.size": 30, "savefig.dpi": 40}):
        assert [path.read_bytes() for path in write_plots(folder)] == first
        assert matplotlib.rcParams["font.size"] == 30


def test_smoothing_keeps_constants_and_means() -> None:
    assert smooth([2.0] * 500) == pytest.approx([2.0] * 500)
    ramp = [float(value) for value in range(500)]
    assert smooth(ramp)[250] == pytest.approx(250.0)
    assert len(smooth(ramp)) == 500


def test_drawing_warns_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        write_plots(build_run(tmp_path, metrics=[{"step": 1, "loss": 0.0, "learning_rate": 0.0, "grad_norm": 0.0}]))
    assert caplog.records == []


def test_reports_import_no_torch_and_no_pyplot() -> None:
    code = (
        "import sys, loralab.reports.plots, loralab.reports.html, loralab.reports.model_card;"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'matplotlib.pyplot'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
