"""Whether the adapter helped, in words: by the loss and by the task."""

from pathlib import Path
from typing import Any

import pytest

from loralab.reports.facts import load_facts
from loralab.reports.verdict import Verdict, assess
from unit.reports import run_folders
from unit.reports.run_folders import build_whole_run, evaluation


def judge(path: Path, **changes: Any) -> Verdict:
    return assess(load_facts(build_whole_run(path, **changes)))


def plain(verdict: Verdict) -> str:
    return verdict.sentence.replace("\u00a0", " ")


def test_a_lower_loss_is_better(tmp_path: Path) -> None:
    verdict = judge(tmp_path)
    assert verdict.outcome == "better"
    assert plain(verdict) == "Loss is lower by 1.32 nats per token (95 % interval 1.25 to 1.39, 99 rows)."
    assert verdict.caveats == ()


def test_a_higher_loss_is_worse(tmp_path: Path) -> None:
    verdict = judge(tmp_path, evaluation=evaluation(change=0.02, low=0.01, high=0.03))
    assert verdict.outcome == "worse"
    assert verdict.headline.startswith("No")
    assert "higher by 0.020 nats per token (95 % interval 0.010 to 0.030" in plain(verdict)


@pytest.mark.parametrize(("low", "high"), [(-0.05, 0.03), (0.0, 0.03), (-0.05, 0.0), (0.0, 0.0)])
def test_an_interval_that_holds_zero_is_no_difference(tmp_path: Path, low: float, high: float) -> None:
    verdict = judge(tmp_path, evaluation=evaluation(change=(low + high) / 2, low=low, high=high))
    assert (verdict.outcome, verdict.headline) == ("none", "No difference seen")


def test_no_difference_names_the_interval(tmp_path: Path) -> None:
    verdict = judge(tmp_path, evaluation=evaluation(change=-0.01, low=-0.05, high=0.03))
    assert "interval of the change from -0.050 to +0.030" in plain(verdict)


def test_a_test_that_disagrees_is_no_difference(tmp_path: Path) -> None:
    content = evaluation(change=0.015, low=0.01, high=0.02)
    why = "the interval leaves out 0, but the swap test has p = 1 (2 rows differ)"
    content["difference"] |= {"verdict": "no difference seen at n = 2", "reason": why}
    verdict = judge(tmp_path, evaluation=content)
    assert (verdict.outcome, verdict.headline) == ("none", "No difference seen")
    assert plain(verdict) == (
        f"Loss is higher by 0.015 nats per token, which may be chance: {why}; 95 % interval of the change from +0.010 "
        "to +0.020, 99 rows."
    )


def test_a_record_without_a_verdict_is_not_judged_by_its_interval(tmp_path: Path) -> None:
    content = evaluation()
    del content["difference"]["verdict"]
    verdict = judge(tmp_path, evaluation=content)
    assert (verdict.outcome, verdict.headline[:4]) == ("unknown", "Loss")
    assert "was not judged" in verdict.headline


@pytest.mark.parametrize("bound", [None, float("nan")])
def test_without_an_interval_nothing_is_promised(tmp_path: Path, bound: float | None) -> None:
    verdict = judge(tmp_path, evaluation=evaluation(low=bound, high=bound))
    assert verdict.outcome == "unknown"
    assert "no interval" in verdict.sentence
    assert "Yes" not in verdict.headline


@pytest.mark.parametrize("content", [{}, {"eval_loss": 1.0}, evaluation(change=float("nan"))])
def test_without_a_difference_it_is_not_measured(tmp_path: Path, content: dict[str, Any]) -> None:
    assert judge(tmp_path, evaluation=content).outcome == "missing"


def test_a_run_without_held_out_data_says_why_nothing_was_measured(tmp_path: Path) -> None:
    config = run_folders.config_values()
    config["data"]["validation"] = None
    assert "no validation and no test data" in judge(tmp_path, evaluation={}, config=config).sentence


@pytest.mark.parametrize(
    ("change", "caveat"),
    [({"split": "train"}, "trained on"), ({"split": "validation"}, "same rows"), ({"num_examples": 7}, "Few rows (7)")],
)
def test_what_weakens_a_result_is_said(tmp_path: Path, change: dict[str, Any], caveat: str) -> None:
    verdict = judge(tmp_path, evaluation=evaluation() | change)
    assert len(verdict.caveats) == 1
    assert caveat in verdict.caveats[0]


