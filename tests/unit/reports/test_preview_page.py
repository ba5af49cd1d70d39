"""The page of a preview: complete, escaped, self-contained, and every chart says in words what it shows."""

from pathlib import Path
from typing import Any

import pytest

from loralab.errors import StorageError
from loralab.reports.preview_page import preview_context, write_preview
from loralab.reports.preview_wording import describe_epoch, describe_proofs, list_places
from unit.reports.run_folders import HOSTILE
from unit.reports.test_html import Page


def token(text: str, *, supervised: bool = False, stop: bool = False, start: int = 0) -> dict[str, Any]:
    return {
        "ids": [1, 2], "text": text, "start": start, "end": start + len(text),
        "supervised": supervised, "special": stop, "stop": stop,
    }  # fmt: skip


def split(**changed: Any) -> dict[str, Any]:
    facts = {
        "rows_read": 4, "rows_kept": 3, "total_tokens": 1000, "supervised_tokens": 400, "answers": 3,
        "stop_token_share": 1.0, "length_percentiles": {"p0": 3, "p100": 9}, "dropped": {"too_long": 1},
        "dropped_rows": [{"source": "a.jsonl", "row": 4, "reason": "too_long"}], "notes": {"truncated": 1},
        "noted_rows": {"truncated": [{"source": "a.jsonl", "row": 2}]},
        "length_histogram": {"edges": [3.0, 6.0, 10.0], "counts": [1, 2]},
        "coverage_histogram": {"edges": [0.0, 0.5, 1.0], "counts": [3, 0]},
        "duplicates": {
            "same_row": {"count": 1, "rows": [{"source": "a.jsonl", "row": 3}]},
            "same_prompt_other_answer": {"count": 0, "rows": []},
        },
    }  # fmt: skip
    return facts | changed


def result(**changed: Any) -> dict[str, Any]:
    turn = {"prompt_tokens": 2, "answer_tokens": 2, "seen_tokens": 0, "text": "", "tokens": [
        token("a b\n"), token(HOSTILE, supervised=True), token("<|end|>", supervised=True, stop=True),
    ]}  # fmt: skip
    return {
        "name": "rows",
        "rows": [
            {"split": "train", "source": "a.jsonl", "row": 1, "status": "kept", "notes": ["truncated"], "length": 4,
             "supervised": 2, "turns": [turn, turn]},
            {"split": None, "source": "a.jsonl", "row": 4, "status": "dropped", "reason": "too_long",
             "fields": {"text": HOSTILE}},
        ],
        "report": {
            "format": {"value": "messages", "reason": "because"},
            "template": {"name": "chatml", "text": HOSTILE, "reason": "set"},
            "stop_tokens": {"texts": ["<|end|>"], "ids": [0], "reason": "written"},
            "system_prompt": None,
            "splits": {"train": split(), "validation": split()},
            "overlaps": [{
                "splits": ["train", "validation"], "rows": 3, "same_row": {"count": 0, "rows": []},
                "same_prompt": {"count": 1, "rows": [{"source": "b.jsonl", "row": 9}]},
            }],
            "epoch": {
                "rows": 3, "rows_per_step": 2, "steps": 2, "total_steps": 6, "supervised_tokens": 400,
                "tokens_without_sharing": 1000, "tokens_with_sharing": 800, "laid_out_steps": 1,
                "token_budget": 16384, "sampling": "random",
            },
        },
        "proofs": {"rows": 3, "stored_rows": 3, "spans": 3, "rows_per_second": 10, "errors": 1, "warnings": 0},
        "findings": [{
            "kind": "no_stop", "severity": "error", "title": "an answer ends without a stop", "fix": "mend it",
            "count": 30,
            "rows": [{"source": "a.jsonl", "row": row, "what": HOSTILE} for row in range(1, 21)],
        }],
    } | changed  # fmt: skip


def read(tmp_path: Path, **changed: Any) -> Page:
    return Page(write_preview(tmp_path / "page.html", result(**changed)).read_text(encoding="utf-8"))


