"""The page of a comparison: complete, escaped, self-contained, and what differs is marked and nothing else."""

import json
import math
from typing import Any

import pytest

from loralab.reports.comparison_page import comparison_context, mark_differences, own_parts, render_comparison
from unit.reports.run_folders import HOSTILE
from unit.reports.test_html import Page

FIGURES = (
    "kl_base_adapter", "kl_adapter_base", "jensen_shannon", "l2_logits", "l2_logits_centred", "l2_probabilities",
    "top1_agreement",
)  # fmt: skip


def interval(mean: float, **changed: Any) -> dict[str, Any]:
    return {"mean": mean, "low": mean / 2, "high": mean * 2} | changed


def record(row: int, **changed: Any) -> dict[str, Any]:
    figures = dict.fromkeys(FIGURES, 0.25)
    return {
        "source": 0, "row": row, "prompt": f"Question {row}", "reference": "A green frog.", "kl_divergence": row / 10,
        "l2_distance": 12.5, "top1_agreement": 1.0, "last_prompt_token": figures,
        "answer": {"tokens": 3, "base_loss": 2.0, "adapter_loss": 1.0, **figures},
        "base_output": "A red fox runs.", "adapter_output": "A red frog sleeps.", "base_stopped": True,
        "adapter_stopped": False, "first_difference": 7,
    } | changed  # fmt: skip


def result(**changed: Any) -> dict[str, Any]:
    totals = {
        "kl_divergence": 0.2, "l2_distance": 12.5, "top1_agreement": 1.0, "rows": 2, "level": 0.95,
        "method": "bootstrap over rows",
        "last_prompt_token": {"count": 2, **{name: interval(0.2) for name in FIGURES}},
        "answer": {"count": 4321, **{name: interval(0.4) for name in FIGURES}},
    }  # fmt: skip
    probe = {
        "name": "old texts", "rows": 30, "tokens": 900, "base_perplexity": 20.0, "adapter_perplexity": 22.4,
        "difference": {"eval_loss": 0.11, "low": 0.05, "high": 0.2, "level": 0.95, "verdict": "worse"},
        "reading": "perplexity on unrelated text rose by 12 % (n = 30)", **{name: interval(0.1) for name in FIGURES},
    }  # fmt: skip
    return {
        "split": "validation", "examples": 2, "of_examples": 1234, "max_length": 256, "max_new_tokens": 48,
        "measured_at": "the last token of the prompt", "totals": totals,
        "generation": {"prompts": 2, "same_answer": 0.5, "base_stopped": 1.0, "adapter_stopped": 0.0},
        "prompts": [record(1), record(2)], "probe": probe,
    } | changed  # fmt: skip


def read(**changed: Any) -> Page:
    return Page(render_comparison(result(**changed)))


def test_page_says_everything() -> None:
    text = read().text
    for words in (
        "Base and adapter on validation", "2 of 1,234 rows", "Tokens of the answer (n = 4,321)", "0.2 0.1 to 0.4",
        "Same answer50 %", "at most 48 tokens", "Perplexity on unrelated text rose by 12 % (n = 30).", "old texts",
        "Row 2 KL 0.2, L2 12.5, same top token: yes", "A green frog.", "A red fox runs.", "Adapter cut at the length",
    ):  # fmt: skip
        assert words in text, words


def test_forgetting_is_marked_where_it_was_seen() -> None:
    assert "verdict-worse" in render_comparison(result()).split("</style>")[1]
    probe = result()["probe"]
    probe["difference"]["verdict"] = "no difference seen at n = 2"  # though its interval leaves out 0
    assert "verdict-worse" not in render_comparison(result(probe=probe)).split("</style>")[1]


def test_prompts_come_in_the_order_of_their_divergence() -> None:
    rows = [record(1), record(3), record(2), record(4, kl_divergence=None)]
    assert [prompt["row"] for prompt in comparison_context(result(prompts=rows))["prompts"]] == [4, 3, 2, 1]


def test_differing_words_are_marked_on_both_sides() -> None:
    assert mark_differences("A red fox runs.", "A red frog sleeps.") == (
        [("A red ", False), ("fox runs", True), (".", False)],
        [("A red ", False), ("frog sleeps", True), (".", False)],
    )
    assert mark_differences("one", "one two") == ([("one", True)], [("one two", True)])
    assert mark_differences("same", "same") == ([("same", False)], [("same", False)])
    assert mark_differences("", "new") == ([], [("new", True)])
    assert mark_differences("x " * 4000, "x") is None


@pytest.mark.parametrize("text", ["", " a  b\n\nc, d! ", "日本語 の文。", "한국어 text", "é_1\u0301 \u00a0?", HOSTILE])
def test_pieces_put_together_are_the_text(text: str) -> None:
    sides = mark_differences(text, "a b c")
    assert sides is not None
    assert "".join(piece for piece, _ in sides[0]) == text


def test_characters_of_scripts_without_blanks_are_words() -> None:
    sides = mark_differences("今日は晴れ", "今日は雨")
    assert sides == ([("今日は", False), ("晴れ", True)], [("今日は", False), ("雨", True)])