def task(loss: str = "better", /, **verdicts: str) -> dict[str, Any]:
    """Return an evaluation of these verdicts; `none` is no difference seen."""
    bounds = {"better": (-1.4, -1.2), "worse": (0.1, 0.3), "none": (-0.1, 0.2)}[loss]
    content = evaluation(change=sum(bounds) / 2, low=bounds[0], high=bounds[1])
    words = {"none": "no difference seen at n = 99"}
    return content | {"differences": {name: {"verdict": words.get(each, each)} for name, each in verdicts.items()}}


@pytest.mark.parametrize(
    ("content", "outcome", "headline"),
    [
        (task(number_mae="better"), "better", "Yes: loss on the test split is lower, number_mae is better"),
        (
            task(yes_no_accuracy="better", yes_no_macro_f1="better", number_mae="none"),
            "better",
            "Yes: loss on the test split is lower, yes_no_accuracy and yes_no_macro_f1 are better",
        ),
        (task(number_mae="worse"), "mixed", "Mixed: loss on the test split is lower, but number_mae is worse"),
        (
            task(number_mae="worse", rougeL="better"),
            "mixed",
            "Mixed: loss on the test split is lower, rougeL is better, number_mae is worse",
        ),
        (
            task(yes_no_macro_f1="none"),
            "mixed",
            "Loss on the test split is lower; no difference seen in yes_no_macro_f1",
        ),
        (
            task(yes_no_macro_f1="none", calibration_ece="better"),
            "mixed",
            "Loss on the test split is lower; no difference seen in yes_no_macro_f1 (calibration_ece is better)",
        ),
        (task("worse", bleu="better"), "mixed", "Mixed: loss on the test split is higher, but bleu is better"),
        (task("worse", bleu="worse"), "worse", "No: loss on the test split is higher, bleu is worse"),
        (task("none", bleu="better"), "better", "Yes: bleu is better; no difference seen in the loss"),
        (task("none", bleu="worse"), "worse", "No: bleu is worse; no difference seen in the loss"),
        (task("none", bleu="none"), "none", "No difference seen in bleu, nor in the loss"),
        (task(mine="worse"), "mixed", "Mixed: loss on the test split is lower, but mine is worse"),
        # Not the task's: figures of the loss, of no direction, and those that are not a metric's first.
        (task(token_accuracy="worse", perplexity="worse"), "better", "Yes: loss on the test split is lower"),
        (task(length_tokens="lower", number_rmse="worse"), "better", "Yes: loss on the test split is lower"),
    ],
)
def test_the_headline_goes_by_the_task_too(
    tmp_path: Path, content: dict[str, Any], outcome: str, headline: str
) -> None:
    verdict = judge(tmp_path, evaluation=content)
    assert (verdict.outcome, verdict.headline) == (outcome, headline)


def test_the_watched_figure_decides(tmp_path: Path) -> None:
    config = run_folders.config_values()
    config["training"]["metric_for_best_model"] = "yes_no_f1_no"
    config["training"]["load_best_model_at_end"] = True
    content = task(yes_no_accuracy="better", yes_no_f1_no="none")
    verdict = judge(tmp_path, evaluation=content, config=config)
    assert (verdict.outcome, verdict.headline) == (
        "mixed",
        "Loss on the test split is lower; no difference seen in yes_no_f1_no (yes_no_accuracy is better)",
    )


BOTH_YES = "Base model and adapter both answer \u201cyes\u201d to every row"


def matrix(*counts: list[int]) -> dict[str, Any]:
    return {"yes_no": {"classes": ["yes", "no"], "columns": ["yes", "no", "unparsable"], "confusion_matrix": counts}}


@pytest.mark.parametrize(
    ("ours", "theirs", "caveat"),
    [
        ([[70, 0, 0], [30, 0, 0]], [[70, 0, 0], [30, 0, 0]], BOTH_YES),
        ([[0, 70, 0], [0, 30, 0]], [[70, 0, 0], [30, 0, 0]], "The adapter answers \u201cno\u201d to every row"),
        ([[70, 0, 0], [29, 1, 0]], [[70, 0, 0], [30, 0, 0]], None),
        ([[0, 0, 70], [0, 0, 30]], [[0, 0, 70], [0, 0, 30]], None),  # unparsable answers need not be the same
        ([[1, 0, 0], [0, 0, 0]], [[1, 0, 0], [0, 0, 0]], None),
    ],
)  # fmt: skip
def test_one_answer_to_every_row_is_said(
    tmp_path: Path, ours: list[list[int]], theirs: list[list[int]], caveat: str | None
) -> None:
    content = task(yes_no_macro_f1="none") | {"details": matrix(*ours)}
    content["base"]["details"] = matrix(*theirs)
    caveats = judge(tmp_path, evaluation=content).caveats
    assert caveats == (() if caveat is None else (f"{caveat} (yes_no).",))
