"""Readings of made curves: each rule speaks where its case is plain, and none where there is only noise."""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from loralab.reports.curve_noise import noise_of
from loralab.reports.curves import Curve, TaskCurve, read_curve, task_curves, watched_figure
from loralab.reports.curves_reading import MOST_FINDINGS, Curves, Finding, read_curves
from loralab.reports.facts import load_facts
from unit.reports.run_folders import build_run, config_values

STEPS = 400


def falling(step: float, *, start: float = 3.0, end: float = 1.5, over: float = 60.0) -> float:
    return end + (start - end) * math.exp(-step / over)


def curve(of: Callable[[float], float], *, every: int, noise: float = 0.0, seed: int = 0) -> Curve:
    draw = random.Random(seed)
    steps = [float(step) for step in range(every, STEPS + 1, every)]
    return Curve(steps, [of(step) + draw.gauss(0, noise) for step in steps])


def curves(
    train: Callable[[float], float] = falling,
    validation: Callable[[float], float] | None = falling,
    *,
    noise: float = 0.0,
    seed: int = 0,
    evaluations: int = 10,
    **more: object,
) -> Curves:
    none = Curve([], [])
    return Curves(
        train=curve(train, every=10, noise=3 * noise, seed=seed + 1),
        validation=none
        if validation is None
        else curve(validation, every=STEPS // evaluations, noise=noise, seed=seed),
        **({"gradient_norm": none} | more),  # type: ignore[arg-type]
    )


def kinds(found: Sequence[Finding]) -> list[str]:
    return [finding.kind for finding in found]


def overfitted(step: float) -> float:
    return falling(step) + max(0.0, step - 160) * 0.002


@pytest.mark.parametrize("seed", range(20))
def test_overfitting_names_the_best_step_and_what_rose(seed: int) -> None:
    found = read_curves(curves(lambda s: falling(s, end=0.6, over=120), overfitted, noise=0.004, seed=seed))
    assert kinds(found)[0] == "overfitting"
    assert found[0].steps == (160.0, 400.0)
    assert "step 160" in found[0].text
    assert "step 400" in found[0].text
    assert "training.early_stopping" in found[0].advice


def test_overfitting_in_three_epochs_is_seen_and_needs_a_fall_of_the_training_loss() -> None:
    train = Curve([float(s) for s in range(10, 310, 10)], [2.0 - 0.005 * s for s in range(10, 310, 10)])
    validation = Curve([100.0, 200.0, 300.0], [1.5, 1.7, 1.95])
    none = Curve([], [])
    assert kinds(read_curves(Curves(train, validation, none))) == ["overfitting"]
    flat = Curve(train.steps, [1.4] * 30)
    assert "overfitting" not in kinds(read_curves(Curves(flat, validation, none)))
    kept = read_curves(Curves(train, validation, none, kept_by="eval_loss"))
    assert kept[0].advice == "The adapter kept is that of the best evaluation by eval_loss."


def test_one_evaluation_behind_the_best_or_a_small_rise_is_no_overfitting() -> None:
    train = Curve([float(s) for s in range(10, 310, 10)], [2.0 - 0.005 * s for s in range(10, 310, 10)])
    for values in ([1.9, 1.5, 1.7], [1.5, 1.51, 1.52], [1.5, 1.75, 1.6]):
        found = read_curves(Curves(train, Curve([100.0, 200.0, 300.0], values), Curve([], [])))
        assert "overfitting" not in kinds(found), values


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_that_still_falls_says_train_longer(seed: int) -> None:
    found = read_curves(curves(validation=lambda s: 3.0 - 0.003 * s, noise=0.004, seed=seed))
    assert kinds(found) == ["still_improving"]
    assert found[0].steps[1] == 400.0
    assert "Train longer" in found[0].advice


def test_a_plateau_names_where_it_began() -> None:
    found = read_curves(curves(validation=lambda s: falling(s, over=25)))
    assert kinds(found) == ["plateau"]
    # 1.5 exp(-s / 25) is below 0.5 % of 1.5 from step 133 on.
    assert found[0].steps == (160.0, 400.0)


def test_divergence_is_first_and_says_it_alone() -> None:
    def exploding(step: float) -> float:
        return falling(step) if step < 200 else 3.0 + 0.02 * (step - 200)

    found = read_curves(curves(exploding, exploding, noise=0.01))
    assert kinds(found)[0] == "diverged"
    assert "rate_too_high" not in kinds(found)
    assert "learning_rate" in found[0].advice


def test_an_early_rise_says_that_the_rate_is_too_high() -> None:
    def hump(step: float) -> float:
        return falling(step) + 2.0 * math.exp(-(((step - 60) / 25) ** 2))

    assert kinds(read_curves(curves(hump, falling, noise=0.01)))[0] == "rate_too_high"


def test_a_loss_that_never_moved_is_said_to_have_a_low_rate_only_with_the_base_known() -> None:
    def flat(_: float) -> float:
        return 2.0

    found = read_curves(curves(flat, flat, noise=0.001, loss_change=-0.002))
    assert kinds(found) == ["rate_too_low"]
    assert "or there is little to learn" in found[0].text
    assert "rate_too_low" not in kinds(read_curves(curves(flat, flat, noise=0.001)))
    assert "rate_too_low" not in kinds(read_curves(curves(flat, flat, noise=0.001, loss_change=-0.8)))


def test_spikes_of_the_gradient_norm_are_named_by_step() -> None:
    norm = Curve(
        [float(s) for s in range(1, 101)], [9.0 if s < 5 else 40.0 if s in (50, 71) else 0.5 for s in range(1, 101)]
    )
    found = read_curves(curves(gradient_norm=norm))
    assert kinds(found)[0] == "spikes"
    assert "steps 50, 71" in found[0].text
    assert found[0].steps == (50.0, 71.0)
    heavy = Curve(norm.steps, [0.1 if s % 3 else 5.0 for s in range(100)])
    assert "spikes" not in kinds(read_curves(curves(gradient_norm=heavy)))


def test_a_noisy_validation_loss_is_called_noisy() -> None:
    found = read_curves(curves(validation=lambda _: 2.0, noise=0.2, seed=4))
    assert kinds(found) == ["noisy"]


def test_a_metric_that_worsens_while_the_loss_improves_is_named_beyond_chance() -> None:
    def f1(step: float) -> float:
        return 0.8 if step <= 120 else 0.8 - 0.001 * (step - 120)

    task = TaskCurve("yes_no_macro_f1", curve(f1, every=40), "higher")
    found = read_curves(curves(tasks=[task], answered_rows=1000))
    assert "metric_worsens" in kinds(found)
    worse = found[kinds(found).index("metric_worsens")]
    assert "yes_no_macro_f1 in training.early_stopping.metric" in worse.advice
    assert "metric_worsens" not in kinds(read_curves(curves(tasks=[task], answered_rows=20)))
    rising = TaskCurve("number_mae", curve(lambda s: 100 + s, every=40), "lower")
    assert "metric_worsens" in kinds(read_curves(curves(tasks=[rising])))
    better = TaskCurve("number_within_20", rising.curve, "higher")
    assert "metric_worsens" not in kinds(read_curves(curves(tasks=[better])))


def test_without_validation_that_is_said_and_nothing_logged_says_nothing() -> None:
    assert kinds(read_curves(curves(validation=None))) == ["no_validation"]
    assert kinds(read_curves(curves(evaluations=2))) == ["few_evaluations"]
    none = Curve([], [])
    assert read_curves(Curves(none, none, none)) == []


def test_at_most_four_findings_each_with_steps_and_advice() -> None:
    norm = Curve([float(s) for s in range(1, 101)], [40.0 if s == 50 else 0.5 for s in range(1, 101)])
    task = TaskCurve("bleu", curve(lambda s: 40 - 0.05 * s, every=40), "higher")

    def hump(step: float) -> float:
        return falling(step) + 2.0 * math.exp(-(((step - 60) / 25) ** 2))

    found = read_curves(curves(hump, lambda s: 3.0 - 0.003 * s, gradient_norm=norm, tasks=[task]))
    assert kinds(found) == ["rate_too_high", "metric_worsens", "spikes", "still_improving"]
    assert len(found) == MOST_FINDINGS
    assert all(finding.advice and finding.steps[0] <= finding.steps[1] for finding in found)


# A rule may speak of noise, and a plateau is one; but of no course that is not there.
@pytest.mark.parametrize("evaluations", [3, 4, 5, 8, 20])
@pytest.mark.parametrize("noise", [0.002, 0.01, 0.05])
def test_noise_alone_raises_no_false_alarm(evaluations: int, noise: float) -> None:
    alarms: Counter[str] = Counter()
    for seed in range(200):
        draw = random.Random(seed)
        norm = Curve([float(s) for s in range(1, 101)], [draw.lognormvariate(-1, 0.4) for _ in range(100)])
        rows = 200
        share = curve(lambda _: 0.7, every=STEPS // evaluations, noise=math.sqrt(0.7 * 0.3 / rows) / 2, seed=seed)
        found = read_curves(
            curves(
                validation=lambda s: falling(s, over=30),
                noise=noise,
                seed=1000 + 2 * seed,
                evaluations=evaluations,
                gradient_norm=norm,
                tasks=[TaskCurve("yes_no_accuracy", share, "higher")],
                answered_rows=rows,
                loss_change=-0.4,
            )
        )
        alarms.update(kinds(found))
    for kind in ("plateau", "noisy"):
        alarms.pop(kind, None)
    assert sum(alarms.values()) <= 2, alarms


def test_noise_is_measured_around_a_straight_course() -> None:
    line = [3 - 0.1 * place for place in range(40)]
    assert noise_of(line) == pytest.approx(0, abs=1e-9)
    draw = random.Random(0)
    assert noise_of([value + draw.gauss(0, 0.05) for value in line]) == pytest.approx(0.05, rel=0.5)
    assert noise_of([1.0, 2.0, 1.0, 2.0]) is None


def test_task_curves_begin_with_the_watched_figure(tmp_path: Path) -> None:
    config = config_values()
    config["training"]["early_stopping"] = {"metric": "eval_yes_no_f1_no", "mode": "auto", "patience": 2}
    rows = [
        {
            "step": s,
            "eval_loss": 1.0,
            "eval_yes_no_accuracy": 0.5,
            "eval_yes_no_f1_no": s / 100,
            "eval_length_tokens": 3.0,
        }
        for s in (10, 20)
    ]
    facts = load_facts(build_run(tmp_path, config=config, metrics=rows))
    assert watched_figure(facts) == "yes_no_f1_no"
    assert [(task.figure, task.watched, task.better) for task in task_curves(facts)] == [
        ("yes_no_f1_no", True, "higher"),
        ("yes_no_accuracy", False, "higher"),
    ]


def test_of_a_step_logged_twice_the_last_counts() -> None:
    rows = [{"step": 2, "loss": 5.0}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 4.0}]
    assert read_curve(rows, "loss") == Curve([1, 2], [3.0, 4.0])