def test_page_says_everything(tmp_path: Path) -> None:
    text = read(tmp_path).text
    for words in (
        "No: a proof failed", "1 failed proof, 0 warnings; all rows proven",
        "Error: an answer ends without a stop (30)",
        "Fix: mend it.", "a.jsonl row 1, 2, 3, 4, 5, 6, 7, 8, ...", "first 20 listed",
        "a.jsonl row 1: train, 4 tokens, 2 carry loss; truncated", "answer 2: prompt 2 tokens, answer 2",
        "a.jsonl row 4: dropped, too_long", "'<|end|>'", "train: dropped, too_long (1): a.jsonl row 4",
        "train: truncated (1): a.jsonl row 2", "train: copies of an earlier row (1): a.jsonl row 3",
        "validation: rows whose prompt train has too (1 of 3): b.jsonl row 9", "1,000 without sharing, 800 with",
        "from 1 of 2 steps",
    ):  # fmt: skip
        assert words in text, words


def test_tokens_can_be_pointed_at(tmp_path: Path) -> None:
    tokens = [
        attributes for attributes in read(tmp_path).of("span") if (attributes.get("class") or "").startswith("token")
    ]
    titles = [attributes["title"] for attributes in tokens if "title" in attributes]
    assert titles[0] == "1 + 2: 'a b\\n', no loss"
    assert titles[2] == "1 + 2: '<|end|>', the stop token, carries loss"
    assert "token answer special stop" in [attributes["class"] for attributes in tokens]


def test_page_is_escaped_and_loads_nothing(tmp_path: Path) -> None:
    page = read(tmp_path)
    assert not page.of("script")
    assert not page.of("link")
    assert not [1 for _, attributes in page.tags for name in attributes if name in ("src", "onload", "onerror")]
    assert {attributes["href"] for attributes in page.of("a")} == {"#proofs", "#rows", "#data"}


def test_charts_say_in_words_what_they_show() -> None:
    lengths, coverage = preview_context(result())["charts"][:2]
    assert lengths["text"] == "3 to 5: 1 rows; 6 to 9: 2 rows"
    assert [bar["height"] for bar in lengths["bars"]] == [55, 110]
    assert coverage["text"] == "0% to 50%: 3 rows"
    assert all(bar["y"] + bar["height"] == pytest.approx(lengths["height"]) for bar in lengths["bars"])


def test_good_data_and_no_rows(tmp_path: Path) -> None:
    proofs = result()["proofs"] | {"errors": 0, "rows": 2}
    text = read(tmp_path, rows=[], findings=[], proofs=proofs).text
    assert "Yes: no proof failed" in text
    assert "2 of 3 rows proven" in text
    assert "No rows were asked for." in text


def test_page_of_an_empty_split(tmp_path: Path) -> None:
    empty = split(
        length_histogram={"edges": [0.0, 1.0], "counts": [0]}, coverage_histogram={"edges": [0.0, 1.0], "counts": [0]},
        length_percentiles={},
    )  # fmt: skip
    report = result()["report"] | {"splits": {"train": empty}, "overlaps": []}
    assert "rows kept" in read(tmp_path, report=report).text


def test_unwritable_page(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StorageError, match="cannot write the page"):
        write_preview(tmp_path / "file" / "page.html", result())


def test_words() -> None:
    places = [{"source": "a", "row": 1}, {"source": "a", "row": 1}, {"source": "b", "row": 2}]
    assert list_places(places, 2) == "a row 1, b row 2"
    assert list_places(places, 5) == "a row 1, b row 2, ..."
    assert describe_proofs(
        {"errors": 0, "warnings": 1, "rows": 1, "stored_rows": 1, "spans": 2, "rows_per_second": 3}
    ) == ("no proof failed, 1 warning; all rows proven (2 spans, 3 rows/s)")
    assert "all steps laid out" in describe_epoch(result()["report"]["epoch"] | {"laid_out_steps": 2})[1]
