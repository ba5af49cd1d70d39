"""`kill -9` at any moment: the resumed run ends with the adapter and the losses of the uninterrupted one."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support import tiny
from support.command import run_here, write_config
from support.kills import Kill, train_through

Json = dict[str, Any]
# Settings under which a resume could go wrong in ways of its own.
SETTINGS: tuple[tuple[str, ...], ...] = (
    ("model.precision=float32",),
    ("model.precision=bfloat16", "evaluation.strategy=steps", "evaluation.steps=5"),
    ("model.precision=float32", "training.load_best_model_at_end=true", "training.learning_rate=0.2"),
    ("model.precision=bfloat16", "training.save_total_limit=1"),
)
POINTS = 20


@dataclass(frozen=True)
class World:
    """A configuration and its uninterrupted runs."""

    folder: Path
    config: Path
    whole: Callable[[tuple[str, ...]], Path]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base = tiny.save_base(folder / "base")
    rows = tiny.write_rows(folder / "rows.json", tiny.alpaca_rows(36))
    values = tiny.run_config(
        base,
        rows,
        folder / "none",
        data={"validation": 8},
        lora={"dropout": 0.1},
        training={"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2},
        evaluation={"num_samples": 1, "max_new_tokens": 4, "batch_size": 2},
    )
    config = write_config(folder / "config.yaml", values)
    known: dict[tuple[str, ...], Path] = {}

    def whole(settings: tuple[str, ...]) -> Path:
        if settings not in known:
            run = folder / f"whole-{len(known)}"
            answer = run_here("train", config, *settings, f"output.dir={run}")
            assert answer.code == 0, answer.err
            known[settings] = run
        return known[settings]

    return World(folder, config, whole)


def facts(run: Path) -> Json:
    """Return what a resumed run must share with an uninterrupted one."""
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    return {
        **{name: record[name] for name in ("status", "adapter_sha256", "steps", "epochs", "stopped_because")},
        "metrics": [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines],
        "eval_loss": evaluation["eval_loss"],
    }


def check_resumed(world: World, settings: tuple[str, ...], run: Path) -> None:
    """Resume a killed run to its end and compare it with the uninterrupted one."""
    options = ["--resume"] if run.exists() else []
    answer = run_here("train", world.config, *settings, f"output.dir={run}", *options)
    assert answer.code == 0, answer.err
    assert facts(run) == facts(world.whole(settings))
    assert not [path.name for path in run.glob(".*")]
    assert (run / "report.html").is_file()


@pytest.mark.slow
def test_killed_in_a_save_and_in_an_evaluation(world: World, tmp_path: Path) -> None:
    run, settings = tmp_path / "run", SETTINGS[0]
    kills = [Kill("save", 2, 0.004), Kill("evaluation", 1, 0.004)]
    fell = train_through(kills, world.config, *settings, f"output.dir={run}", run=run, folder=tmp_path)
    assert len(fell) == 2
    check_resumed(world, settings, run)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(POINTS))
def test_killed_at_random(
    seed: int, world: World, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    draw, settings = random.Random(seed), SETTINGS[seed % len(SETTINGS)]
    run = tmp_path / "run"
    fell: list[str] = []
    while not fell:  # a run that was over before its kill fell is no point
        shutil.rmtree(run, ignore_errors=True)
        kills = [Kill.draw(draw) for _ in range(draw.choice((1, 1, 2, 3)))]
        fell = train_through(kills, world.config, *settings, f"output.dir={run}", run=run, folder=tmp_path)
    record_property("killed in", ", ".join(fell))
    print(f"seed {seed}: killed in {', '.join(fell)}")
    check_resumed(world, settings, run)
