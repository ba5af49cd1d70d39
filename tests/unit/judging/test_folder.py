"""The folder of a preference test: names of raters, whose votes lie there, and saved pages taken into it."""

import json
from pathlib import Path
from typing import Any

import pytest

from loralab.errors import JudgingError
from loralab.judging.folder import PreferenceFolder, check_rater
from loralab.judging.items import ItemSet
from loralab.judging.saved_votes import read_saved_votes, take_votes
from support.preference_tests import make_items, saved_page_votes, write_saved

PAIRS = 6


@pytest.fixture
def items() -> ItemSet:
    return make_items(PAIRS)


@pytest.fixture
def folder(tmp_path: Path, items: ItemSet) -> PreferenceFolder:
    found = PreferenceFolder(tmp_path / "preference", Path("pictures"))
    found.keep_items(items)
    return found


@pytest.mark.parametrize("name", ["anna", "Jos\u00e9", "a.b-c_d@host", "Anna B", "\u674e", "x" * 64, "7"])
def test_names_of_raters(name: str) -> None:
    assert check_rater(name, where="") == name


def test_name_is_composed() -> None:
    assert check_rater("Jose\u0301", where="") == "Jos\u00e9"


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
        ".hidden",
        "a ",
        " a",
        "a.",
        "x" * 65,
        "nul",
        "CON",
        "lpt1.txt",
        "a\nb",
        "a\0b",
    ],
)
def test_names_that_no_file_can_have_are_refused(name: str) -> None:
    with pytest.raises(JudgingError, match="not a rater's name") as raised:
        check_rater(name, where="option --rater")
    assert "where: option --rater" in str(raised.value)


def test_raters_are_those_who_voted(folder: PreferenceFolder, items: ItemSet) -> None:
    assert folder.load_items() == items
    assert (folder.raters(), folder.has_votes(), folder.load_votes(items)) == ([], False, [])
    with folder.open_sitting(items, "bert") as sitting:
        assert not folder.has_votes()
        sitting.record(sitting.pairs[0].item, "left", seconds=None)
        assert folder.has_votes()
    with folder.open_sitting(items, "anna") as sitting:
        sitting.close()
    assert folder.raters() == ["anna", "bert"]
    anna, bert = folder.load_votes(items)
    assert (anna.closed, anna.choices, bert.closed, len(bert.choices)) == (True, {}, False, 1)


def test_page_for_somebody_else_freezes_the_items(folder: PreferenceFolder, items: ItemSet, tmp_path: Path) -> None:
    folder.await_votes(items, "bert")
    folder.await_votes(items, "bert")
    assert folder.has_votes()
    assert folder.raters() == ["bert"]
    (votes,) = folder.load_votes(items)
    assert (votes.rater, votes.choices, votes.closed) == ("bert", {}, False)
    with pytest.raises(JudgingError, match="on other items"):
        folder.await_votes(make_items(2), "bert")


def test_first_vote_on_items_that_were_changed_meanwhile_is_refused(folder: PreferenceFolder, items: ItemSet) -> None:
    with folder.open_sitting(items, "anna") as sitting:
        folder.keep_items(make_items(PAIRS, seed=99))
        with pytest.raises(JudgingError, match="were changed meanwhile"):
            sitting.record(sitting.pairs[0].item, "left", seconds=None)
    assert not folder.has_votes()


def test_votes_on_other_items_are_refused(folder: PreferenceFolder, items: ItemSet) -> None:
    with folder.open_sitting(items, "anna") as sitting:
        sitting.record(sitting.pairs[0].item, "left", seconds=None)
    with pytest.raises(JudgingError, match="on other items"):
        folder.load_votes(make_items(PAIRS, seed=99))


def test_vote_on_an_item_that_is_not_shown_is_refused(folder: PreferenceFolder) -> None:
    items = make_items(PAIRS, same=1)
    foreign = items.items[0].item
    header = {"loralab_votes": 1, "items_sha256": items.sha256, "rater": "anna"}
    act = {"item": foreign, "choice": "left", "seconds": None, "at": "2026-11-27T10:00:00Z"}
    path = folder.votes_file("anna")
    path.parent.mkdir()
    path.write_text(f"{json.dumps(header)}\n{json.dumps(act)}\n", encoding="utf-8")
    with pytest.raises(JudgingError, match=f"never shown: {foreign}"):
        folder.load_votes(items)


def test_test_is_moved_aside_under_a_free_name(folder: PreferenceFolder, items: ItemSet) -> None:
    (folder.path.parent / "preference-1").mkdir()
    assert folder.move_aside() == folder.path.parent / "preference-2"
    assert not folder.path.exists()
    assert folder.move_aside() is None
    assert PreferenceFolder(folder.path.parent / "preference-2", Path("pictures")).load_items() == items


