"""Every metric of the table keeps the contract, and names become metrics or clear errors."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from loralab.config.metric_facts import FACTS
from loralab.errors import ConfigError, DataError
from loralab.evaluation.answers import Evidence
from loralab.evaluation.metrics.measure import measure
from loralab.evaluation.metrics.table import METRICS, resolve_metrics
from unit.evaluation.metrics.made import evidence_of, evidence_of_losses

_SCORES = [{"yes": -0.1, "no": -2.5}, {"yes": -3.0, "no": -0.1}, {"yes": -1.0, "no": -0.5}, {"yes": -0.2, "no": -1.9}]


def _evidence(name: str) -> Evidence:
    if METRICS[name].needs == "losses":
        return evidence_of_losses(
            [4.0, 9.0, 2.0, 6.0], [3, 5, 2, 4], lengths=([9, 20, 7, 11], [2, 4, 1, 3]), correct=[1, 2, 2, 1]
        )
    references = ["1 a b c d", "2 a b c d", "30 e", "1 f g h i"] if name == "number" else ["yes", "no", "yes", "no"]
    answers = ["1 a b c d", "3 a a a a a a", "", "1 f"] if name == "number" else ["yes", "no", "no", "yes it is a day"]
    scores = _SCORES if METRICS[name].needs == "scores" else None
    return evidence_of(
        answers, references, units=[0, 1, 1, 2], ids=[3, 4, 0, 9], stopped=[True, True, False, True], scores=scores
    )


@pytest.mark.parametrize("name", METRICS)
def test_entry_keeps_the_contract(name: str) -> None:
    metric, evidence = METRICS[name], _evidence(name)
    rows = metric.statistics(evidence)
    assert rows.dtype == np.float64
    assert rows.shape[0] == evidence.units
    totals = rows.sum(axis=0)
    figures = metric.figures(totals)
    assert set(figures) == set(metric.better)
    stack = np.stack([totals, 2 * totals, rows[0], np.zeros_like(totals)]).reshape(2, 2, -1)
    stacked = metric.figures(stack)
    for figure, value in figures.items():
        assert stacked[figure].shape == (2, 2)
        np.testing.assert_allclose(stacked[figure][0, 0], value)
        np.testing.assert_allclose(stacked[figure][1, 0], metric.figures(rows[0])[figure])
        assert math.isnan(stacked[figure][1, 1]), f"{figure} is {stacked[figure][1, 1]} of nothing"
        if name != "bleu":  # a ratio, so what is there twice changes nothing; BLEU smooths by counts
            np.testing.assert_allclose(stacked[figure][0, 1], value)
    assert metric.count(stack).shape == (2, 2)
    assert metric.count(totals) > 0
    assert metric.summary.endswith(".")
    assert metric.source
    if metric.per_answer is not None:
        assert metric.per_answer(evidence).shape == (len(evidence.answers),)
    if metric.share_of_right is not None:
        assert set(metric.per_answer(evidence)) <= {0.0, 1.0}
        assert figures[metric.share_of_right] == pytest.approx(metric.per_answer(evidence).mean())
    assert set(metric.shares) <= set(metric.better)


def test_table_has_what_a_configuration_may_name() -> None:
    assert list(METRICS) == list(FACTS)
    figures = [figure for metric in METRICS.values() for figure in metric.better]
    assert len(figures) == len(set(figures))


def test_names_are_resolved_in_order() -> None:
    chosen = resolve_metrics(["rouge", "exact_match"])
    assert list(chosen) == ["rouge", "exact_match"]
    assert chosen["rouge"] is METRICS["rouge"]
    assert resolve_metrics([]) == {}


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["exact_mach"], "did you mean 'exact_match'"),
        (["bleu", "bleu"], "'bleu' stands twice"),
        (["f1"], "no such metric: 'f1'"),
        (["own metrics:score"], "is no function's name"),
        (["package:"], "is no function's name"),
        ([":score"], "is no function's name"),
        (["no_such_package_of_ours.module:score"], "cannot be imported: ModuleNotFoundError"),
        (["math:sine"], "sine does not exist in module math"),
        (["math:pi"], "pi is no function in module math"),
    ],
)
def test_names_that_cannot_be_used(names: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_metrics(names)
    assert says in str(caught.value)
    assert caught.value.problems[0].where == "key evaluation.metrics"


_OWN = """
def same_length(answers, references):
    return [len(a) == len(r) for a, r in zip(answers, references, strict=True)]

def characters_off(answers, references):
    CALLS.append(len(answers))
    return [abs(len(a) - len(r)) for a, r in zip(answers, references, strict=True)]

characters_off.better = "lower"
CALLS = []

def short(answers, references):
    return [1.0]

def words(answers, references):
    return ["good"] * len(answers)

def undefined(answers, references):
    return [float("nan")] * len(answers)

def broken(answers, references):
    return [1 / (len(a) - len(a)) for a in answers]

def nothing(answers, references):
    return None

def rouge1(answers, references):
    return [0.0] * len(answers)

def sideways(answers, references):
    return [0.0] * len(answers)

sideways.better = "left"
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_metrics_of_a_user.py").write_text(_OWN)
    (tmp_path / "broken_module_of_a_user.py").write_text("raise RuntimeError('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_metrics_of_a_user", raising=False)
    return "own_metrics_of_a_user"


def test_function_of_the_user(own: str) -> None:
    name = f"{own}:characters_off"
    metrics = resolve_metrics([name, f"{own}:same_length"])
    found = measure(metrics, evidence_of(["ab", "c", ""], ["ab", "abc", "x"], units=[0, 0, 1]), resamples=100)
    assert found.values == {"characters_off": pytest.approx(1.0), "same_length": pytest.approx(1 / 3)}
    assert found.figures["characters_off"].better == "lower"
    assert found.figures["same_length"].better == "higher"
    assert found.figures["characters_off"].count == 3
    assert found.per_answer[name].tolist() == [0, -2, -1]
    assert sys.modules[own].CALLS == [3]  # called once: it may be slow, or random


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("short", "gave 1 scores for 2 answers"),
        ("words", "gave 'good' for answer 1"),
        ("undefined", "gave nan for answer 1"),
        ("broken", "failed in own_metrics_of_a_user.py line 22: ZeroDivisionError"),
        ("nothing", "failed: TypeError"),
    ],
)
def test_function_that_gives_something_else(own: str, function: str, says: str) -> None:
    metrics = resolve_metrics([f"{own}:{function}"])
    with pytest.raises(DataError) as caught:
        measure(metrics, evidence_of(["a", "b"], ["a", "b"]), resamples=10)
    assert says in str(caught.value)
    assert f"{own}:{function}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("own_metrics_of_a_user:rouge1", "gives a figure 'rouge1', and so does metric 'rouge'"),
        ("own_metrics_of_a_user:sideways", "its attribute better is 'left'"),
        ("broken_module_of_a_user:score", "cannot be imported: RuntimeError: no licence"),
    ],
)
@pytest.mark.usefixtures("own")
def test_function_that_cannot_be_a_metric(name: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_metrics([name])
    assert says in str(caught.value)


def test_current_folder_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module_in_the_current_folder.py").write_text("def score(a, r): return [0.0] * len(a)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    with pytest.raises(ConfigError, match="PYTHONPATH"):
        resolve_metrics(["module_in_the_current_folder:score"])
