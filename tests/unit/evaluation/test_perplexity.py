"""Loss and perplexity: totals over tokens, and the paired interval of a difference."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from loralab.config.schema import LoraConfig
from loralab.evaluation import perplexity
from loralab.evaluation.perplexity import Interrupted, SplitLoss, compare_losses, measure_loss, perplexity_of
from loralab.models.adapters import build_adapter
from loralab.progress import Reporter
from support import tiny
from unit.layout.examples import example

CPU = torch.device("cpu")


def losses(totals: list[float], counts: list[float], means: list[float] = []) -> SplitLoss:  # noqa: B006
    return SplitLoss(np.asarray(totals), np.asarray(counts), np.asarray(means))


def test_split_loss_by_hand() -> None:
    assert losses([6.0, 1.0], [2, 8], [3.0, 0.125]).as_dict() == {
        "eval_loss": 0.7,
        "perplexity": math.exp(0.7),
        "eval_loss_batch_mean": 1.5625,
        "num_batches": 2,
        "num_examples": 2,
        "supervised_tokens": 10,
    }


def test_perplexity_beyond_a_float_is_infinite() -> None:
    assert perplexity_of(0.0) == 1.0
    assert perplexity_of(1000.0) == math.inf
    assert losses([5000.0], [1]).perplexity == math.inf


def test_split_without_examples_has_no_batch_mean() -> None:
    empty = losses([], []).as_dict()
    assert math.isnan(empty["eval_loss_batch_mean"])
    assert (empty["eval_loss"], empty["supervised_tokens"]) == (0.0, 0)


@pytest.fixture(scope="module")
def model() -> Any:
    return build_adapter(tiny.build_model("gpt2", vocabulary=64), LoraConfig(r=2, dropout=0.5), seed=0)[0]


def _examples() -> list[Any]:
    draw = np.random.default_rng(0)

    def ids(most: int) -> list[int]:
        return draw.integers(0, 64, draw.integers(1, most)).tolist()

    singles = [example((ids(9), ids(6)), row=i) for i in range(6)]
    prompt, answer = ids(9), ids(6)
    return [*singles, example((prompt, answer), ([*prompt, *answer, *ids(4)], ids(5)), ([3, 4], [5]))]


def test_loss_does_not_depend_on_the_batch_size(model: Any) -> None:
    examples = _examples()
    alone = measure_loss(model, examples, batch_size=1, device=CPU, reporter=Reporter(), label="x")
    assert alone.counts.tolist() == [each.supervised_tokens for each in examples]
    np.testing.assert_allclose(alone.batch_means, alone.totals / alone.counts, rtol=1e-6)
    for size in (2, 3, 99):
        other = measure_loss(model, examples, batch_size=size, device=CPU, reporter=Reporter(), label="x")
        np.testing.assert_allclose(other.totals, alone.totals, rtol=1e-5)
        assert other.counts.tolist() == alone.counts.tolist()
        assert len(other.batch_means) == math.ceil(len(examples) / size)
        starts = range(0, len(examples), size)
        means = [other.totals[i : i + size].sum() / other.counts[i : i + size].sum() for i in starts]
        np.testing.assert_allclose(other.batch_means, means, rtol=1e-6)


def test_totals_are_transformers_own_losses(model: Any) -> None:
    examples = _examples()[:3]
    measured = measure_loss(model, examples, batch_size=2, device=CPU, reporter=Reporter(), label="x")
    model.eval()
    for each, total in zip(examples, measured.totals, strict=True):
        (branch,) = each.branches
        prompt, answer = branch.prompt_ids.tolist(), branch.answer_ids.tolist()
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            own = model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
        assert total == pytest.approx(float(own) * len(answer), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_mode_alone_and_uses_no_dropout(model: Any, training: bool) -> None:
    model.train(training)
    first, second = (
        measure_loss(model, _examples(), batch_size=4, device=CPU, reporter=Reporter(), label="x").loss for _ in "ab"
    )
    assert model.training is training
    assert first == second


def test_progress_and_interruption(model: Any) -> None:
    seen: list[Any] = []

    class Notes(Reporter):
        def progress(self, label: str, done: int, total: int | None, *, detail: str = "") -> None:
            seen.append((label, done, total))

        def finish(self, label: str) -> None:
            seen.append(label)

    options: dict[str, Any] = {"batch_size": 3, "device": CPU, "reporter": Notes(), "label": "validate"}
    measure_loss(model, _examples(), **options)
    assert seen == [("validate", 3, 7), ("validate", 6, 7), ("validate", 7, 7), "validate"]
    seen.clear()
    with pytest.raises(Interrupted):
        measure_loss(model, _examples(), **options, should_stop=lambda: len(seen) == 1)
    assert seen == [("validate", 3, 7)]


def _pair(rows: int, *, shift: float) -> tuple[SplitLoss, SplitLoss]:
    draw = np.random.default_rng(1)
    counts = draw.integers(5, 30, rows).astype(float)
    base = counts * draw.normal(2.0, 0.3, rows)
    adapter = base + counts * draw.normal(shift, 0.2, rows)
    return SplitLoss(adapter, counts, np.zeros(0)), SplitLoss(base, counts, np.zeros(0))


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
    assert result == {"eval_loss": -0.5, "level": 0.95, "low": None, "high": None, "method": "none: one example"}


@pytest.mark.parametrize(("shift", "better"), [(-0.3, True), (0.0, False)])
def test_interval_tells_a_difference_from_noise(shift: float, better: bool) -> None:
    result = compare_losses(*_pair(200, shift=shift), resamples=500)
    assert result["low"] < result["eval_loss"] < result["high"]
    assert (result["high"] < 0) is better
    wider = compare_losses(*_pair(200, shift=shift), resamples=500, level=0.99)
    assert wider["low"] < result["low"]
    assert wider["high"] > result["high"]
    assert compare_losses(*_pair(200, shift=shift), resamples=500) == result


def test_normal_interval_agrees_with_the_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = _pair(400, shift=-0.1)
    bootstrap = compare_losses(*pair, resamples=4000)
    monkeypatch.setattr(perplexity, "_BOOTSTRAP_ROWS", 399)
    normal = compare_losses(*pair, resamples=4000)
    assert normal["method"] != bootstrap["method"]
    assert normal["eval_loss"] == bootstrap["eval_loss"]
    width = bootstrap["high"] - bootstrap["low"]
    assert abs(normal["low"] - bootstrap["low"]) < 0.1 * width
    assert abs(normal["high"] - bootstrap["high"]) < 0.1 * width
