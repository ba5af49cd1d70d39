"""The order of rows: a function of seed, epoch and ranks alone."""

import itertools
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralab.training.sampler import StepSampler

SIZES = {"rows": st.integers(1, 50), "rows_per_step": st.integers(1, 12)}


@given(**SIZES, seed=st.integers(0, 2**31), epoch=st.integers(0, 9))
def test_every_row_comes_once_per_epoch(rows: int, rows_per_step: int, seed: int, epoch: int) -> None:
    sampler = StepSampler(rows, rows_per_step, seed)
    sampler.set_epoch(epoch)
    steps = list(sampler)
    assert sorted(row for step in steps for row in step) == list(range(rows))
    assert len(steps) == len(sampler)
    assert [len(step) for step in steps[:-1]] == [rows_per_step] * (len(steps) - 1)
    assert 1 <= len(steps[-1]) <= rows_per_step


@given(**SIZES, world_size=st.integers(1, 4))
def test_ranks_share_each_step(rows: int, rows_per_step: int, world_size: int) -> None:
    whole = StepSampler(rows, rows_per_step, 3)
    ranks = [StepSampler(rows, rows_per_step, 3, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {len(whole)}
    for step, *parts in zip(whole, *ranks, strict=True):
        assert sorted(row for part in parts for row in part) == sorted(step)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_order_is_the_same_for_the_same_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = StepSampler(40, 4, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_iterating_twice_gives_the_same_epoch() -> None:
    sampler = StepSampler(10, 3, 0)
    assert list(sampler) == list(sampler)


def test_size_of_the_step_does_not_change_the_order() -> None:
    flat = [[row for step in StepSampler(20, size, 5) for row in step] for size in (1, 7, 20)]
    assert flat[0] == flat[1] == flat[2]


@st.composite
def partitions(draw: st.DrawFn) -> list[list[int]]:
    """Groups of rows, each row in one."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    rows = draw(st.permutations(range(sum(sizes))))
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return [rows[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def grouped(groups: list[list[int]], rows_per_step: int, *, seed: int = 3, **options: int) -> StepSampler:
    return StepSampler(sum(map(len, groups)), rows_per_step, seed, groups=groups, **options)


@given(groups=partitions(), rows_per_step=st.integers(1, 12), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_groups_change_company_and_nothing_else(
    groups: list[list[int]], rows_per_step: int, seed: int, epoch: int
) -> None:
    sampler = grouped(groups, rows_per_step, seed=seed)
    sampler.set_epoch(epoch)
    steps = list(sampler)
    assert sorted(row for step in steps for row in step) == list(range(sampler.rows))
    assert len(steps) == len(sampler) == len(StepSampler(sampler.rows, rows_per_step, seed))
    assert all(len(step) == rows_per_step for step in steps[:-1])  # B x K x D rows, whatever the groups
    assert steps == list(sampler)


@given(groups=partitions(), rows_per_step=st.integers(1, 12), world_size=st.integers(1, 4))
def test_ranks_share_each_step_of_groups(groups: list[list[int]], rows_per_step: int, world_size: int) -> None:
    whole = grouped(groups, rows_per_step)
    ranks = [grouped(groups, rows_per_step, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, *parts in zip(whole, *ranks, strict=True):
        assert [row for part in parts for row in part] == step  # neighbours stay together


@pytest.mark.parametrize(("rows_per_step", "size"), [(8, 4), (9, 9), (18, 9), (12, 3)])
def test_groups_that_fit_are_never_cut(rows_per_step: int, size: int) -> None:
    groups = [list(range(start, start + size)) for start in range(0, 36 * size, size)]
    for step in grouped(groups, rows_per_step):
        assert set(Counter(row // size for row in step).values()) == {size}


def test_group_larger_than_a_step_goes_on_in_the_next() -> None:
    groups = [list(range(20)), [20], [21]]
    steps = [set(step) for step in grouped(groups, 8)]
    holding = [number for number, step in enumerate(steps) if step & set(range(20))]
    assert len(holding) == 3


def test_groups_come_in_another_order_in_each_epoch_and_under_each_seed() -> None:
    groups = [list(range(start, start + 3)) for start in range(0, 60, 3)]

    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = grouped(groups, 6, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    companies = [{frozenset(row // 3 for row in step) for step in each} for each in orders]
    assert all(a != b for i, a in enumerate(companies) for b in companies[:i])  # groups are shuffled, not only rows


def test_large_groups_come_at_any_time_of_an_epoch() -> None:
    """Rows that begin with one template are a group too: an epoch must not be sorted by template."""
    groups = [list(range(start, start + 20)) for start in range(0, 200, 20)] + [[row] for row in range(200, 400)]
    places = []
    for seed in range(20):
        order = [row for step in grouped(groups, 8, seed=seed) for row in step]
        places += [place / len(order) for place, row in enumerate(order) if row < 200]
    assert sum(places) / len(places) == pytest.approx(0.5, abs=0.05)


def _shares(*sources: tuple[range, float]) -> list[tuple[npt.NDArray[np.int64], float]]:
    return [(np.asarray(rows), weight) for rows, weight in sources]


@pytest.mark.parametrize("grouped", [False, True])
def test_weights_are_passes_over_a_source(grouped: bool) -> None:
    shares = _shares((range(10), 0.5), (range(10, 14), 2.0), (range(14, 20), 1.5))
    groups = [list(range(start, start + 5)) for start in range(0, 20, 5)] if grouped else None
    sampler = StepSampler(20, 4, 1, groups=groups, shares=shares)
    drawn = []
    for epoch in range(40):
        sampler.set_epoch(epoch)
        steps = sampler.steps()
        assert len(steps) == len(sampler)
        counts = Counter(row for step in steps for row in step)
        assert sum(counts.values()) == sampler.rows_per_epoch == 5 + 8 + 9
        assert sum(counts[row] for row in range(10)) == 5
        assert max(counts[row] for row in range(10)) == 1
        assert [counts[row] for row in range(10, 14)] == [2] * 4
        assert sorted(counts[row] for row in range(14, 20)) == [1, 1, 1, 2, 2, 2]
        drawn.append(frozenset(row for row in range(10) if counts[row]))
    assert all(before | after == set(range(10)) for before, after in itertools.pairwise(drawn))  # the other half


@pytest.mark.parametrize("weight", [0.1, 0.3, 0.7, 1.3])
@pytest.mark.parametrize("seed", [0, 7])
def test_no_row_falls_behind_the_others_of_its_source(weight: float, seed: int) -> None:
    sampler = StepSampler(15, 4, seed, shares=_shares((range(10), weight), (range(10, 15), 1.0)))
    counts = Counter(dict.fromkeys(range(10), 0))
    for epoch in range(20):
        sampler.set_epoch(epoch)
        counts.update(row for step in sampler.steps() for row in step if row < 10)
        assert max(counts.values()) - min(counts.values()) <= 1
    assert sum(counts.values()) == 20 * round(10 * weight)


def test_small_source_is_never_left_out() -> None:
    sampler = StepSampler(101, 8, 1, shares=_shares((range(100), 1.0), (range(100, 101), 0.1)))
    assert 100 in [row for step in sampler.steps() for row in step]
