"""Which predictions the page shows, and how much of them."""

import json
from pathlib import Path

import pytest

from loralab.config.metric_facts import FACTS
from loralab.errors import RunFolderError
from loralab.evaluation.metrics.table import METRICS
from loralab.reports.examples import MINUS_SCORES, choose_examples, clip, describe_examples, read_predictions
from loralab.reports.facts import load_facts
from unit.reports import run_folders
from unit.reports.run_folders import build_run, build_whole_run, prediction
from unit.reports.test_html import read_page


def test_most_gained_most_lost_and_worst_and_none_twice() -> None:
    scores = [(0.0, 1.0), (1.0, 0.0), (0.2, 0.9), (0.9, 0.1), (0.5, 0.5), (0.3, 0.3)]
    assert choose_examples(scores) == [
        ("Where the adapter gained most over the base", 2, [0, 2]),
        ("Where it lost most", 2, [1, 3]),
        ("Its worst answers besides", 2, [5, 4]),
    ]


def test_at_most_five_of_each_the_first_of_equal_ones() -> None:
    groups = choose_examples([(0.0, 1.0)] * 20 + [(1.0, 0.0)] * 3)
    assert [(count, places) for _, count, places in groups] == [(20, [0, 1, 2, 3, 4]), (3, [20, 21, 22]), (0, [])]


def test_where_all_are_equally_good_none_is_the_worst() -> None:
    assert all(not places for _, _, places in choose_examples([(1.0, 1.0)] * 4))
    assert choose_examples([]) == choose_examples([(1.0, 1.0)])[:0] + choose_examples([])


def test_the_page_shows_them_with_scores_and_both_answers(tmp_path: Path) -> None:
    rows = [prediction(7, base=0, adapter=1), prediction(8, base=1, adapter=0), prediction(9, base=1, adapter=1)]
    rows[0]["adapter"]["label_scores"] = {"yes": -0.1, "no": -2.3}
    page = read_page(build_whole_run(tmp_path, evaluation=run_folders.task_evaluation(), predictions=rows))
    text = page.text[page.text.index("Best and worst examples") :]
    assert "By yes_no, higher is better, of 3 answers" in text
    assert "Where the adapter gained most over the base 1 of 1 Row 7: base model 0, adapter 1 Is it? 7" in text
    assert "Where it lost most 1 of 1 Row 8: base model 1, adapter 0" in text
    assert "cut, no stop token" in text
    assert "yes 0.90, no 0.10" in text
    assert "Row 9" not in text


def test_the_first_metric_with_scores_sorts_them(tmp_path: Path) -> None:
    row = prediction(1, base=0, adapter=1)
    for side in ("base", "adapter"):
        row[side]["scores"] = {"chrf": None, "rouge": 0.25, "bleu": 1.0}
    found = describe_examples(load_facts(build_run(tmp_path, predictions=[row])))
    assert found is not None
    assert found["metric"] == "rouge"
    row["base"]["scores"] = {}
    (tmp_path / "none").mkdir()
    assert describe_examples(load_facts(build_run(tmp_path / "none", predictions=[row]))) is None


def test_scores_that_are_minus_an_error_are_shown_as_errors(tmp_path: Path) -> None:
    rows = [prediction(7, base=0, adapter=1)]
    rows[0]["base"]["scores"], rows[0]["adapter"]["scores"] = {"number": -180.0}, {"number": -101.5}
    text = read_page(build_whole_run(tmp_path, predictions=rows)).text
    assert "By number: absolute error, smaller is better, of 1 answers" in text
    assert "Row 7: base model 180, adapter 101.5" in text


def test_a_function_of_the_users_own_says_its_direction(tmp_path: Path) -> None:
    row = prediction(1, base=0, adapter=1)
    row["base"]["scores"], row["adapter"]["scores"] = {"own.module:edits": -4.0}, {"own.module:edits": 0.0}
    content = run_folders.evaluation() | {"metrics": {"edits": run_folders.figure(2.0, 1.0, 3.0, better="lower")}}
    found = describe_examples(load_facts(build_run(tmp_path, predictions=[row], evaluation=content)))
    assert found is not None
    assert found["better"] == "smaller"
    assert [each["score"] for each in found["groups"][0]["rows"][0]["answers"]] == ["4", "0"]


def test_all_metrics_whose_scores_are_minus_something_are_known() -> None:
    lower = {name for name, metric in METRICS.items() if metric.per_answer is not None
             and FACTS[name].figures[FACTS[name].headline[0]] == "lower"}  # fmt: skip
    assert lower == set(MINUS_SCORES)


def test_lines_end_at_line_feeds_alone_and_a_cut_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    rows = [{"prompt": "one\u2028two\u0085three"}, {"prompt": "four"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text + '{"prompt": "fi', encoding="utf-8")
    assert list(read_predictions(path)) == rows
    path.write_text('{"a": 1}\nnot JSON\n{"a": 2}\n')
    with pytest.raises(RunFolderError, match="line 2"):
        list(read_predictions(path))
    assert list(read_predictions(tmp_path / "none.jsonl")) == []


def test_long_texts_are_clipped_in_the_middle_and_say_so() -> None:
    text = "a" * 500 + "b" * 500 + "c" * 500
    assert clip(text, 100, 100) == "a" * 100 + " [\u2026 1,300 characters \u2026] " + "c" * 100
    assert clip(text, 100) == "a" * 100 + " [\u2026 1,400 characters \u2026] "
    assert clip("short", 100) == "short"
    assert clip("x" * 120, 100) == "x" * 120
