"""The order of rows: a function of seed, epoch and ranks alone."""

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
    ranks = [StepSampler(rows, rows_per_step, 3, rank, world_size) for rank in range(world_size)]
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
