"""Loss and perplexity: totals over tokens, and the paired interval of a difference."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from loralab.config.schema import LoraConfig
from loralab.evaluation.answers import Evidence
from loralab.evaluation.forwards import Interrupted
from loralab.evaluation.metrics.losses import PERPLEXITY
from loralab.evaluation.metrics.measure import compare
from loralab.evaluation.metrics.measure import measure as measure_metrics
from loralab.evaluation.perplexity import SplitLoss, compare_losses, measure_loss, perplexity_of
from loralab.layout.planner import Planner
from loralab.models.adapters import build_adapter
from loralab.progress import Reporter
from support import tiny
from support.layouts import ALWAYS_SHARE
from unit.layout.examples import example

CPU = torch.device("cpu")
PADDED = Planner(4096, layout="padded")
PLANNERS = [
    PADDED,
    Planner(9, layout="padded"),
    Planner(4096, layout="packed"),
    Planner(12, layout="packed"),
    Planner(4096, cost=ALWAYS_SHARE),
    Planner(20, cost=ALWAYS_SHARE),
]


def losses(totals: Any, counts: Any, means: Any = (), entropies: Any = (0.0,), correct: Any = (0.0,)) -> SplitLoss:
    return SplitLoss(*(np.asarray(values, dtype=np.float64) for values in (totals, counts, means, entropies, correct)))


def test_split_loss_by_hand() -> None:
    assert losses([6.0, 1.0], [2, 8], [3.0, 0.125], [4.0, 9.0], [1, 4]).as_dict() == {
        "eval_loss": 0.7,
        "perplexity": math.exp(0.7),
        "eval_loss_batch_mean": 1.5625,
        "num_batches": 2,
        "num_examples": 2,
        "supervised_tokens": 10,
        "token_accuracy": 0.5,
        "token_entropy": 1.3,
    }


def test_perplexity_beyond_a_float_is_infinite() -> None:
    assert perplexity_of(0.0) == 1.0
    assert perplexity_of(1000.0) == math.inf
    assert losses([5000.0], [1]).perplexity == math.inf


def test_split_without_examples_has_no_batch_mean() -> None:
    empty = losses([], [], [], [], []).as_dict()
    assert math.isnan(empty["eval_loss_batch_mean"])
    names = ("eval_loss", "supervised_tokens", "token_accuracy", "token_entropy")
    assert [empty[name] for name in names] == [0.0, 0, 0.0, 0.0]


@pytest.fixture(scope="module")
def model() -> Any:
    built = build_adapter(tiny.build_model("gpt2", vocabulary=64), LoraConfig(r=2, dropout=0.5), seed=0)[0]
    built.tree_kernel = "per_tree"
    return built


def _examples() -> list[Any]:
    draw = np.random.default_rng(0)

    def ids(most: int) -> list[int]:
        return draw.integers(0, 64, draw.integers(1, most)).tolist()

    singles = [example((ids(9), ids(6)), row=i) for i in range(6)]
    prompt, answer = ids(9), ids(6)
    return [*singles, example((prompt, answer), ([*prompt, *answer, *ids(4)], ids(5)), ([3, 4], [5]))]


def measure(model: Any, examples: Any, *, batch_size: int, planner: Planner = PADDED, **options: Any) -> SplitLoss:
    options = {"device": CPU, "reporter": Reporter(), "label": "x", **options}
    return measure_loss(model, examples, planner=planner, batch_size=batch_size, **options)


@pytest.mark.parametrize("planner", PLANNERS, ids=lambda planner: f"{planner.layout}-{planner.token_budget}")
def test_loss_does_not_depend_on_layout_and_batch_size(model: Any, planner: Planner) -> None:
    examples = _examples()
    alone = measure(model, examples, batch_size=1)
    assert alone.counts.tolist() == [each.supervised_tokens for each in examples]
    np.testing.assert_allclose(alone.batch_means, alone.totals / alone.counts, rtol=1e-6)
    for size in (1, 2, 3, 99):
        other = measure(model, examples, batch_size=size, planner=planner)
        np.testing.assert_allclose(other.totals, alone.totals, rtol=1e-5)
        np.testing.assert_allclose(other.entropies, alone.entropies, rtol=1e-5)
        assert other.correct.tolist() == alone.correct.tolist()
        assert other.counts.tolist() == alone.counts.tolist()
        assert len(other.batch_means) == math.ceil(len(examples) / size)
        starts = range(0, len(examples), size)
        means = [other.totals[i : i + size].sum() / other.counts[i : i + size].sum() for i in starts]
        np.testing.assert_allclose(other.batch_means, means, rtol=1e-6)


def test_figures_are_those_of_transformers_own_logits(model: Any) -> None:
    examples = _examples()
    measured = measure(model, examples, batch_size=2)
    model.eval()
    for number, each in enumerate(examples):
        loss, entropy, correct = 0.0, 0.0, 0
        for branch in each.branches:
            prompt, answer = branch.prompt_ids.tolist(), torch.from_numpy(branch.answer_ids).long()
            with torch.no_grad():
                own = model(input_ids=torch.tensor([[*prompt, *answer.tolist()]])).logits[0, len(prompt) - 1 : -1]
            likely = torch.distributions.Categorical(logits=own.double())
            loss -= float(likely.log_prob(answer).sum())
            entropy += float(likely.entropy().sum())
            correct += int((own.argmax(dim=-1) == answer).sum())
        assert measured.totals[number] == pytest.approx(loss, rel=1e-5)
        assert measured.entropies[number] == pytest.approx(entropy, rel=1e-5)
        assert measured.correct[number] == correct


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_mode_alone_and_uses_no_dropout(model: Any, training: bool) -> None:
    model.train(training)
    first, second = (measure(model, _examples(), batch_size=4).loss for _ in "ab")
    assert model.training is training
    assert first == second


def test_progress_and_interruption(model: Any) -> None:
    seen: list[Any] = []

    class Notes(Reporter):
        def progress(self, label: str, done: int, total: int | None, *, detail: str = "") -> None:
            seen.append((label, done, total))

        def finish(self, label: str) -> None:
            seen.append(label)

    options: dict[str, Any] = {"batch_size": 3, "reporter": Notes(), "label": "validate"}
    measure(model, _examples(), **options)
    assert seen == [("validate", 3, 7), ("validate", 6, 7), ("validate", 7, 7), "validate"]
    seen.clear()
    with pytest.raises(Interrupted):
        measure(model, _examples(), **options, should_stop=lambda: len(seen) == 1)
    assert seen == [("validate", 3, 7)]


def _pair(rows: int, *, shift: float) -> tuple[SplitLoss, SplitLoss]:
    draw = np.random.default_rng(1)
    counts = draw.integers(5, 30, rows).astype(float)
    base = counts * draw.normal(2.0, 0.3, rows)
    adapter = base + counts * draw.normal(shift, 0.2, rows)
    return losses(adapter, counts), losses(base, counts)


def test_difference_by_hand() -> None:
    result = compare_losses(losses([1.0, 3.0], [1, 3]), losses([2.0, 5.0], [1, 3]), resamples=50)
    assert result["eval_loss"] == -0.75
    assert -1.0 <= result["low"] <= -0.75 <= result["high"] <= -2 / 3
    assert result["level"] == 0.95
    assert "50 resamples" in result["method"]


def test_identical_losses_differ_by_nothing() -> None:
    adapter, _ = _pair(40, shift=0.0)
    result = compare_losses(adapter, adapter, resamples=50)
    assert result["eval_loss"] == 0.0
    assert result["low"] <= 0.0 <= result["high"]


def test_one_example_leaves_nothing_to_resample() -> None:
    result = compare_losses(losses([1.0], [2]), losses([2.0], [2]), resamples=50)
    assert (result["eval_loss"], result["low"], result["high"]) == (-0.5, None, None)
    assert result["method"] == "none: one row leaves nothing to resample"
    assert result["verdict"] == "no difference seen at n = 1"


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_losses_that_are_no_numbers_prove_nothing(value: float) -> None:
    result = compare_losses(losses([value, 1.0], [2, 2]), losses([2.0, 3.0], [2, 2]), resamples=50)
    assert (result["low"], result["high"]) == (None, None)
    assert result["verdict"] == "no difference seen at n = 2"
    assert "not finite" in result["reason"]
    assert "swap_p" not in result


def test_two_examples_prove_nothing_though_their_interval_leaves_out_zero() -> None:
    result = compare_losses(losses([30.0, 31.0], [10, 10]), losses([29.9, 30.8], [10, 10]), resamples=200)
    assert result["low"] > 0
    assert result["verdict"] == "no difference seen at n = 2"
    assert result["reason"] == "the interval leaves out 0, but the swap test has p = 0.5 (2 rows differ)"


@pytest.mark.parametrize("rows", [6, 10, 15])
def test_chance_is_taken_for_a_difference_as_seldom_as_stated(rows: int) -> None:
    """Differences of heavy tails around 0: of few rows, intervals alone leave out 0 twice as often as they say."""
    rng, counts, seen, every = np.random.default_rng(rows), np.full(rows, 10.0), 0, 400
    for _ in range(every):
        nats = rng.standard_t(3, size=rows)
        result = compare_losses(losses(30 + nats, counts), losses(np.full(rows, 30.0), counts), resamples=200)
        seen += not result["verdict"].startswith("no difference")
    assert seen / every <= 0.075  # 0.05 and two standard errors


def test_the_verdict_is_that_of_the_metric() -> None:
    for shift in (-0.3, -0.03, 0.0, 0.3):
        sides = _pair(60, shift=shift)
        measured = [
            measure_metrics({"p": PERPLEXITY}, Evidence(units=60, losses=side), resamples=300) for side in sides
        ]
        difference = compare_losses(*sides, resamples=300)
        found = compare(*measured, resamples=300)["perplexity"]
        for key in ("verdict", "reason", "method", "swap_p", "swap_method"):
            assert difference[key] == found[key]


@pytest.mark.parametrize(("shift", "better"), [(-0.3, True), (0.0, False)])
def test_interval_tells_a_difference_from_noise(shift: float, better: bool) -> None:
    result = compare_losses(*_pair(200, shift=shift), resamples=500)
    assert result["low"] < result["eval_loss"] < result["high"]
    assert (result["high"] < 0) is better
    assert result["verdict"] == ("better" if better else "no difference seen at n = 200")
    wider = compare_losses(*_pair(200, shift=shift), resamples=500, level=0.99)
    assert wider["low"] < result["low"]
    assert wider["high"] > result["high"]
    assert compare_losses(*_pair(200, shift=shift), resamples=500) == result


def test_the_interval_is_that_of_scipy() -> None:
    adapter, base = _pair(400, shift=-0.1)
    ours = compare_losses(adapter, base, resamples=4000)
    theirs = stats.bootstrap(
        (adapter.totals - base.totals, adapter.counts), lambda n, c, axis=-1: n.sum(axis=axis) / c.sum(axis=axis),
        paired=True, vectorized=True, n_resamples=4000, method="percentile", rng=np.random.default_rng(4),
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert abs(ours["low"] - theirs.low) < 0.1 * width
    assert abs(ours["high"] - theirs.high) < 0.1 * width
