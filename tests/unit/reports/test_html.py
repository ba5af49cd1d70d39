"""The page of a run: complete, escaped, self-contained, and calm about what is missing."""

import copy
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError

from loralab.errors import RunFolderError
from loralab.reports.html import render_page, write_report
from loralab.reports.plots import write_plots
from loralab.run import RunFolder
from unit.reports import run_folders
from unit.reports.run_folders import HOSTILE, build_run, build_whole_run

VOID = {"meta", "img", "br", "wbr", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; elements must close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        """The text that a reader sees, spaces joined."""
        return " ".join("".join(self.words).split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def read_page(folder: RunFolder) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_a_whole_run_answers_first_and_tells_everything(tmp_path: Path) -> None:
    folder = build_whole_run(tmp_path)
    write_plots(folder)
    page = read_page(folder)
    text = page.text
    assert "Yes: loss on the test split is lower" in text
    assert "lower by 1.32 nats per token (95 % interval 1.25 to 1.39, 99 rows)" in text
    assert text.index("Did it help?") < text.index("Yes: loss") < text.index("Training loss")
    for fact in (
        "2.927", "1.608", "18.68", "4.99",  # base and adapter
        "Completed", "2025-11-20 13:26 UTC", "4.88 million (3.6 %)", "1 h 2 min", "3.2 GiB", "1,873", "9.61",
        "Dropped: empty answer", "110", "5 %", "1,024", "{{ '/keep/this/path' }}", "</s>", "<|end|>", "32007",
        "Answers altered by the template", "train 2001, train 2002", "You answer like <b>a sailor</b>.",
        "no fast bfloat16 here", "rows times tokens",
        "LlamaForCausalLM", "129,630,528", "8.0 GiB", "torch", "2.13.0", "a" * 64, "d" * 64,
        "Base Paris.", "Adapter Paris.", "Reference Paris.", "Prompt Paris.", "cut, no stop token",
        "base model 0 of 1 (none), adapter 1 of 1 (100 %)", "2025-11-20 13:10 UTC", "step 7", "budget halved",
        "PeftModel.from_pretrained(base, adapter)", 'revision="abc123"', "eos_token_id=[2, 32007]",
    ):  # fmt: skip
        assert fact.replace("\u00a0", " ") in text, fact
    assert f"loralab generate {folder.path}" in text
    assert page.of("html") == [{"lang": "en"}]


def test_every_setting_has_its_origin_and_defaults_are_muted(tmp_path: Path) -> None:
    config = run_folders.config_values()
    config["data"]["columns"] = {"instruction": "question"}
    source = write_report(build_whole_run(tmp_path, config=config)).read_text(encoding="utf-8")
    rows = re.findall(r'<tr class="(default|changed)"><th scope="row">(.*?)</th><td class="value">(.*?)</td>'
                      r"<td>(.*?)</td>", source)  # fmt: skip
    found = {key.replace("<wbr>", ""): (kind, value, origin) for kind, key, value, origin in rows}
    assert found["r"] == ("changed", "16", "command line")
    assert found["alpha"] == ("default", "16", "default")
    assert found["early_stopping.patience"] == ("changed", "2", "config.yaml:9")
    assert found["columns"] == ("default", "{&#34;instruction&#34;: &#34;question&#34;}", "default")
    assert {"seed", "max_grad_norm", "trainer_args", "bootstrap_samples"} <= found.keys()


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    folder = build_whole_run(tmp_path)
    write_plots(folder)
    page = read_page(folder)
    images = page.of("img")
    assert len(images) == 3
    assert all(str(image["src"]).startswith("data:image/png;base64,iVBOR") for image in images)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "form", "base"})
    links = {str(attributes["href"]) for attributes in page.of("a")}
    anchors = {f"#{attributes['id']}" for _, attributes in page.tags if "id" in attributes}
    assert links <= anchors
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert "url(" not in str(attributes.get("style"))
    assert any("default-src 'none'" in str(meta.get("content")) for meta in page.of("meta"))
    assert not re.search(r"url\(|@import", folder.report.read_text(encoding="utf-8"))


def test_the_page_is_accessible(tmp_path: Path) -> None:
    folder = build_whole_run(tmp_path)
    write_plots(folder)
    page = read_page(folder)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert all(len(str(image["alt"])) > 30 for image in page.of("img"))
    assert page.of("th")
    assert all(header.get("scope") in ("row", "col") for header in page.of("th"))


