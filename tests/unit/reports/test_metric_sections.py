"""Task metrics, confusion matrices, calibration and comparison on the page and the card."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from loralab.reports.comparison_section import describe_comparison
from loralab.reports.facts import load_facts
from loralab.reports.html import write_report
from loralab.reports.metric_sections import describe_details, describe_metrics
from loralab.reports.model_card import write_model_card
from loralab.run import RunFolder
from unit.reports import run_folders
from unit.reports.run_folders import HOSTILE, build_whole_run
from unit.reports.test_html import Page, hostile, read_page
from unit.reports.test_model_card import table_rows


def whole_run(path: Path, **changes: Any) -> RunFolder:
    parts = {"evaluation": run_folders.task_evaluation(), "comparison": run_folders.comparison()}
    return build_whole_run(path, **(parts | changes))


def metrics_part(text: str) -> str:
    return text[text.index("Value and 95") : text.index("Confusion matrix")]


def test_every_figure_has_both_sides_their_intervals_and_a_verdict(tmp_path: Path) -> None:
    text = metrics_part(read_page(whole_run(tmp_path)).text)
    for row in (
        "yes_no_accuracyhigher0.5450.448 to 0.6400.8180.731 to 0.882+0.273+0.172 to +0.374better99",
        "yes_no_macro_f1higher0.7500.662 to 0.8410.7710.680 to 0.853+0.021-0.030 to +0.071"
        "no difference seen at n = 9999",
        "number_maelower1,3121,100 to 1,59942.337.2 to 48.8-1,270-1,555 to -1,060better99",
    ):
        assert row in text, (row, text)
    assert "right only with the adapter 31, right only without it 4; McNemar\u2019s exact p = 3.4e-6" in text
    assert "Percentile bootstrap over 99 rows" in text


def test_the_verdict_names_what_the_task_metrics_say(tmp_path: Path) -> None:
    text = read_page(whole_run(tmp_path)).text
    said = "Task metrics, better: yes_no_accuracy, number_mae; no difference seen at n = 99: yes_no_macro_f1."
    assert said in text[: text.index("Loss, nats per token")]
    card = write_model_card(RunFolder(tmp_path / "my-run")).read_text(encoding="utf-8")
    assert said.replace("_", "\\_") in card
    assert (
        "| `number_mae` | lower | 1,312 (1,100 to 1,599) | 42.3 (37.2 to 48.8) "
        "| -1,270 (-1,555 to -1,060) | better | 99 |"
    ) in card


def test_flat_figures_do_not_appear_twice(tmp_path: Path) -> None:
    evaluation = run_folders.task_evaluation()
    for side in (evaluation, evaluation["base"]):
        side |= {"token_accuracy": 0.55, "token_entropy": 2.1}
    text = read_page(whole_run(tmp_path, evaluation=evaluation)).text
    scores = text[text.index("Loss, nats per token") : text.index("Loss is the negative")]
    assert "Token accuracy" in scores
    assert "yes_no" not in scores
    perplexity = run_folders.figure(4.9933, 4.7, 5.3, better="lower")
    for side in (evaluation, evaluation["base"]):
        side["metrics"]["perplexity"] = perplexity
    (tmp_path / "other").mkdir()
    text = read_page(whole_run(tmp_path / "other", evaluation=evaluation)).text
    assert "Perplexity" not in text[text.index("Loss, nats per token") : text.index("Loss is the negative")]
    assert "4.700 to 5.300" in metrics_part(text)


@pytest.mark.parametrize(
    ("way", "words"),
    [("generate", "token by token, as in use"), ("score", "closed labels"), ("teacher_forced", "teacher forcing")],
)
def test_how_answers_came_about_is_said(tmp_path: Path, way: str, words: str) -> None:
    evaluation = run_folders.task_evaluation() | {"answered_by": way}
    if way == "teacher_forced":
        evaluation["note"] = "Figures are better than those of written answers."
    folder = whole_run(tmp_path, evaluation=evaluation)
    text = read_page(folder).text
    assert f"Answers: {way}, " in text
    assert words in text
    card = write_model_card(folder).read_text(encoding="utf-8")
    assert words in card
    for said in (text, card):
        assert ("Figures are better than those of written answers." in said) == (way == "teacher_forced")


def test_confusion_matrices_of_both_sides_are_tables_with_names_and_shades(tmp_path: Path) -> None:
    source = write_report(whole_run(tmp_path)).read_text(encoding="utf-8")
    matrices = re.findall(r'<table class="matrix">.*?</table>', source, re.DOTALL)
    assert len(matrices) == 2
    base, adapter = (" ".join(Page(matrix).text.split()) for matrix in matrices)
    assert base == "Base model referenceyesnounparsableall yes3020454 no2024145"
    assert adapter == "Adapter referenceyesnounparsableall yes513054 no1430145"
    shades = [int(shade) for shade in re.findall(r"(\d+)%, transparent", matrices[1])]
    assert shades == [38, 2, 0, 12, 27, 1]  # 40 % of colour for a whole row
    assert re.findall(r'class="number right"[^>]*>(\d+)<', matrices[1]) == ["51", "30"]
    assert "0.9 to 1990.9600.818" in read_page(RunFolder(tmp_path / "my-run")).text


def test_of_many_classes_the_most_common_are_shown(tmp_path: Path) -> None:
    names = [f"label {number}" for number in range(30)]
    counts = [[number if row == column else 0 for column in range(31)] for row, number in enumerate(range(30))]
    evaluation = run_folders.task_evaluation()
    details = {"classes": names, "columns": [*names, "(no label)"], "confusion_matrix": counts}
    evaluation["details"] = evaluation["base"]["details"] = {"label_accuracy": details}
    (found,) = describe_details(load_facts(whole_run(tmp_path, evaluation=evaluation)))
    matrix = found["matrices"][0]
    assert [row["name"] for row in matrix["rows"]] == names[10:]
    assert matrix["columns"] == [*names[10:], "(no label)"]
    assert matrix["more"] == 10
    text = read_page(RunFolder(tmp_path / "my-run")).text
    assert "10 rarer classes stand in evaluation.json" in text


@pytest.mark.parametrize("matrix", [[[1, 2]], [[1, 2, 3], [4, 5]], [["a", 1, 2], [1, 2, 3]], None, 7])
def test_a_matrix_that_does_not_fit_its_names_is_left_out(tmp_path: Path, matrix: object) -> None:
    evaluation = run_folders.task_evaluation()
    for side in (evaluation, evaluation["base"]):
        side["details"] = {"yes_no": side["details"]["yes_no"] | {"confusion_matrix": matrix}}
    assert describe_details(load_facts(whole_run(tmp_path, evaluation=evaluation))) == []


def test_figures_without_interval_or_other_side_are_shown_as_such(tmp_path: Path) -> None:
    evaluation = run_folders.task_evaluation()
    del evaluation["base"]["metrics"], evaluation["differences"]
    evaluation["metrics"] = {"my_figure": run_folders.figure(3.0, None, None, method="none: one row", better=None)}
    found = describe_metrics(load_facts(whole_run(tmp_path, evaluation=evaluation)))
    assert found is not None
    (row,) = found["rows"]
    assert row["values"] == [("\u2013", ""), ("3", "")]
    assert (row["difference"], row["verdict"], row["better"]) == (("\u2013", ""), "\u2013", "\u2013")
    assert found["methods"] == [("None: one row", "my_figure")]
    assert found["summary"] == ""


def test_a_run_without_task_metrics_has_no_such_sections(tmp_path: Path) -> None:
    page = read_page(build_whole_run(tmp_path))
    assert {"metrics", "examples", "comparison"}.isdisjoint({attributes.get("id") for _, attributes in page.tags})
    assert "Task metrics" not in page.text


def test_the_comparison_has_totals_probe_and_a_link_to_its_page(tmp_path: Path) -> None:
    folder = whole_run(tmp_path)
    page = read_page(folder)
    part = page.text[page.text.index("How far the predictions") :]
    assert "Last token of the prompt (n = 30)" in part
    assert "KL(base \u2016 adapter), nats0.4320.410 to 0.457infinite" in part
    assert "6 of 30 prompts were answered alike." in part
    assert "Perplexity on unrelated text rose by 29 % (n = 30)." in part
    assert "verdict verdict-worse" in folder.report.read_text(encoding="utf-8")
    assert "comparison.html" not in [attributes["href"] for attributes in page.of("a")]
    folder.comparison_page.write_text("page")
    assert "comparison.html" in [attributes["href"] for attributes in read_page(folder).of("a")]


def test_forgetting_is_marked_where_it_was_seen(tmp_path: Path) -> None:
    comparison = run_folders.comparison()
    comparison["probe"]["difference"]["verdict"] = "no difference seen at n = 2"  # though its interval leaves out 0
    found = describe_comparison(load_facts(whole_run(tmp_path, comparison=comparison)))
    assert found is not None
    assert found["probe"]["outcome"] == "none"


def test_a_probe_of_the_runs_own_data_is_not_called_unrelated(tmp_path: Path) -> None:
    content = run_folders.comparison()
    content["probe"]["note"] = "train.txt is training data of the run, not unrelated text"
    folder = whole_run(tmp_path, comparison=content)
    found = describe_comparison(load_facts(folder))
    assert found is not None
    assert (found["probe"]["own"], found["probe"]["outcome"]) == (True, "none")
    assert "Text that has nothing to do with the data" not in read_page(folder).text


def test_hostile_names_and_texts_are_shown_as_text(tmp_path: Path) -> None:
    evaluation = run_folders.task_evaluation()
    for side in (evaluation, evaluation["base"]):
        side["metrics"][HOSTILE] = hostile(run_folders.figure(0.5, 0.4, 0.6, better="higher"))
        names = {"classes": [HOSTILE, "no"], "columns": [HOSTILE, "no", HOSTILE * 2]}
        side["details"] = {HOSTILE: names | {"confusion_matrix": [[1, 2, 3], [4, 5, 6]]}}
    evaluation["differences"][HOSTILE] = {"value": 0.1, "verdict": HOSTILE, "mcnemar": {"p": 0.5}}
    evaluation |= {"answered_by": HOSTILE, "note": HOSTILE}
    predictions = [run_folders.prediction(1, base=0, adapter=1, prompt=HOSTILE, text=HOSTILE)]
    comparison = hostile(run_folders.comparison())
    folder = whole_run(tmp_path, evaluation=evaluation, predictions=predictions, comparison=comparison)
    page = read_page(folder)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img"})
    assert page.text.count(" ".join(HOSTILE.split())) > 8
    body = write_model_card(folder).read_text(encoding="utf-8")
    for block in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE):
        assert len({len(row) for row in table_rows(block)}) == 1, block


def test_null_in_the_place_of_every_value_is_no_exception(tmp_path: Path) -> None:
    evaluation = run_folders.task_evaluation()
    for key in ("metrics", "differences", "details"):
        broken = copy.deepcopy(evaluation)
        broken[key] = dict.fromkeys(evaluation[key])
        broken["base"][key] = None
        (tmp_path / key).mkdir()
        assert "Did it help?" in read_page(whole_run(tmp_path / key, evaluation=broken)).text
    (tmp_path / "comparison").mkdir()
    nulls = dict.fromkeys(run_folders.comparison())
    assert "Did it help?" in read_page(whole_run(tmp_path / "comparison", comparison=nulls)).text