def test_test_is_not_moved_under_a_rater(folder: PreferenceFolder, items: ItemSet) -> None:
    with folder.open_sitting(items, "anna"), pytest.raises(JudgingError, match="'anna' is judging at this moment"):
        folder.move_aside()
    assert folder.load_items() == items
    assert folder.move_aside() is not None


def _take(folder: PreferenceFolder, items: ItemSet, path: Path) -> int:
    return take_votes(read_saved_votes(path, items), folder, where=str(path))[0]


def test_saved_votes_are_taken(folder: PreferenceFolder, items: ItemSet, tmp_path: Path) -> None:
    path = write_saved(tmp_path / "votes.json", saved_page_votes(items, "anna"))
    assert _take(folder, items, path) == PAIRS
    (votes,) = folder.load_votes(items)
    assert votes.closed
    assert votes.choices == items.adapter_sides("anna")
    assert votes.seconds() == [4.5] * PAIRS
    assert _take(folder, items, path) == 0  # the same file again


def test_page_may_be_saved_several_times(folder: PreferenceFolder, items: ItemSet, tmp_path: Path) -> None:
    early = write_saved(tmp_path / "early.json", saved_page_votes(items, "anna", count=2, closed=False))
    late = write_saved(tmp_path / "late.json", saved_page_votes(items, "anna"))
    assert [_take(folder, items, path) for path in (early, early, late, early)] == [2, 0, PAIRS - 2, 0]
    assert folder.load_votes(items)[0].closed


def test_other_votes_of_the_same_rater_are_refused(folder: PreferenceFolder, items: ItemSet, tmp_path: Path) -> None:
    with folder.open_sitting(items, "anna") as sitting:
        sitting.record(sitting.pairs[0].item, "tie", seconds=None)
    path = write_saved(tmp_path / "votes.json", saved_page_votes(items, "anna"))
    with pytest.raises(JudgingError, match="'anna' has other votes here already: 1 acts"):
        _take(folder, items, path)
    assert len(folder.load_votes(items)[0].acts) == 1


def test_votes_behind_the_end_are_refused(folder: PreferenceFolder, items: ItemSet, tmp_path: Path) -> None:
    early = write_saved(tmp_path / "early.json", saved_page_votes(items, "anna", count=2))
    late = write_saved(tmp_path / "late.json", saved_page_votes(items, "anna"))
    assert _take(folder, items, early) == 2
    with pytest.raises(JudgingError, match="is closed, and the file has more votes"):
        _take(folder, items, late)


def test_rater_who_judges_at_the_moment_is_left_alone(folder: PreferenceFolder, items: ItemSet, tmp_path: Path) -> None:
    path = write_saved(tmp_path / "votes.json", saved_page_votes(items, "anna"))
    with folder.open_sitting(items, "anna"), pytest.raises(JudgingError, match="another process"):
        _take(folder, items, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loralab_votes": 2}, "no file of votes of this version"),
        ({"more": 1}, "no file of votes of this version"),
        ({"closed": "yes"}, "no file of votes of this version"),
        ({"acts": {}}, "no file of votes of this version"),
        ({"rater": 7}, "does not name rater and items"),
        ({"items_sha256": "0" * 64}, "these votes are on other items: set 000000000000"),
        ({"rater": "../anna"}, "not a rater's name"),
        ({"acts": [{"item": "0"}]}, "not a vote"),
        (
            {"acts": [{"item": "0" * 16, "choice": "left", "seconds": None, "at": "2026-11-27T10:00:00Z"}]},
            "never shown: 0000000000000000",
        ),
    ],
)
def test_foreign_files_are_refused(items: ItemSet, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = write_saved(tmp_path / "votes.json", saved_page_votes(items, "anna") | change)
    with pytest.raises(JudgingError) as raised:
        read_saved_votes(path, items)
    assert words in str(raised.value)
    assert str(path) in raised.value.problems[0].where
    assert len(str(raised.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"no json", "it is not JSON"), (b"[]", "holds list"), (b"[" * 100_000, "not JSON"), (b"\xff\xfe", "not JSON")],
)
def test_what_is_no_json_is_refused(items: ItemSet, tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "votes.json"
    path.write_bytes(content)
    with pytest.raises(JudgingError, match=words):
        read_saved_votes(path, items)


def test_missing_and_endless_files_are_refused(items: ItemSet, tmp_path: Path) -> None:
    with pytest.raises(JudgingError, match="there is no such file"):
        read_saved_votes(tmp_path / "none.json", items)
    with pytest.raises(JudgingError, match="it is no file"):
        read_saved_votes(tmp_path, items)
    large = tmp_path / "large.json"
    with large.open("wb") as stream:
        stream.truncate((16 << 20) + 1)
    with pytest.raises(JudgingError, match="more than 16,777,216"):
        read_saved_votes(large, items)