def hostile(value: Any) -> Any:
    """Return `value` with hostile text in the place of every text and key that a user or model writes."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, list):
        return [hostile(child) for child in value]
    if isinstance(value, dict):
        return {key: hostile(child) for key, child in value.items()}
    return value


def test_hostile_text_everywhere_is_shown_as_text(tmp_path: Path) -> None:
    record, data = hostile(run_folders.record()), hostile(run_folders.data())
    record["origin"] = {HOSTILE: HOSTILE, "lora.r": HOSTILE}
    record["resolved"][HOSTILE] = {"value": HOSTILE, "reason": HOSTILE}
    record["versions"][HOSTILE] = record["hardware"][HOSTILE] = record["seeds"][HOSTILE] = HOSTILE
    data["splits"][HOSTILE] = copy.deepcopy(data["splits"]["train"])
    data["splits"]["train"]["dropped"][HOSTILE] = 3
    evaluation = run_folders.evaluation() | {"split": HOSTILE, HOSTILE: 1.0}
    evaluation["difference"]["method"] = HOSTILE
    config = run_folders.config_values() | {HOSTILE: {HOSTILE: HOSTILE}}
    folder = build_whole_run(
        tmp_path, record=record, data=data, evaluation=evaluation, config=config,
        samples=hostile(run_folders.samples()), metrics=run_folders.metrics(3),
    )  # fmt: skip
    page = read_page(folder)
    tags = {tag for tag, _ in page.tags}
    assert tags.isdisjoint({"script", "img"})
    assert page.text.count(" ".join(HOSTILE.split())) > 20


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\U0001f600 \u05e9\u05dc\u05d5\u05dd", "\U0001f600 \u05e9\u05dc\u05d5\u05dd"),
        ("half \ud83d pair", "half ? pair"),
        ("bell \x07 nul \x00", "bell \u2407 nul \u2400"),
        ("x" * 100_000, "x" * 100_000),
        ("{{ config }}{% endraw %}{# c #}", "{{ config }}{% endraw %}{# c #}"),
        ("</div></main></body>", "</div></main></body>"),
    ],
)
def test_any_text_that_a_model_writes_is_shown(tmp_path: Path, text: str, shown: str) -> None:
    page = read_page(build_whole_run(tmp_path, samples=run_folders.samples(text), metrics=[]))
    assert f"Adapter {shown}" in page.text


def test_a_count_that_was_not_taken_is_left_out(tmp_path: Path) -> None:
    data = run_folders.data()
    for split in data["splits"].values():
        del split["total_tokens"]
    text = read_page(build_whole_run(tmp_path, data=data)).text
    assert "Supervised tokens" in text
    assert "\u2013" not in text[text.index("Rows and tokens") : text.index("Length of an example")]


def test_an_empty_answer_and_a_missing_reference_are_said(tmp_path: Path) -> None:
    samples = run_folders.samples()
    samples["samples"][0] |= {"adapter_output": "", "reference": None}
    text = read_page(build_whole_run(tmp_path, samples=samples)).text
    assert "(empty answer)" in text
    assert "Reference" not in text


MISSING_SAYS = {
    "evaluation": "Not measured",
    "samples": "No answers were generated",
    "data": "There is no data.json",
    "config": "There is no config.yaml",
    "metrics": "No plots",
}


@pytest.mark.parametrize("part", MISSING_SAYS)
def test_a_missing_file_is_said_in_its_section(tmp_path: Path, part: str) -> None:
    folder = build_whole_run(tmp_path)
    getattr(folder, part).unlink()
    write_plots(folder)
    text = read_page(folder).text
    assert MISSING_SAYS[part] in text
    assert all(words not in text for other, words in MISSING_SAYS.items() if other != part)


@pytest.mark.parametrize("status", ["interrupted", "failed", "running"])
def test_an_early_end_is_said_with_its_reason(tmp_path: Path, status: str) -> None:
    record = {"status": status, "stopped_because": "stopped by SIGINT", "name": "early"}
    text = read_page(build_run(tmp_path, adapter=False, record=record)).text
    assert f"{status.capitalize()}" in text
    assert "stopped by SIGINT" in text
    assert "There is no adapter" in text
    assert f"status is \u201c{status}\u201d" in text


@pytest.mark.parametrize("part", ["record", "data", "evaluation", "samples", "config"])
def test_an_empty_file_is_no_exception(tmp_path: Path, part: str) -> None:
    assert "loralab run report" in read_page(build_whole_run(tmp_path, **{part: {}})).text


def test_null_in_the_place_of_every_value_is_no_exception(tmp_path: Path) -> None:
    parts = {
        name: dict.fromkeys(make())
        for name, make in {
            "record": run_folders.record,
            "data": run_folders.data,
            "evaluation": run_folders.evaluation,
            "samples": run_folders.samples,
            "config": run_folders.config_values,
        }.items()
    }
    folder = build_whole_run(tmp_path, **parts)
    write_plots(folder)
    assert "my-run" in read_page(folder).text


def test_a_broken_file_is_the_users_error_and_names_it(tmp_path: Path) -> None:
    folder = build_whole_run(tmp_path)
    folder.config.write_text("model: [")
    with pytest.raises(RunFolderError, match=r"config\.yaml"):
        write_report(folder)
    assert not folder.report.exists()


def test_a_perplexity_beyond_a_float_is_infinite(tmp_path: Path) -> None:
    evaluation = run_folders.evaluation() | {"perplexity": float("inf")}
    assert "\u221e" in read_page(build_whole_run(tmp_path, evaluation=evaluation)).text


def test_a_missing_template_variable_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        render_page("report.html.jinja", {})


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    folder = build_whole_run(tmp_path)
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
