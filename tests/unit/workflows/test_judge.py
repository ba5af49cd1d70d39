"""The preference test of a run: when items are frozen, what is refused, and what votes come to."""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from scipy import stats

from loralab.errors import ConfigError, JudgingError, ModelError
from loralab.evaluation.preference import Vote, wilson
from loralab.judging.votes import Choice
from loralab.models.adapter_hash import WEIGHTS_FILE
from loralab.progress import Reporter
from loralab.run import RunFolder, file_sha256, write_json
from loralab.workflows.judge import (
    JudgeRequest,
    PreferenceTest,
    check_unvoted,
    close_sitting,
    import_votes,
    load_test,
    open_test,
)
from loralab.workflows.judge_result import compute_result, reveal, write_result
from support.preference_tests import (
    cast,
    cast_wishes,
    make_comparison,
    make_items,
    saved_page_votes,
    write_run,
    write_saved,
)


class Notes(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


class Comparing:
    """Stands in for the comparison, which needs a model."""

    def __init__(self, folder: RunFolder, count: int = 40) -> None:
        self.folder = folder
        self.count = count
        self.asked: list[dict[str, Any]] = []

    def __call__(self, **request: Any) -> None:
        self.asked.append(request)
        place = RunFolder(request["output"]) if request["output"] is not None else self.folder
        write_json(place.comparison, make_comparison(self.count) | {"data": request["data"]})


def _no_compare(**_request: Any) -> None:
    raise AssertionError("nothing is to be compared")


def _open(run: RunFolder, compare: Callable[..., None] = _no_compare, **request: Any) -> PreferenceTest:
    return open_test(run.path, JudgeRequest(**request), compare=compare, reporter=Notes())


def _vote(test: PreferenceTest, rater: str, count: int | None = None, *, close: bool = False) -> None:
    with test.folder.open_sitting(test.items, rater) as sitting:
        for pair in sitting.pairs[:count]:
            sitting.record(pair.item, "left", seconds=None)
        if close:
            sitting.close()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return write_run(tmp_path / "run", 8)


def _change_adapter(run: RunFolder) -> None:
    save_file({"lora_A.weight": np.zeros((2, 3), np.float32)}, run.adapter / WEIGHTS_FILE)


def test_comparison_that_is_there_is_judged(run: RunFolder) -> None:
    test = _open(run)
    assert len(test.items.items) == 8
    assert test.name == "run"
    assert _open(run).items == test.items
    assert run.preference_votes.joinpath("items.json").is_file()


def test_without_a_comparison_one_is_made_first(run: RunFolder) -> None:
    run.comparison.unlink()
    compare, notes = Comparing(run), Notes()
    test = open_test(run.path, JudgeRequest(), compare=compare, reporter=notes)
    assert compare.asked == [{"data": None, "split": None, "max_examples": 30, "output": None}]
    assert len(test.items.items) == 30
    assert "nothing is compared yet" in notes.lines[0]
    assert _open(run).items == test.items


def test_other_rows_lie_in_a_folder_of_their_own(run: RunFolder, tmp_path: Path) -> None:
    compare = Comparing(run, 40)
    asked: dict[str, Any] = {"data": "other.jsonl", "output": tmp_path / "other"}
    notes = Notes()
    test = open_test(run.path, JudgeRequest(examples=60, **asked), compare=compare, reporter=notes)
    assert compare.asked[0]["max_examples"] == 60
    assert "has 40 prompts to judge, fewer than the 60 asked for" in notes.lines[1]
    assert test.place.path == tmp_path / "other"
    assert _open(run, **asked).items == _open(run, output=tmp_path / "other").items == test.items
    with pytest.raises(JudgingError, match=r"a comparison of other rows lies there: data 'other\.jsonl'"):
        _open(run, data="third.jsonl", output=tmp_path / "other")
    with pytest.raises(JudgingError, match="split 'validation'"):
        _open(run, data="other.jsonl", split="test", output=tmp_path / "other")
    for request in ({"data": "other.jsonl"}, {"split": "test"}):
        with pytest.raises(ConfigError, match="no folder for them"):
            _open(run, **request)


def test_adapter_alone_needs_a_folder(run: RunFolder, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(run.adapter, alone)
    with pytest.raises(ConfigError, match="an adapter without its run folder"):
        open_test(alone, JudgeRequest(), compare=_no_compare, reporter=Notes())
    test = open_test(alone, JudgeRequest(output=tmp_path / "x"), compare=Comparing(run), reporter=Notes())
    assert test.place.path == tmp_path / "x"
    inside = open_test(run.adapter, JudgeRequest(), compare=_no_compare, reporter=Notes())
    assert inside.place.path == run.path


def test_what_is_no_adapter_is_named(tmp_path: Path, run: RunFolder) -> None:
    for path, words in ((tmp_path / "none", "no such folder"), (tmp_path, "neither a run nor an adapter folder")):
        with pytest.raises(ModelError, match=words):
            open_test(path, JudgeRequest(), compare=_no_compare, reporter=Notes())
    shutil.rmtree(run.adapter)
    with pytest.raises(ModelError, match=r"\(completed\) has no adapter") as raised:
        _open(run)
    assert f"loralab train {run.config} --resume" in str(raised.value)
    with pytest.raises(ModelError, match="no such folder") as raised:
        open_test(Path("ada/price"), JudgeRequest(), compare=_no_compare, reporter=Notes())
    assert "hf download ada/price --local-dir price" in str(raised.value)


def test_number_of_examples(run: RunFolder) -> None:
    assert len(_open(run, examples=3).items.items) == 3
    assert len(_open(run).items.items) == 3  # frozen
    assert len(_open(run, examples=5).items.items) == 5  # nobody has voted yet
    test = _open(run)
    _vote(test, "anna", 1)
    assert _open(run, examples=5).items == test.items
    with pytest.raises(JudgingError, match="4 prompts are asked for, and 5 are frozen") as raised:
        _open(run, examples=4)
    assert "--new" in str(raised.value)
    with pytest.raises(ConfigError, match="examples 0"):
        _open(run, examples=0)


@pytest.mark.parametrize("voted", [False, True])
def test_comparison_that_changes_is_noticed(run: RunFolder, voted: bool) -> None:
    test = _open(run)
    if voted:
        _vote(test, "anna", 1)
    comparison = json.loads(run.comparison.read_text(encoding="utf-8"))
    write_json(run.comparison, comparison | {"probe": 1})
    assert _open(run).items == test.items  # the same prompts and answers
    comparison["prompts"][0]["adapter_output"] = "Something else."
    write_json(run.comparison, comparison)
    if voted:
        with pytest.raises(JudgingError, match="the items are frozen, and the comparison has changed") as raised:
            _open(run)
        assert "begin a new test with --new" in str(raised.value)
    else:
        assert _open(run).items.items[0].adapter_output == "Something else."


def test_adapter_that_changes_is_noticed(run: RunFolder) -> None:
    test = _open(run)
    _vote(test, "anna", close=True)
    _change_adapter(run)
    with pytest.raises(JudgingError, match="the comparison is of another adapter"):
        _open(run)
    run.comparison.unlink()
    for reopen in (lambda: _open(run), lambda: load_test(run.path, None)):
        with pytest.raises(JudgingError, match="the adapter is another one now"):
            reopen()


def test_new_test_keeps_the_old_one(run: RunFolder) -> None:
    _vote(_open(run), "anna", close=True)
    write_result(load_test(run.path, None), Notes())
    before = file_sha256(run.preference)
    test = _open(run, new=True)
    assert not test.folder.has_votes()
    assert not run.preference.exists()
    assert file_sha256(run.path / "preference-1" / "preference.json") == before
    assert (run.path / "preference-1" / "votes" / "anna.jsonl").is_file()
    _open(run, new=True)
    assert (run.path / "preference-2").is_dir()


def test_pictures_are_copied_and_lost_ones_left_out(run: RunFolder, tmp_path: Path) -> None:
    picture = tmp_path / "cat.png"
    Image.new("RGB", (12, 8), "red").save(picture)
    comparison = json.loads(run.comparison.read_text(encoding="utf-8"))
    facts = {"path": str(picture), "sha256": file_sha256(picture), "width": 12, "height": 8}
    comparison["prompts"][0]["images"] = [facts]
    comparison["prompts"][1]["images"] = [facts | {"path": str(tmp_path / "gone.png"), "sha256": "0" * 64}]
    write_json(run.comparison, comparison)
    notes = Notes()
    test = open_test(run.path, JudgeRequest(), compare=_no_compare, reporter=notes)
    assert notes.lines == ["1 of 8 prompts are left out: their pictures are gone or have changed"]
    shown = {pair.prompt: pair.pictures for pair in test.items.pairs_for("anna")}
    assert len(shown) == 7
    (path,) = shown["What is 0 + 0?"]
    assert path.parent == run.path / "pictures"
    assert path.is_file()


def test_result_needs_a_closed_sitting(run: RunFolder) -> None:
    with pytest.raises(JudgingError, match="nothing was judged yet"):
        load_test(run.path, None)
    test = _open(run)
    with pytest.raises(JudgingError, match="nobody has voted yet"):
        write_result(test, Notes())
    with test.folder.open_sitting(test.items, "carl") as sitting:
        sitting.close()
    with pytest.raises(JudgingError, match="no vote counts: carl closed the sitting without one"):
        write_result(test, Notes())
    _vote(test, "anna", 3)
    with pytest.raises(JudgingError, match=r"open: anna \(3 of 8 pairs judged\)"):
        write_result(test, Notes())
    with pytest.raises(JudgingError, match="no votes of 'bert' here") as raised:
        close_sitting(test, "bert")
    assert "name one of anna, carl" in str(raised.value)
    close_sitting(test, "anna")
    result = write_result(test, Notes())
    assert (result["votes"], result["judged"], result["not_judged"]) == (3, 3, 5)
    assert json.loads(run.preference.read_text(encoding="utf-8")) == result


def test_finished_sitting_is_closed_by_its_result_but_not_under_the_rater(run: RunFolder) -> None:
    test = _open(run)
    _vote(test, "anna")
    _vote(test, "bert")
    with test.folder.open_sitting(test.items, "bert") as sitting:
        result = write_result(test, Notes())
        assert [each["rater"] for each in result["raters"]] == ["anna"]
        assert result["open"] == [{"rater": "bert", "votes": 8}]
        assert not sitting.closed
    notes = Notes()
    assert [each["rater"] for each in write_result(test, notes)["raters"]] == ["anna", "bert"]
    assert notes.lines == ["all pairs of bert are judged: the sitting is closed now, since names are shown"]


def test_result_names_every_item(tmp_path: Path) -> None:
    items = make_items(4, same=1)
    wishes: list[list[Vote]] = [["adapter", "base", "both_bad"], ["adapter", "tie"]]
    result = compute_result(items, [cast_wishes(items, "a", wishes[0]), cast_wishes(items, "b", wishes[1])])
    rows = result["rows"]
    assert [row["verdict"] for row in rows] == ["tie", "adapter", "tie", "both_bad"]
    assert rows[0]["same"]
    assert rows[1]["votes"] == {"a": "adapter", "b": "adapter"}
    assert rows[3]["votes"] == {"a": "both_bad"}
    assert (result["adapter"], result["base"], result["tie"], result["both_bad"]) == (1, 0, 3, 1)
    assert (result["same"], result["judged"], result["votes"]) == (1, 4, 5)
    assert result["agreement"]["items"] == 2
    assert [rater["not_judged"] for rater in result["raters"]] == [0, 1]
    assert set(result["definitions"]) >= {"share", "verdict", "agreement"}


def test_all_answers_the_same_need_no_votes(tmp_path: Path) -> None:
    test = _open(write_run(tmp_path / "run", 3, same=3))
    result = write_result(test, Notes())
    assert (result["tie"], result["decided"], result["raters"], result["votes"]) == (3, 0, [], 0)
    assert result["verdict"] == "no difference seen at n = 0 decided items"


def test_what_a_rater_is_shown_at_the_end(run: RunFolder) -> None:
    test = _open(run)
    _vote(test, "anna", 5)
    with pytest.raises(JudgingError, match="is not closed"):
        reveal(test, "anna")
    close_sitting(test, "anna")
    shown = reveal(test, "anna")
    lefts = [shown["left"][pair.item] for pair in test.items.pairs_for("anna")[:5]]  # the left answer was preferred
    assert shown["wins"] == (lefts.count(0), lefts.count(1))
    assert (shown["ties"], shown["both_bad"], shown["same_text"], shown["not_judged"]) == (0, 0, 0, 3)
    assert f"the adapter's was better in {lefts.count(1)}" in shown["reading"]
    assert shown["left"] == {item: int(side == "left") for item, side in test.items.adapter_sides("anna").items()}


def test_saved_pages_are_taken_all_or_none(run: RunFolder, tmp_path: Path) -> None:
    test = _open(run)
    good = write_saved(tmp_path / "a.json", saved_page_votes(test.items, "anna"))
    bad = write_saved(tmp_path / "b.json", saved_page_votes(test.items, "bert") | {"items_sha256": "0" * 64})
    with pytest.raises(JudgingError, match="on other items"):
        import_votes(test, [good, bad], Notes())
    assert not test.folder.has_votes()
    notes = Notes()
    (taken,) = import_votes(test, [good], notes)
    assert taken == {"file": str(good), "rater": "anna", "votes": 8, "pairs": 8, "new": 8, "closed": True}
    assert notes.lines == ["anna: 8 of 8 pairs judged, closed (8 new acts)"]
    assert write_result(test, Notes())["adapter"] == 8
    check_unvoted(test, "bert")
    with pytest.raises(JudgingError, match="'anna' has votes here already"):
        check_unvoted(test, "anna")


def test_saved_page_that_does_not_fit_what_is_there_stops_all(run: RunFolder, tmp_path: Path) -> None:
    test = _open(run)
    _vote(test, "bert", 3, close=True)
    good = write_saved(tmp_path / "a.json", saved_page_votes(test.items, "anna"))
    other = write_saved(tmp_path / "b.json", saved_page_votes(test.items, "bert"))
    with pytest.raises(JudgingError, match="'bert' has other votes here already"):
        import_votes(test, [good, other], Notes())
    carl = write_saved(tmp_path / "c.json", saved_page_votes(test.items, "carl"))
    with (
        test.folder.open_sitting(test.items, "carl"),
        pytest.raises(JudgingError, match="'carl' is judging at this moment"),
    ):
        import_votes(test, [good, carl], Notes())
    assert "anna" not in test.folder.raters()


def test_old_saved_page_does_not_change_what_is_said_of_its_rater(run: RunFolder, tmp_path: Path) -> None:
    test, notes = _open(run), Notes()
    old = write_saved(tmp_path / "old.json", saved_page_votes(test.items, "anna", count=3, closed=False))
    new = write_saved(tmp_path / "new.json", saved_page_votes(test.items, "anna"))
    import_votes(test, [old, new], notes)
    import_votes(test, [old], notes)
    assert notes.lines == [
        "anna: 3 of 8 pairs judged, not closed yet (3 new acts)",
        "anna: 8 of 8 pairs judged, closed (5 new acts)",
        "anna: 8 of 8 pairs judged, closed (nothing new)",
    ]


def test_new_test_that_cannot_be_leaves_the_old_one(run: RunFolder, tmp_path: Path) -> None:
    _vote(_open(run), "anna", 2)
    with pytest.raises(JudgingError, match="a comparison of other rows"):
        _open(run, data="other.jsonl", output=run.path, new=True)
    _change_adapter(run)
    with pytest.raises(JudgingError, match="the comparison is of another adapter"):
        _open(run, new=True)
    assert (run.preference_votes / "votes" / "anna.jsonl").is_file()


def _session(rng: random.Random, *, share: float, ties: float, left: float) -> Callable[[str], Choice]:
    """Return a rater: of the votes a share `ties` is none, and a quarter of the others goes by position alone."""

    def choose(side: str) -> Choice:
        if rng.random() < ties:
            return rng.choice(["tie", "both_bad"])
        if rng.random() < 0.25:
            return "left" if rng.random() < left else "right"
        if rng.random() < share:
            return "left" if side == "left" else "right"
        return "right" if side == "left" else "left"

    return choose


def test_a_thousand_sittings_hold_the_truth_whatever_their_habit() -> None:
    rng, items, sessions = random.Random(5), make_items(30), 1000
    truth = 0.75 * 0.7 + 0.25 * 0.5
    held, chance, seen, shares = 0.0, 0.0, 0, []
    for number in range(sessions):
        rater = f"rater {number}"
        choose = _session(rng, share=0.7, ties=0.2, left=1.0)
        votes = cast(items, rater, {item: choose(side) for item, side in items.adapter_sides(rater).items()})
        result = compute_result(items, [votes])
        share = result["share"]
        held += share["low"] <= truth <= share["high"]
        chance += _coverage(truth, result["decided"])
        seen += result["position"]["biased"]
        shares.append(result["adapter"] / result["decided"])
    assert held / sessions == pytest.approx(chance / sessions, abs=4 * math.sqrt(0.05 * 0.95 / sessions))
    assert 0.93 <= held / sessions <= 0.985
    assert np.mean(shares) == pytest.approx(truth, abs=0.012)  # 24 decided votes each: 4 standard errors
    assert seen / sessions > 0.1  # a quarter by habit is hard to see in 24 votes


def _coverage(truth: float, total: int) -> float:
    intervals = (wilson(count, total) for count in range(total + 1))
    holding = [
        count
        for count, found in enumerate(intervals)
        if found.low is not None and found.high is not None and found.low <= truth <= found.high
    ]
    return float(stats.binom.pmf(holding, total, truth).sum())
