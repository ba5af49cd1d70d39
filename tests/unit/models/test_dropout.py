"""Dropout by key: its masks are a function of what a token is, and as random as dropout must be."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from scipy import stats
from torch import Tensor

from loralab.config.schema import LoraConfig
from loralab.errors import ModelError
from loralab.layout.planner import Planner
from loralab.models import dropout
from loralab.models.adapters import build_adapter
from loralab.models.dropout import DropMask, DropoutKeys, KeyedDropout, PictureKeys, token_keys
from loralab.models.fused_lora import fuse_lora
from loralab.models.supervised import SupervisedPeftModel
from loralab.training.loss import model_inputs
from support.families import build_family
from support.layouts import ALWAYS_SHARE, draw_adapter, loss_and_gradients, sharing_rows

VOCABULARY, SIGMAS = 97, 5
EXAMPLES, DEPTHS, WIDTH = 40, 25, 64


def grid(examples: int = EXAMPLES, depths: int = DEPTHS) -> tuple[Tensor, Tensor]:
    """Return example and depth of every token of rows of equal length."""
    return torch.arange(examples).repeat_interleave(depths), torch.arange(depths).repeat(examples)


def prefix(examples: Tensor, depths: Tensor) -> Tensor:
    """Return a number for each token that stands for what it is, as the hash of its path does."""
    return examples * 1_000_003 + depths


def kept(
    p: float = 0.3,
    *,
    seed: int = 1,
    step: int = 2,
    layer: int = 3,
    example: int = 0,
    depth: int = 0,
    width: int = WIDTH,
) -> Tensor:
    """Return which numbers are kept (tokens, width); example and depth are added to those of the grid."""
    examples, depths = grid()
    dropout = KeyedDropout(
        p, layer=layer, keys=DropoutKeys(token_keys(seed, step, prefix(examples + example, depths + depth)))
    )
    return dropout(torch.ones(1, len(examples), width))[0] > 0


@pytest.mark.parametrize("p", [0.01, 0.05, 0.1, 0.3, 0.5, 0.9])
def test_keep_rate_is_within_binomial_bounds(p: float) -> None:
    mask = kept(p)
    bound = SIGMAS * (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(float(mask.float().mean()) - (1 - p)) < bound
    for along in (0, 1):  # no token and no column is favoured
        rates = mask.float().mean(dim=along)
        assert float((rates - (1 - p)).abs().max()) < SIGMAS * (p * (1 - p) / mask.shape[along]) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_is_scaled(dtype: torch.dtype) -> None:
    examples, depths = grid(2, 8)
    inputs = torch.randn(2, 8, 12).to(dtype)
    out = KeyedDropout(0.25, layer=0, keys=DropoutKeys(token_keys(0, 0, prefix(examples, depths))))(inputs)
    assert out.dtype == dtype
    assert out.shape == inputs.shape
    scaled = (inputs * (1 / 0.75)).to(dtype)
    assert torch.equal(out, torch.where(out == 0, torch.zeros((), dtype=dtype), scaled))
    assert 0 < int((out == 0).sum()) < out.numel()


@pytest.mark.parametrize("other", ["seed", "step", "layer", "example", "depth"])
def test_masks_of_different_keys_are_independent(other: str) -> None:
    """Two independent masks agree in p² + (1 - p)² of their numbers."""
    p = 0.3
    defaults = {"seed": 1, "step": 2, "layer": 3, "example": 0, "depth": 0}
    expected, mask = p**2 + (1 - p) ** 2, kept(p)
    for change in (1, 2, 7, 1000, 2**20):
        if other == "layer" and change > 1000:
            continue
        agreeing = (mask == kept(p, **{**defaults, other: defaults[other] + change})).float().mean()
        assert abs(float(agreeing) - expected) < SIGMAS * (expected * (1 - expected) / mask.numel()) ** 0.5, change


def test_swapped_keys_are_other_keys() -> None:
    """Seed, step, layer, example and depth have roles of their own: no sum of them is the key."""
    masks = [kept(seed=a, step=b, layer=c, example=100 * d) for a, b, c, d in itertools.permutations((1, 2, 3, 4))]
    masks += [kept(seed=0, step=0, layer=0), kept(seed=0, step=0, layer=0, example=1), kept(seed=0, step=1, layer=0)]
    for one, other in itertools.combinations(masks, 2):
        assert abs(float((one == other).float().mean()) - 0.58) < 0.02


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 5, 16])
def test_columns_are_independent(distance: int) -> None:
    mask = kept(0.5)
    agreeing = (mask[:, distance:] == mask[:, :-distance]).float().mean()
    assert abs(float(agreeing) - 0.5) < SIGMAS * 0.5 / mask[:, distance:].numel() ** 0.5


def test_rectangles_are_independent() -> None:
    """A number is the product of a token's and a column's key: two tokens and two columns have four of them.

    If three of the four told anything of the last, the parity of what is dropped would lean to one side.
    """
    mask = kept(0.5).long()
    for down, right in itertools.product((1, 2, 3, 25, 100), (1, 2, 4, 16)):
        upper, lower = mask[:-down], mask[down:]
        parity = (upper[:, :-right] + upper[:, right:] + lower[:, :-right] + lower[:, right:]) % 2
        assert abs(float(parity.float().mean()) - 0.5) < SIGMAS * 0.5 / parity.numel() ** 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_dropped_as_inputs_are(dtype: torch.dtype) -> None:
    examples, depths = grid(2, 8)
    inputs = torch.randn(2, 8, 12, dtype=dtype, requires_grad=True)
    out = KeyedDropout(0.25, layer=0, keys=DropoutKeys(token_keys(0, 0, prefix(examples, depths))))(inputs)
    (found,) = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert torch.equal(found, torch.where(out == 0, 0.0, torch.ones_like(out) * (1 / 0.75)))


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_mask_is_the_same_in_blocks_of_any_size(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = kept()
    monkeypatch.setattr(dropout, "_DRAWN", rows * WIDTH)
    assert torch.equal(kept(), expected)


@pytest.mark.parametrize("first", range(4))
def test_numbers_are_uniform(first: int) -> None:
    """Sixteen drop probabilities sort each column's number into bins; chi-square of their counts."""
    dropped = torch.stack([~kept(part / 16) for part in range(1, 16)])
    assert bool((dropped[1:] >= dropped[:-1]).all())  # one number, compared with growing thresholds
    bins = dropped.sum(dim=0)[:, first::4].flatten()
    assert stats.chisquare(torch.bincount(bins, minlength=16).numpy()).pvalue > 1e-4


