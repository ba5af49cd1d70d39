"""Items of a preference test: which are taken, what their names say, and how sides and orders are drawn."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from loralab.errors import JudgingError
from loralab.judging.items import (
    ItemSet,
    Origin,
    build_items,
    comparison_sha256,
    draw_seed,
    read_comparison,
    read_items,
    write_items,
)
from support.preference_tests import make_comparison, make_items

RATERS = [f"rater {number}" for number in range(40)]


def _build(comparison: dict[str, Any], folder: Path, *, examples: int = 100, seed: int = 1) -> ItemSet:
    return build_items(comparison, Origin("a" * 64, "c" * 64, folder), examples=examples, seed=seed)


def _swapped(comparison: dict[str, Any]) -> dict[str, Any]:
    prompts = [
        record | {"base_output": record["adapter_output"], "adapter_output": record["base_output"]}
        for record in comparison["prompts"]
    ]
    return comparison | {"prompts": prompts}


def test_items_are_evenly_spread(tmp_path: Path) -> None:
    items = _build(make_comparison(50), tmp_path, examples=5)
    assert [item.row for item in items.items] == [6, 16, 26, 36, 46]
    assert len(_build(make_comparison(3), tmp_path).items) == 3


def test_each_prompt_with_its_answers_is_taken_once(tmp_path: Path) -> None:
    comparison = make_comparison(4)
    comparison["prompts"] += comparison["prompts"][:2]
    assert len(_build(comparison, tmp_path).items) == 4


def test_the_same_text_is_not_shown(tmp_path: Path) -> None:
    comparison = make_comparison(4, same=1)
    comparison["prompts"][1]["adapter_output"] = f" {comparison['prompts'][1]['base_output']}\n"
    items = _build(comparison, tmp_path)
    assert [item.same for item in items.items] == [True, True, False, False]
    assert {pair.item for pair in items.pairs_for("a")} == {item.item for item in items.items[2:]}


def test_text_without_prompts_is_refused(tmp_path: Path) -> None:
    comparison = make_comparison(2)
    for record in comparison["prompts"]:
        record |= {"prompt": "", "base_output": None, "adapter_output": None}
    with pytest.raises(JudgingError) as raised:
        _build(comparison, tmp_path)
    assert "no prompt with two answers" in str(raised.value)
    assert "--data FILE --output FOLDER" in str(raised.value)
    for broken in ({}, {"prompts": None}, {"prompts": [1, {"prompt": 2}]}):
        with pytest.raises(JudgingError):
            _build(broken, tmp_path)


def test_prompts_whose_pictures_are_gone_are_left_out(tmp_path: Path) -> None:
    comparison = make_comparison(3)
    for number, record in enumerate(comparison["prompts"][:2]):
        record["images"] = [{"path": "x.png", "sha256": f"{number}" * 64, "width": 4, "height": 4}]
    (tmp_path / f"{'0' * 64}.png").write_bytes(b"picture")
    items = _build(comparison, tmp_path)
    assert [item.row for item in items.items] == [1, 3]
    shown = {pair.prompt: pair.pictures for pair in items.pairs_for("a")}
    assert shown["What is 0 + 0?"] == (tmp_path / f"{'0' * 64}.png",)
    (tmp_path / f"{'0' * 64}.png").unlink()
    comparison["prompts"] = comparison["prompts"][:2]
    with pytest.raises(JudgingError, match="pictures of all 2 compared prompts"):
        _build(comparison, tmp_path)


def test_half_of_a_surrogate_pair_does_no_harm(tmp_path: Path) -> None:
    comparison = make_comparison(1)
    comparison["prompts"][0]["adapter_output"] = "cut \ud83d"
    items = _build(comparison, tmp_path)
    write_items(tmp_path / "items.json", items)
    assert read_items(tmp_path / "items.json", pictures=tmp_path) == items


def test_names_of_items_do_not_depend_on_who_answered_what(tmp_path: Path) -> None:
    comparison = make_comparison(6)
    one, other = _build(comparison, tmp_path), _build(_swapped(comparison), tmp_path)
    assert [item.item for item in one.items] == [item.item for item in other.items]
    assert all(len(item.item) == 16 and int(item.item, 16) >= 0 for item in one.items)


def test_what_a_rater_sees_does_not_depend_on_who_answered_what(tmp_path: Path) -> None:
    comparison = make_comparison(21)
    one, other = _build(comparison, tmp_path), _build(_swapped(comparison), tmp_path)
    for rater in RATERS[:5]:
        pairs = list(zip(one.pairs_for(rater), other.pairs_for(rater), strict=True))
        assert all((a.item, a.prompt, a.left, a.right) == (b.item, b.prompt, b.right, b.left) for a, b in pairs)


@pytest.mark.parametrize("count", [1, 2, 9, 30])
def test_half_of_the_items_have_the_adapter_left(count: int) -> None:
    items = make_items(count)
    lefts = [list(items.adapter_sides(rater).values()).count("left") for rater in RATERS]
    assert set(lefts) == {count // 2, (count + 1) // 2}


def test_pairs_are_on_the_sides_that_are_said() -> None:
    items = make_items(12)
    texts = {item.item: item for item in items.items}
    for rater in RATERS[:5]:
        sides = items.adapter_sides(rater)
        for pair in items.pairs_for(rater):
            answers = {sides[pair.item]: texts[pair.item].adapter_output}
            answers["right" if sides[pair.item] == "left" else "left"] = texts[pair.item].base_output
            assert {"left": pair.left, "right": pair.right} == answers
            assert pair.prompt == texts[pair.item].prompt


def test_raters_have_orders_and_sides_of_their_own() -> None:
    items = make_items(30)
    orders = {tuple(pair.item for pair in items.pairs_for(rater)) for rater in RATERS}
    sides = {tuple(items.adapter_sides(rater).values()) for rater in RATERS}
    assert len(orders) == len(sides) == len(RATERS)
    assert make_items(30).pairs_for("a") == items.pairs_for("a")
    assert make_items(30, seed=2).pairs_for("a") != items.pairs_for("a")


def test_every_item_is_left_and_first_about_equally_often() -> None:
    items = make_items(10)
    raters = [f"rater {number}" for number in range(1000)]
    lefts = Counter(item for rater in raters for item, side in items.adapter_sides(rater).items() if side == "left")
    places = [[pair.item for pair in items.pairs_for(rater)] for rater in raters]
    firsts = Counter(order[0] for order in places)
    # Four standard deviations of 1,000 draws.
    assert all(abs(lefts[item.item] - 500) < 64 for item in items.items)
    assert all(abs(firsts[item.item] - 100) < 38 for item in items.items)
    # Order tells nothing of sides: the adapter of the first pair is on the left in half of the sessions.
    left_first = sum(
        items.adapter_sides(rater)[order[0]] == "left" for rater, order in zip(raters, places, strict=True)
    )
    assert abs(left_first - 500) < 64


def test_set_is_read_as_it_was_written(tmp_path: Path) -> None:
    items = make_items(5, same=2, pictures=tmp_path)
    path = tmp_path / "items.json"
    write_items(path, items)
    found = read_items(path, pictures=tmp_path)
    assert found == items
    assert found.sha256 == items.sha256 == json.loads(path.read_text(encoding="utf-8"))["sha256"]


def test_hash_of_a_set_needs_the_seed() -> None:
    seeds = {draw_seed() for _ in range(20)}
    assert len(seeds) == 20
    assert max(seeds) > 1 << 55
    assert make_items(3, seed=1).sha256 != make_items(3, seed=2).sha256


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 5),
        ("seed", None),
        ("split", "test"),
        ("split", 3),
        ("loralab_items", 2),
        ("items", []),
        ("items", [{}]),
        ("items", None),
        ("sha256", "0"),
    ],
)
def test_changed_set_is_refused(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "items.json"
    write_items(path, make_items(3))
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {key: value}), encoding="utf-8")
    with pytest.raises(JudgingError, match="not those that were frozen") as raised:
        read_items(path, pictures=tmp_path)
    assert "--new" in str(raised.value)


def test_swapped_answers_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "items.json"
    write_items(path, make_items(3))
    value = json.loads(path.read_text(encoding="utf-8"))
    first = value["items"][0]
    first["base_output"], first["adapter_output"] = first["adapter_output"], first["base_output"]
    path.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(JudgingError, match="not those that were frozen"):
        read_items(path, pictures=tmp_path)


def test_hash_of_a_comparison_is_over_prompts_and_answers() -> None:
    comparison = make_comparison(3)
    same = comparison | {"probe": {"kl": 1.0}, "adapter_sha256": "other"}
    assert comparison_sha256(same) == comparison_sha256(comparison)
    assert comparison_sha256(_swapped(comparison)) != comparison_sha256(comparison)
    assert len(read_comparison(comparison)) == 3