def test_marks_stand_on_the_page_and_are_underlined() -> None:
    page = read()
    assert len(page.of("mark")) == 2 + 2 * 2  # the legend's, and one on each side of two prompts
    assert "text-decoration: underline" in render_comparison(result())


def test_equal_and_empty_answers_are_said() -> None:
    same = record(1, adapter_output="A red fox runs.", first_difference=None)
    page = read(prompts=[same, record(2, base_output="")])
    assert "Both answer the same." in page.text
    assert "Baseempty" in page.text


def test_page_is_escaped_and_loads_nothing() -> None:
    hostile = record(1, prompt=HOSTILE, reference=HOSTILE, base_output=HOSTILE, adapter_output=HOSTILE[::-1])
    page = read(split=HOSTILE, prompts=[hostile], probe=result()["probe"] | {"name": HOSTILE, "reading": HOSTILE})
    assert page.text.count('<script>alert("x")</script>') >= 4
    for tag in ("script", "link", "img", "iframe"):
        assert not page.of(tag)
    assert not [1 for _, attributes in page.tags for name in attributes if name == "src" or name.startswith("on")]
    assert all(str(attributes["href"]).startswith("#") for attributes in page.of("a"))


def test_every_link_leads_somewhere_and_scrolled_parts_take_the_keyboard() -> None:
    page = read()
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert {str(attributes["href"])[1:] for attributes in page.of("a")} <= ids
    scrolled = [a for tag, a in page.tags if {"scroll", "text"} & set((a.get("class") or "").split()) and tag == "div"]
    assert scrolled
    assert all(attributes.get("tabindex") == "0" for attributes in scrolled)


def test_text_without_prompts() -> None:
    texts = record(
        5, prompt="", reference="Some text.", last_prompt_token=None, base_output=None, adapter_output=None,
        base_stopped=None, adapter_stopped=None, first_difference=None, top1_agreement=0.75,
    )  # fmt: skip
    totals = result()["totals"] | {"last_prompt_token": None}
    page = read(prompts=[texts], totals=totals, generation=None, probe=None)
    assert "Some text." in page.text
    assert "75 %" in page.text
    assert "Tokens of the text" in page.text
    for absent in ("What they answer", "Was anything forgotten?", "Last prompt token", "Tokens of the answer"):
        assert absent not in page.text


def test_windows_of_a_row_have_numbers_and_no_answers() -> None:
    nothing = dict.fromkeys(
        ("last_prompt_token", "base_output", "adapter_output", "base_stopped", "adapter_stopped", "first_difference")
    )
    texts = [record(1, prompt="", reference=f"Text {window}.", window=window, **nothing) for window in (1, 3)]
    page = read(prompts=texts, totals=result()["totals"] | {"last_prompt_token": None}, generation=None, probe=None)
    assert "Row 1, window 3" in page.text
    assert [each["row"] for each in comparison_context(result(prompts=texts))["prompts"]] == ["1.1", "1.3"]
    assert not any("answers" in (a.get("class") or "").split() for _, a in page.tags)


def test_a_probe_of_the_runs_own_data_is_not_called_unrelated() -> None:
    note = "the file train.txt is training data of the run, not unrelated text"
    own = result()["probe"] | {"note": note, "reading": f"{note}: its perplexity rose by 12 %"}
    page = read(probe=own)
    assert f"T{note[1:]}: its perplexity rose" in page.text
    assert "This is no probe of forgetting" in page.text
    assert "Was anything forgotten?" not in page.text
    assert "Text that has nothing to do with the data" not in page.text
    assert "verdict-worse" not in render_comparison(result(probe=own)).split("</style>")[1]


def test_what_json_could_not_hold_is_infinite() -> None:
    totals = result()["totals"]
    totals["answer"]["kl_adapter_base"] = {"mean": math.inf, "low": None, "high": None}
    rows = [record(1, kl_divergence=math.inf)]
    direct = render_comparison(result(totals=totals, prompts=rows))
    assert "Row 1 KL infinite" in Page(direct).text
    assert "nan" not in Page(direct).text
    dumped = json.loads(json.dumps(result(totals=totals, prompts=rows)).replace("Infinity", "null"))
    assert render_comparison(dumped) == direct


def test_more_prompts_than_a_page_holds() -> None:
    page = read(prompts=[record(row) for row in range(310)])
    assert len(page.of("article")) == 300
    assert "10 more are in comparison.json" in page.text


def test_what_prompts_have_in_common_is_left_out_of_the_overview() -> None:
    texts = [f"Do the {'long ' if n % 2 else ''}task. Input: {word} Response:" for n, word in enumerate("abcdefgh")]
    assert own_parts(texts) == list("abcdefgh")
    assert own_parts(["only one"]) == ["only one"]
    assert own_parts(["same same", "same same"]) == ["same same", "same same"]
    assert own_parts([]) == []
    assert own_parts(["x" * 200])[0].endswith("...")