def test_width_and_rows_around_do_not_matter() -> None:
    assert torch.equal(kept(width=WIDTH)[:, :13], kept(width=13))
    examples, depths = grid()
    chosen = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))[:50]
    dropout = KeyedDropout(0.3, layer=3, keys=DropoutKeys(token_keys(1, 2, prefix(examples, depths)[chosen])))
    assert torch.equal(dropout(torch.ones(50, WIDTH)) > 0, kept()[chosen])


def test_off_while_evaluating_and_without_probability() -> None:
    inputs = torch.randn(3, 4)
    assert KeyedDropout(0.5, layer=0, keys=DropoutKeys()).eval()(inputs) is inputs
    assert KeyedDropout(0.0, layer=0, keys=DropoutKeys())(inputs) is inputs


@pytest.mark.parametrize("keys", [None, torch.zeros(5, dtype=torch.long)])
def test_rows_without_keys_are_refused(keys: Tensor | None) -> None:
    with pytest.raises(ModelError, match="a layer with LoRA dropout sees 6 rows"):
        KeyedDropout(0.5, layer=7, keys=DropoutKeys(keys))(torch.ones(2, 3, 4))


def test_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    kept()
    assert torch.equal(torch.get_rng_state(), state)


def build(*, rank: int = 2, seed: int = 0, p: float = 0.3) -> SupervisedPeftModel:
    model, _ = build_adapter(build_family("llama", vocabulary=VOCABULARY), LoraConfig(r=rank, dropout=p), seed=seed)
    draw_adapter(model, seed=seed)
    model.tree_kernel = "per_tree"
    return model


def masks_of_a_step(model: SupervisedPeftModel, planner: Planner, key: tuple[int, int]) -> dict[Any, list[bool]]:
    """Return by (layer, path) which inputs of each adapted layer were dropped."""
    model.train()
    found: dict[Any, list[bool]] = {}
    heard: list[tuple[int, Tensor]] = []
    layers = [module for module in model.modules() if isinstance(module, KeyedDropout)]
    own = KeyedDropout.draw

    def hear(layer: KeyedDropout, inputs: Tensor) -> DropMask | None:
        mask = own(layer, inputs)
        assert mask is not None
        heard.append((layer.layer, mask.apply(torch.ones_like(inputs).flatten(0, -2)) > 0))
        return mask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeyedDropout, "draw", hear)
        for batch in planner(sharing_rows(0, vocabulary=VOCABULARY)).micro_batches:
            heard.clear()
            model(**model_inputs(batch), dropout_key=key)
            tokens = batch.token_prefixes.flatten().tolist()
            real = batch.attention_mask.flatten().bool().tolist()
            assert len(heard) == len(layers)
            for layer, keep in heard:
                for token, row, there in zip(tokens, keep.logical_not().tolist(), real, strict=True):
                    if there:
                        assert found.setdefault((layer, token), row) == row  # one path, one mask
    return found


