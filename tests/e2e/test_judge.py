"""`judge` as a user runs it: in the terminal, on the page, by saved pages; its result, and what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from loralab.api import Run
from loralab.judging.folder import PreferenceFolder
from loralab.judging.items import ItemSet
from loralab.run import RunFolder, write_json
from support import tiny
from support.command import Answer, read_problems, run_here, run_watched, snapshot, start, write_config
from support.preference_tests import make_comparison, saved_page_votes, write_run, write_saved

PAIRS = 6


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return write_run(tmp_path / "run", PAIRS + 1, same=1)


def _items(run: RunFolder) -> ItemSet:
    found = PreferenceFolder(run.preference_votes, run.path / "pictures").load_items()
    assert found is not None
    return found


def _keys(items: ItemSet, rater: str, wish: str = "adapter") -> str:
    """Return the keys of a rater who prefers one model everywhere, then closes."""
    sides = items.adapter_sides(rater)
    letters = {"left": "a", "right": "b"} if wish == "adapter" else {"left": "b", "right": "a"}
    return "".join(f"{letters[sides[pair.item]]}\n" for pair in items.pairs_for(rater)) + "y\n"


def _terminal(run: RunFolder, keys: str, *options: object, rater: str = "anna") -> Answer:
    return run_here("judge", run.path, "--terminal", "--rater", rater, *options, stdin=keys)


def _votes(run: RunFolder, rater: str) -> list[dict[str, Any]]:
    text = (run.preference_votes / "votes" / f"{rater}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_voting_on_a_pipe_and_the_result(run: RunFolder) -> None:
    assert Run(run.path).preference is None
    first = _terminal(run, "")
    assert first.code == 0, first.err
    assert f"0 of {PAIRS} pairs judged" in first.err
    done = _terminal(run, _keys(_items(run), "anna"))
    assert done.code == 0, done.err
    assert f"===== {PAIRS} of {PAIRS}" in done.out
    assert f"All {PAIRS} pairs are judged." in done.out
    assert "adapter preferred: the interval leaves out 50 %; the sign test has p = 0.031" in done.out
    assert f"wrote {run.preference}" in done.err
    result = json.loads(run.preference.read_text(encoding="utf-8"))
    assert (result["adapter"], result["base"], result["tie"], result["same"]) == (PAIRS, 0, 1, 1)
    answer = run_here("judge", run.path, "--result", "--json")
    assert json.loads(answer.out) == result == Run(run.path).preference


def test_nothing_shown_before_the_end_tells_the_models(run: RunFolder) -> None:
    shown = _terminal(run, "a\nt\nn\n").out
    assert not re.search("base|adapter", shown)
    votes = "".join(json.dumps(vote) for vote in _votes(run, "anna"))
    assert not re.search("base|adapter", votes)


def test_keys_back_skip_and_leave(run: RunFolder) -> None:
    answer = _terminal(run, "A\n\nb\nu\nu\nu\nt\ns\nn\nq\n")
    assert answer.code == 0, answer.err
    assert "There is nothing to go back to." in answer.out
    assert "Taken back; the choice was b." in answer.out
    assert f"2 of {PAIRS} pairs judged; the same command goes on" in answer.err
    order = [pair.item for pair in _items(run).pairs_for("anna")]
    acts = [(order.index(vote["item"]), vote["choice"]) for vote in _votes(run, "anna")[1:]]
    assert acts == [(0, "left"), (1, "right"), (1, None), (0, None), (0, "tie"), (2, "both_bad")]
    assert all(vote["seconds"] is None for vote in _votes(run, "anna")[1:])  # nobody sits at a pipe
    again = _terminal(run, "a\n" * 4 + "u\nb\nn\n")
    assert f"{PAIRS} pairs, 2 of them judged already" in again.out
    assert f"{PAIRS} of {PAIRS} pairs judged" in again.err
    assert not run.preference.exists()
    assert run_here("judge", run.path, "--result").code == 0
    assert _votes(run, "anna")[-1]["closed"] is True


def test_json_of_a_sitting(run: RunFolder) -> None:
    left = _terminal(run, "a\n", "--json")
    assert json.loads(left.out) == {"rater": "anna", "votes": 1, "pairs": PAIRS, "closed": False}
    assert "===== 1 of" in left.err
    closed = _terminal(run, "a\n" * (PAIRS - 1) + "y\n", "--json")
    assert json.loads(closed.out) == json.loads(run.preference.read_text(encoding="utf-8"))


def test_wrong_key_on_a_pipe_keeps_what_came_before(run: RunFolder) -> None:
    answer = _terminal(run, "a\nb\nleft\n")
    assert answer.code == 2
    assert (
        "error: not a key: 'left'\nwhere: standard input, line 3\nfix:   give one a line (a: A is better" in answer.err
    )
    assert len(_votes(run, "anna")) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_sitting_goes_on_where_it_was(run: RunFolder, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "loralab.cli", "judge", str(run.path), "--terminal", "--rater", "anna"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        process.stdin.write("a\na\na\n")
        process.stdin.flush()
        while "===== 4" not in process.stdout.readline():  # the third vote was answered
            pass
        second = _terminal(run, "a\n")
        process.send_signal(signal.SIGKILL)
    assert "'anna' is judging in another process already" in second.err
    assert second.code == 2
    answer = _terminal(run, "a\na\na\ny\n")
    assert answer.code == 0, answer.err
    assert f"{PAIRS} pairs, 3 of them judged already" in answer.out
    assert json.loads(run.preference.read_text(encoding="utf-8"))["votes"] == PAIRS


def test_a_result_needs_no_torch(run: RunFolder, tmp_path: Path) -> None:
    for options in (["--terminal", "--rater", "anna"], ["--html", "page.html", "--rater", "bert"]):
        answer = run_watched("judge", run.path, *options, folder=tmp_path)
        assert (answer.code, answer.imported) == (0, []), answer.err
    path = write_saved(tmp_path / "votes.json", saved_page_votes(_items(run), "bert"))
    for options in (["--import", str(path)], ["--result"]):
        answer = run_watched("judge", run.path, *options, folder=tmp_path)
        assert (answer.code, answer.imported) == (0, []), answer.err


def test_page_for_somebody_else_and_its_votes(run: RunFolder, tmp_path: Path) -> None:
    made = run_here("judge", run.path, "--html", tmp_path / "page.html", "--rater", "bert")
    assert made.code == 0, made.err
    assert made.out.strip() == str(tmp_path / "page.html")
    items = _items(run)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert items.sha256 in page
    assert all(pair.item in page for pair in items.pairs_for("bert"))
    assert str(items.seed) not in page
    (problem,) = read_problems(
        run_here("judge", run.path, "--terminal", "--examples", 3)
    )  # the page would be for nothing
    assert "the items are frozen" in problem.what
    assert run_here("judge", run.path, "--html", tmp_path / "page.html", "--rater", "bert").code == 0
    (problem,) = read_problems(run_here("judge", run.path, "--result"))
    assert f"open: bert (0 of {PAIRS} pairs judged)" in problem.what
    saved = write_saved(tmp_path / "votes.json", saved_page_votes(items, "bert"))
    answer = run_here("judge", run.path, "--import", saved, "--json")
    assert json.loads(answer.out)["imported"][0]["votes"] == PAIRS
    assert run_here("judge", run.path, "--import", saved).code == 0
    result = run_here("judge", run.path, "--result")
    assert "bert: 6" in result.out
    (problem,) = read_problems(run_here("judge", run.path, "--html", tmp_path / "page.html", "--rater", "bert"))
    assert "'bert' has votes here already" in problem.what


def test_two_raters_and_the_report(run: RunFolder) -> None:
    _terminal(run, "")
    assert _terminal(run, _keys(_items(run), "anna")).code == 0
    answer = _terminal(run, _keys(_items(run), "bert", wish="base"), rater="bert")
    assert "agreement of 2 raters on 6 items: 0 % of pairs of votes are the same, Cohen's kappa" in answer.out
    assert "no difference seen at n = 0 decided items" in answer.out  # every item has one vote for each
    assert run_here("report", run.path).code == 0
    assert "Blind preference test" in run.report.read_text(encoding="utf-8")
    assert "2 raters judged answers to 6 prompts in 12 votes" in (run.adapter / "README.md").read_text(encoding="utf-8")


def test_open_sittings_are_named_and_can_be_closed(run: RunFolder) -> None:
    _terminal(run, "a\nb\n")
    (problem,) = read_problems(run_here("judge", run.path, "--result"))
    assert problem.what == f"no sitting is closed, and only closed ones count; open: anna (2 of {PAIRS} pairs judged)"
    assert "--close NAME" in problem.fix
    answer = run_here("judge", run.path, "--close", "anna")
    assert answer.code == 0, answer.err
    assert "4 items judged by nobody: left out" in answer.out
    (problem,) = read_problems(_terminal(run, "a\n"))
    assert problem.what == "the sitting of 'anna' is closed"
    assert "--rater NAME" in problem.fix


def test_changed_comparison_is_refused_until_a_new_test(run: RunFolder) -> None:
    _terminal(run, "a\n")
    write_json(run.comparison, make_comparison(3))
    before = snapshot(run.path)
    (problem,) = read_problems(_terminal(run, "a\n"))
    assert "the items are frozen, and the comparison has changed" in problem.what
    assert "--new" in problem.fix
    assert snapshot(run.path) == before
    answer = _terminal(run, "a\na\na\ny\n", "--new")
    assert answer.code == 0, answer.err
    assert (run.path / "preference-1" / "votes" / "anna.jsonl").is_file()


def test_equal_answers_are_a_result_at_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3, same=3)
    answer = run_here("judge", run.path, "--rater", "anna")
    assert answer.code == 0, answer.err
    assert "there is nothing to vote on" in answer.err
    assert "no difference seen at n = 0 decided items" in answer.out


@pytest.mark.parametrize(
    ("options", "what", "fix"),
    [
        (["--terminal", "--result"], "--terminal and --result together", "give one of them"),
        (["--html", "p.html"], "a page for somebody without a name", "--rater NAME"),
        (["--terminal", "--port", "8000"], "--port does nothing with --terminal", "leave it away"),
        (["--result", "--no-browser"], "--no-browser does nothing with --result", "leave it away"),
        (["--result", "--rater", "anna"], "--rater does nothing with --result", "leave it away"),
        (["--close", "anna", "--examples", "3"], "--examples does nothing with --close", "leave it away"),
        (["--import", "x.json", "--new"], "--new does nothing with --import", "leave it away"),
        (["--rater", "../anna"], "not a rater's name: '../anna'", "give letters"),
        (["--terminal", "--examples", "0"], "examples 0", "1 or more"),
        (["--data", "x.json"], "other rows than the run's own, and no folder for them", "--output FOLDER"),
        (["--result"], "no preference test in", "judge first: loralab judge"),
        (["--import", "x.json"], "no preference test in", "judge first: loralab judge"),
    ],
)
def test_mistakes_are_three_lines_and_change_nothing(
    run: RunFolder, options: list[str], what: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.path)
    before = snapshot(run.path)
    (problem,) = read_problems(run_here("judge", run.path, *options))
    assert what in problem.what
    assert fix in problem.fix
    assert snapshot(run.path) == before


def test_what_cannot_be_judged_is_named(run: RunFolder, tmp_path: Path) -> None:
    (problem,) = read_problems(run_here("judge", tmp_path / "none", "--terminal"))
    assert "no such folder" in problem.what
    text = make_comparison(2)
    for record in text["prompts"]:
        record |= {"prompt": "", "base_output": None, "adapter_output": None}
    write_json(run.comparison, text)
    (problem,) = read_problems(run_here("judge", run.path, "--terminal"))
    assert "plain text has none" in problem.what
    assert "--data FILE --output FOLDER" in problem.fix
    shutil.rmtree(run.adapter)
    (problem,) = read_problems(run_here("judge", run.path, "--terminal"))
    assert "has no adapter" in problem.what


def _post(address: str, name: str, value: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{address}{name}", json.dumps(value).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=20) as reply:
        return dict(json.loads(reply.read()))


def test_votes_by_the_page_end_in_the_result(run: RunFolder, tmp_path: Path) -> None:
    process = start("judge", run.path, "--rater", "anna", "--no-browser", "--json", folder=tmp_path)
    with process:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"anna judges at (http://127\.0\.0\.1:\d+/[\w-]+/)", line)
        assert found is not None, line
        items = _items(run)
        sides = items.adapter_sides("anna")
        for pair in items.pairs_for("anna"):
            _post(found[1], "votes", {"item": pair.item, "choice": sides[pair.item], "seconds": 2.5})
        shown = _post(found[1], "close", {})["result"]
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert shown["wins"] == [0, PAIRS]
    assert shown["names"] == ["the base model", "the adapter"]
    result = json.loads(out)
    assert (result["adapter"], result["raters"][0]["seconds_per_vote"]) == (PAIRS, 2.5)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to another process")
def test_interrupted_page_keeps_its_votes(run: RunFolder, tmp_path: Path) -> None:
    process = start("judge", run.path, "--rater", "anna", "--no-browser", folder=tmp_path)
    with process:
        assert process.stderr is not None
        found = re.search(r"(http://\S+/)", process.stderr.readline())
        assert found is not None
        _post(found[1], "votes", {"item": _items(run).pairs_for("anna")[0].item, "choice": "tie", "seconds": 1})
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"1 of {PAIRS} pairs judged; the same command goes on" in err
    assert _votes(run, "anna")[1]["choice"] == "tie"


def test_a_run_that_was_never_compared_is_compared_first(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    rows = tiny.write_rows(tmp_path / "rows.json", tiny.alpaca_rows(16))
    evaluation = {"num_samples": 0, "max_new_tokens": 6, "batch_size": 4}
    values = tiny.run_config(base, rows, tmp_path / "run", data={"validation": 6}, evaluation=evaluation)
    assert run_here("train", write_config(tmp_path / "config.yaml", values)).code == 0
    run = RunFolder(tmp_path / "run")
    first = _terminal(run, "")
    assert first.code == 0, first.err
    assert "nothing is compared yet" in first.err
    comparison = json.loads(run.comparison.read_text(encoding="utf-8"))
    recorded = json.loads(run.record.read_text(encoding="utf-8"))["adapter_sha256"]
    assert comparison["adapter_sha256"] == recorded == _items(run).adapter_sha256
    again = _terminal(run, _keys(_items(run), "anna"))
    assert again.code == 0, again.err
    assert "nothing is compared yet" not in again.err
    other = ["--data", rows, "--split", "train", "--output", tmp_path / "other", "--examples", 3]
    answer = _terminal(run, "a\na\na\ny\n", *other)
    assert answer.code == 0, answer.err
    assert (tmp_path / "other" / "preference.json").is_file()
    (problem,) = read_problems(_terminal(run, "", "--data", rows, "--split", "validation", *other[4:]))
    assert "a comparison of other rows lies there" in problem.what
    # A run that is trained again takes its result along, and leaves the votes to whoever cast them.
    assert run_here("train", tmp_path / "config.yaml", "--overwrite", "training.seed=7").code == 0
    assert not run.preference.exists()
    (problem,) = read_problems(run_here("judge", run.path, "--result"))
    assert "the adapter is another one now" in problem.what
