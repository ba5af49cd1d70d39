"""The space of a sweep: what varies, and the points of it."""

import math
import random
import re

import pytest

from loralab.errors import ConfigError
from loralab.workflows.sweep_space import Point, Range, grid_points, random_points, read_space, split_values


def test_both_forms_say_the_same() -> None:
    repeated = read_space(["lora.r=4,8", "training.learning_rate=1e-4,3e-4"], ["training.seed=1"])
    listed = read_space(["lora.r=4,8"], ["training.learning_rate=1e-4,3e-4", "training.seed=1"])
    assert repeated == listed
    axes, overrides = repeated
    assert overrides == ["training.seed=1"]
    points = grid_points(axes)
    assert [point.settings for point in points] == [
        {"lora.r": r, "training.learning_rate": rate} for r in ("4", "8") for rate in ("1e-4", "3e-4")
    ]
    assert points[3].name == "004-r8-learning_rate3e-4"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("4,8", ["4", "8"]),
        ("[q_proj,v_proj],all-linear", ["[q_proj,v_proj]", "all-linear"]),
        ('"a,b",{c: 1, d: 2}', ['"a,b"', "{c: 1, d: 2}"]),
        ("[a,b]", ["[a,b]"]),
    ],
)
def test_commas_within_brackets_and_quotes_part_nothing(text: str, parts: list[str]) -> None:
    assert split_values(text) == parts


def test_a_list_or_a_path_with_dots_is_one_value() -> None:
    axes, overrides = read_space(["lora.r=4,8"], ["lora.target_modules=[q_proj,v_proj]", "data.train=../a.json"])
    assert [axis.key for axis in axes] == ["lora.r"]
    assert len(overrides) == 2


def test_random_points_lie_in_their_ranges_and_begin_alike() -> None:
    axes, _ = read_space(["training.learning_rate=1e-5..1e-3", "lora.r=2..32", "lora.dropout=0,0.1"], [])
    rate = axes[0].values
    assert isinstance(rate, Range)
    assert rate.log
    points = random_points(axes, 200, seed=3)
    assert len({tuple(point.settings.items()) for point in points}) == 200
    rates = [float(point.settings["training.learning_rate"]) for point in points]
    assert all(1e-5 <= value <= 1e-3 for value in rates)
    assert 60 < sum(value < 1e-4 for value in rates) < 140  # half of them, on a log scale
    assert all(point.settings["lora.r"].isdigit() and 2 <= int(point.settings["lora.r"]) <= 32 for point in points)
    assert random_points(axes, 20, seed=3) == points[:20]
    assert random_points(axes, 20, seed=4) != points[:20]


def test_the_scale_of_a_range_can_be_said() -> None:
    assert all(Range(1, 64, whole=True, log=True).draw(random.Random(n)).isdigit() for n in range(20))
    axes, _ = read_space(["training.learning_rate=1e-5..1e-3:linear"], [])
    assert isinstance(axes[0].values, Range)
    assert not axes[0].values.log
    assert math.isclose(axes[0].values.high, 1e-3)


@pytest.mark.parametrize(
    ("grid", "given", "words"),
    [
        ([], ["lora.r=4"], "nothing varies"),
        (["lora.r"], [], "not a setting with values"),
        (["lora.r=4,,8"], [], "a value is missing"),
        (["lora.r=4,4"], [], "takes 4 twice"),
        (["lora.r=4,8"], ["lora.r=16"], "given twice"),
        (["lora.r=8..4"], [], "range is empty"),
        (["training.weight_decay=0..1:log"], [], "a log scale has no 0"),
    ],
)
def test_mistakes_are_named(grid: list[str], given: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_space(grid, given)


def test_a_grid_has_no_ranges_and_a_small_space_no_more_points() -> None:
    with pytest.raises(ConfigError, match="has a range"):
        grid_points(read_space(["lora.r=2..8"], [])[0])
    with pytest.raises(ConfigError, match="only 2 were found"):
        random_points(read_space(["lora.r=2,8"], [])[0], 5, seed=0)


def test_a_sweep_has_an_end() -> None:
    with pytest.raises(ConfigError, match="1,002 runs"):
        grid_points(read_space(["lora.r=4,8", f"training.seed={','.join(map(str, range(501)))}"], [])[0])
    with pytest.raises(ConfigError, match="2,000 runs"):
        random_points(read_space(["training.seed=1..9000"], [])[0], 2000, seed=0)


@pytest.mark.parametrize("value", ["[q_proj,v_proj]", "../a.json", "1e+3", "a--b", "-1", "x" * 200])
def test_a_run_is_named_as_a_repository_may_be(value: str) -> None:
    name = Point(1, {"lora.r": value}).name
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,70}", name)
    assert not {"--", ".."} & {name[at : at + 2] for at in range(len(name))}
    assert name[-1] not in "-."