def test_masks_depend_on_neither_layout_nor_budget_nor_rank() -> None:
    expected = masks_of_a_step(build(), Planner(10_000, layout="padded"), (1, 2))
    assert len({layer for layer, *_ in expected}) == 14
    assert any(map(any, expected.values()))
    for planner in (
        Planner(100, layout="padded"),
        Planner(10_000, layout="packed"),
        Planner(100, layout="packed"),
        Planner(1, cost=ALWAYS_SHARE),
        Planner(10_000, cost=ALWAYS_SHARE),
    ):
        assert masks_of_a_step(build(), planner, (1, 2)) == expected
    assert masks_of_a_step(build(rank=8, seed=5), Planner(10_000, layout="padded"), (1, 2)) == expected
    assert masks_of_a_step(build(), Planner(10_000, layout="padded"), (1, 3)) != expected


def test_equal_in_every_way_after_saving_and_loading(tmp_path: Path) -> None:
    model, rows, planner = build(), sharing_rows(0, vocabulary=VOCABULARY), Planner(10_000)
    model.save_pretrained(str(tmp_path))
    config = PeftConfig.from_pretrained(str(tmp_path))
    config.inference_mode = False
    again = SupervisedPeftModel(build_family("llama", vocabulary=VOCABULARY), config)
    again.load_adapter(str(tmp_path), "default", is_trainable=True)
    fuse_lora(again, dtype=torch.float32)
    again.tree_kernel = "per_tree"
    loss, gradients, _ = loss_and_gradients(model, planner, rows, dropout_key=(3, 4))
    found, found_gradients, _ = loss_and_gradients(again, planner, rows, dropout_key=(3, 4))
    assert found == loss
    assert all(torch.equal(found_gradients[name], gradient) for name, gradient in gradients.items())
    without, _, _ = loss_and_gradients(build(p=0.0), planner, rows)
    assert without != loss


def test_evaluation_drops_nothing() -> None:
    dropping, plain = build().eval(), build(p=0.0).eval()
    (batch,) = Planner(10_000)(sharing_rows(0, vocabulary=VOCABULARY)).micro_batches
    found, expected = (model(**model_inputs(batch), dropout_key=(1, 2)).losses for model in (dropping, plain))
    assert torch.equal(found, expected)


def picture_keys(*pictures: tuple[int, int]) -> PictureKeys:
    """Return the keys of pictures, each with its key and its number of features."""
    return PictureKeys(pictures=torch.tensor([key for key, _ in pictures]), counts=tuple(n for _, n in pictures))


@pytest.mark.parametrize("patches", [1, 4])
def test_keys_in_a_picture_depend_on_no_other_picture(patches: int) -> None:
    """Whatever is encoded beside it, and before the patches are merged into features or behind."""
    first, second, third = (11, 2), (12, 3), (13, 1)
    alone = picture_keys(second).of_rows(3 * patches)
    for beside, start in ([first, second, third], 2), ([second, first], 0), ([third, second], 1):
        total = sum(count for _, count in beside)
        found = picture_keys(*beside).of_rows(total * patches)
        assert found is not None
        assert alone is not None
        assert torch.equal(found[start * patches : (start + 3) * patches], alone)
    assert alone is not None
    assert len(alone.unique()) == 3 * patches
    other = picture_keys(third).of_rows(patches)
    assert other is not None
    assert not set(alone.tolist()) & set(other.tolist())


def test_rows_that_are_no_pictures_have_no_keys() -> None:
    keys = picture_keys((11, 2), (12, 3))
    assert keys.of_rows(5) is not None
    assert keys.of_rows(7) is None  # no whole number of rows for each feature
    assert PictureKeys().of_rows(5) is None
    assert PictureKeys(tokens=torch.arange(5)).of_rows(5) is None  # keys of tokens are no keys of patches
    with pytest.raises(ModelError, match="sees 7 rows"):
        KeyedDropout(0.5, layer=0, keys=keys)(torch.ones(7, 4))


def test_a_class_token_in_front_of_the_patches_gets_a_key_too() -> None:
    """LLaVA's tower has one row more for each picture than there are features."""
    keys = picture_keys((11, 4), (12, 4))
    found, alone = keys.of_rows(10), picture_keys((12, 4)).of_rows(5)
    assert found is not None
    assert alone is not None
    assert torch.equal(found[5:], alone)


def test_masks_in_a_picture_are_the_same_however_many_are_encoded() -> None:
    inputs = torch.ones(5, 64)
    both = KeyedDropout(0.3, layer=4, keys=picture_keys((11, 2), (12, 3)))(inputs)
    for place, key, count in ((slice(0, 2), 11, 2), (slice(2, 5), 12, 3)):
        alone = KeyedDropout(0.3, layer=4, keys=picture_keys((key, count)))(inputs[place])
        assert torch.equal(both[place], alone)
    assert 0.5 < float((both > 0).float().mean()) < 0.9
