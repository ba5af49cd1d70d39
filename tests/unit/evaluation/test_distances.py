"""Distances between base and adapter: closed forms, extreme logits, and the plain computation on whole models."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from scipy import stats
from torch import Tensor

from loralab.config.schema import LoraConfig
from loralab.errors import ModelError
from loralab.evaluation import distances
from loralab.evaluation.distances import DISTANCES, mean_intervals, measure_branches, measure_distances
from loralab.evaluation.forwards import Interrupted
from loralab.layout.planner import Planner
from loralab.models.adapters import build_adapter
from loralab.models.supervised import SupervisedPeftModel
from loralab.progress import Reporter
from support.families import build_family
from support.layouts import ALWAYS_SHARE, draw_adapter, sharing_rows

VOCABULARY = 64
CPU = torch.device("cpu")
PLANNERS = [Planner(4096, layout="padded"), Planner(30, layout="packed"), Planner(4096, cost=ALWAYS_SHARE)]
BRANCHES = [branch for row in sharing_rows(0, vocabulary=VOCABULARY) for branch in row.branches]


def measured(base: Tensor, adapter: Tensor) -> dict[str, Tensor]:
    return dict(zip(DISTANCES, measure_distances(base, adapter), strict=True))


def test_identical_logits_have_no_distance_and_agree() -> None:
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)) * 10
    for name, found in measured(logits, logits.clone()).items():
        assert found.tolist() == [1.0 if name == "top1_agreement" else 0.0] * 5, name


@pytest.mark.parametrize("shift", [-3.0, -1e-6, 1e-6, 0.5, 20.0])
def test_one_shifted_logit_has_the_analytic_divergence(shift: float) -> None:
    base = torch.randn(1, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    adapter = base.clone()
    adapter[0, 2] += shift
    share = float(base.softmax(-1)[0, 2])
    scale = math.log1p(share * math.expm1(shift))  # log of what the normaliser grows by
    found = {name: float(value) for name, value in measured(base, adapter).items()}
    exact = {"rel": 1e-6, "abs": 1e-15}
    assert found["kl_base_adapter"] == pytest.approx(scale - share * shift, **exact)
    assert found["kl_adapter_base"] == pytest.approx(share * math.exp(shift - scale) * shift - scale, **exact)
    assert found["l2_logits"] == pytest.approx(abs(shift), rel=1e-9)
    assert found["l2_logits_centred"] == pytest.approx(abs(shift) * math.sqrt(1 - 1 / 7), rel=1e-6)


def test_two_tokens_by_hand() -> None:
    base = torch.tensor([[math.log(3.0), 0.0]])  # 3/4, 1/4
    adapter = torch.tensor([[0.0, 0.0]])
    found = {name: float(value) for name, value in measured(base, adapter).items()}
    assert found["kl_base_adapter"] == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert found["kl_adapter_base"] == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), rel=1e-6)
    middle = 0.625 * math.log(1 / 0.625) + 0.375 * math.log(1 / 0.375)
    spread = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert found["jensen_shannon"] == pytest.approx(middle - (spread + math.log(2)) / 2, rel=1e-6)
    assert found["l2_probabilities"] == pytest.approx(math.sqrt(2) / 4, rel=1e-6)
    assert found["l2_logits"] == pytest.approx(math.log(3), rel=1e-6)
    assert found["top1_agreement"] == 1.0


def test_a_constant_changes_the_l2_of_logits_and_nothing_else() -> None:
    base = torch.randn(3, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = measured(base, base + 2.5)
    torch.testing.assert_close(found["l2_logits"], torch.full((3,), 2.5 * 4.0, dtype=torch.float64))
    for name in ("kl_base_adapter", "kl_adapter_base", "jensen_shannon", "l2_logits_centred", "l2_probabilities"):
        assert float(found[name].abs().max()) < 1e-12, name


def test_opposite_certainties_are_as_far_apart_as_can_be() -> None:
    found = measured(torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]]))
    assert float(found["jensen_shannon"]) == math.log(2)
    assert float(found["l2_probabilities"]) == pytest.approx(math.sqrt(2))
    assert float(found["top1_agreement"]) == 0.0
    assert float(found["kl_base_adapter"]) == pytest.approx(200.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_logits_give_finite_numbers(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    rows = [[largest, -largest, 0.0], [-largest, largest, largest], [1e4, -1e4, 0.0], [-math.inf, 0.0, -largest]]
    base = torch.tensor(rows, dtype=dtype)
    adapter = torch.tensor([rows[0][::-1], rows[0], [-1e4, 1e4, 0.0], [-math.inf, -largest, 0.0]], dtype=dtype)
    for one, other in ((base, adapter), (adapter, base), (base, base)):
        found = measure_distances(one, other)
        assert found.isfinite().all()
        assert (found >= 0).all()


def test_a_token_that_one_side_rules_out() -> None:
    base, adapter = torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([[0.0, 0.0, 0.0]])
    found = {name: float(value) for name, value in measured(base, adapter).items()}
    assert found["kl_base_adapter"] == pytest.approx(math.log(1.5), rel=1e-9)
    assert found["kl_adapter_base"] == math.inf
    assert 0 < found["jensen_shannon"] < math.log(2)
    assert found["l2_logits"] == found["l2_logits_centred"] == math.inf
    assert not any(math.isnan(value) for value in found.values())


def test_logits_that_are_no_numbers_are_an_error() -> None:
    good, bad = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 0.0], [0.0, math.nan, 0.0]])
    with pytest.raises(ModelError, match="no numbers at 1 of 2 positions"):
        measure_distances(good, bad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_head_that_overflows_counts_as_the_largest_of_its_type(dtype: torch.dtype) -> None:
    over, largest = (torch.tensor([[0.0, top, 1.0]], dtype=dtype) for top in (math.inf, torch.finfo(dtype).max))
    assert torch.equal(measure_distances(over, over), measure_distances(largest, largest))
    assert torch.isfinite(measure_distances(torch.zeros(1, 3, dtype=dtype), over)).all()


def adapted(family: str, **settings: Any) -> SupervisedPeftModel:
    base = build_family(family, vocabulary=VOCABULARY)
    if settings:
        model = SupervisedPeftModel(base, PeftLoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    else:
        model = build_adapter(base, LoraConfig(r=4), seed=0)[0]
    draw_adapter(model, seed=1)
    model.tree_kernel = "per_tree"
    return model.eval()


def measure(model: SupervisedPeftModel, planner: Planner, **options: Any) -> list[Any]:
    options = {"batch_size": 4, "device": CPU, "reporter": Reporter(), "label": "x", **options}
    return measure_branches(model, BRANCHES, planner=planner, **options)


def plain(model: SupervisedPeftModel, branch: Any) -> tuple[Tensor, Tensor]:
    """Return the model's own logits of both sides where the answer's tokens are predicted, in float64."""
    prompt, answer = branch.prompt_ids.tolist(), branch.answer_ids.tolist()
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        adapter = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
        with model.disable_adapter():
            base = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
    return base, adapter


def check_against_plain(model: SupervisedPeftModel, found: list[Any]) -> None:
    assert len(found) == len(BRANCHES)
    for branch, each in zip(BRANCHES, found, strict=True):
        base, adapter = plain(model, branch)
        p, q = base.softmax(-1), adapter.softmax(-1)
        own = dict(zip(DISTANCES, each.distances, strict=True))
        np.testing.assert_allclose(own["kl_base_adapter"], (p * (p / q).log()).sum(-1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(own["kl_adapter_base"], (q * (q / p).log()).sum(-1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(own["l2_logits"], (base - adapter).norm(dim=-1), rtol=1e-4)
        np.testing.assert_allclose(own["l2_probabilities"], (p - q).norm(dim=-1), rtol=1e-4, atol=1e-6)
        answer = torch.from_numpy(branch.answer_ids).long()[:, None]
        np.testing.assert_allclose(each.base_losses, -p.log().gather(1, answer)[:, 0], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(each.adapter_losses, -q.log().gather(1, answer)[:, 0], rtol=1e-4, atol=1e-6)
        assert own["top1_agreement"].tolist() == (base.argmax(-1) == adapter.argmax(-1)).tolist()


@pytest.mark.parametrize("planner", PLANNERS, ids=lambda planner: planner.layout)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "phi"])
def test_a_whole_model_as_the_plain_computation(family: str, planner: Planner) -> None:
    model = adapted(family)
    found = measure(model, planner)
    assert max(each.distances[0].max() for each in found) > 1e-3  # the adapter does something
    check_against_plain(model, found)


@pytest.mark.parametrize("settings", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapted_head_is_switched_off_for_the_base(settings: dict[str, Any]) -> None:
    model = adapted("llama", **{"target_modules": ["q_proj"], **settings})
    if "modules_to_save" in settings:
        with torch.no_grad():
            model.head.weight.mul_(1.5)
    check_against_plain(model, measure(model, PLANNERS[2]))


def test_full_logits_give_the_same() -> None:
    model = adapted("llama")
    gathered = measure(model, PLANNERS[2])
    model.full_logits_reason = "asked for by a test"
    for one, other in zip(gathered, measure(model, PLANNERS[2]), strict=True):
        np.testing.assert_allclose(one.distances, other.distances, rtol=1e-4, atol=1e-7)


def test_the_size_of_a_chunk_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama")
    whole = measure(model, PLANNERS[2])
    monkeypatch.setattr(distances, "chunk_elements", lambda _: VOCABULARY * 16)
    for one, other in zip(whole, measure(model, PLANNERS[2]), strict=True):
        np.testing.assert_allclose(one.distances, other.distances, rtol=1e-5, atol=1e-8)


def test_an_untrained_adapter_is_at_no_distance() -> None:
    model = build_adapter(build_family("llama", vocabulary=VOCABULARY), LoraConfig(r=4), seed=0)[0]
    for each in measure(model, PLANNERS[0]):
        assert not each.distances[:-1].any()
        assert each.distances[-1].all()
        assert each.base_losses.tolist() == each.adapter_losses.tolist()


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_mode_alone_and_can_be_stopped(training: bool) -> None:
    model = adapted("llama").train(training)
    measure(model, PLANNERS[0])
    with pytest.raises(Interrupted):
        measure(model, PLANNERS[0], should_stop=lambda: True)
    assert model.training is training


def test_interval_of_a_mean_by_hand() -> None:
    sums, counts = np.array([[2.0, 0.0], [6.0, 0.0], [1.0, 0.0]]), np.array([1.0, 2.0, 1.0])
    first, second = mean_intervals(sums, counts, resamples=500)
    assert first["mean"] == 2.25
    assert 1.0 <= first["low"] < 2.25 < first["high"] <= 3.0
    assert second == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert mean_intervals(sums, counts, resamples=500)[0] == first
    many = np.random.default_rng(0).normal(size=(50, 1))
    assert mean_intervals(many, np.ones(50), resamples=500, seed=1) != mean_intervals(many, np.ones(50), resamples=500)


def test_nothing_to_resample_and_infinite_rows_have_no_interval() -> None:
    assert mean_intervals(np.array([[4.0]]), np.array([2.0]), resamples=50) == [
        {"mean": 2.0, "low": None, "high": None}
    ]
    found = mean_intervals(np.array([[math.inf, 1.0], [1.0, 1.0]]), np.ones(2), resamples=50)
    assert found == [{"mean": math.inf, "low": None, "high": None}, {"mean": 1.0, "low": 1.0, "high": 1.0}]


def test_the_interval_is_that_of_scipy() -> None:
    draw = np.random.default_rng(3)
    values, counts = draw.normal(1.0, 0.5, 80), draw.integers(1, 20, 80).astype(float)
    (ours,) = mean_intervals((values * counts)[:, None], counts, resamples=6000)
    theirs = stats.bootstrap(
        (values * counts, counts), lambda v, c, axis=-1: v.sum(axis=axis) / c.sum(axis=axis), paired=True,
        vectorized=True, n_resamples=6000, method="percentile", rng=np.random.default_rng(4),
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert abs(ours["low"] - theirs.low) < 0.1 * width
    assert abs(ours["high"] - theirs.high) < 0.1 * width
