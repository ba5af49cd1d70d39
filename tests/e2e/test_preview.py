"""`loralab preview` as a user runs it: what it shows, and how data go wrong, each way caught by row and fix."""

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loralab.cli.preview_text import print_preview
from loralab.data.prompts.contract import CONTRACT_FILE, build_contract
from loralab.data.prompts.prompter import Prompter
from support import tiny
from support.command import Answer, run_here, write_config
from unit.data.prompters import CHATML, build_tokenizer

END, STOP = tiny.END, "<|stop|>"


def chat(question: str, answer: str, system: str | None = None) -> dict[str, Any]:
    """Return a row of messages."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*first, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


GOOD = [chat("a red bird", "one two"), chat("a blue cat", "three"), chat("the house", "of the river")]


class World:
    """A tokenizer without a model, rows and a configuration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def preview(
        self,
        rows: Sequence[dict[str, Any]],
        *options: str,
        template: str | None = CHATML,
        bos: bool = False,
        data: dict[str, Any] | None = None,
    ) -> Answer:
        """Run `loralab preview` on rows."""
        build_tokenizer(template, bos=bos).save_pretrained(self.folder / "base")
        path = self.folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings = {"train": str(path), "cache_dir": str(self.folder / "cache"), **(data or {})}
        config = write_config(
            self.folder / "run.yaml", {"model": {"name": str(self.folder / "base")}, "data": settings}
        )
        return run_here("preview", config, *options)

    def template(self, text: str) -> str:
        """Write a Jinja file and return its path."""
        path = self.folder / "chat.jinja"
        path.write_text(text, encoding="utf-8")
        return str(path)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Return a folder to work in."""
    return World(tmp_path)


def failed(answer: Answer, row: int | None, *words: str) -> None:
    """Check that a proof failed, and that its message names the row and says the words."""
    assert answer.code == 3, answer.err
    assert "Traceback" not in answer.err
    places = re.findall(r"^where: (.*)$", answer.err, re.MULTILINE)
    assert places
    assert len(re.findall(r"^fix:   \S", answer.err, re.MULTILINE)) == len(places)
    if row is not None:
        assert any(re.search(rf"rows\.jsonl row {row}\b", place) for place in places), answer.err
    for word in words:
        assert word in answer.err, answer.err


def warned(answer: Answer, kind: str, row: int) -> dict[str, Any]:
    """Check that nothing failed, and return the warning of a kind, which lists the row and has a fix."""
    assert answer.code == 0, answer.err
    (found,) = [group for group in json.loads(answer.out)["findings"] if group["kind"] == kind]
    assert row in [entry["row"] for entry in found["rows"]]
    assert found["severity"] == "warning"
    assert found["fix"]
    return dict(found)


# --- what it shows


def test_rows_report_and_proofs_without_colours(world: World) -> None:
    answer = world.preview(GOOD, "--rows", "2")
    assert answer.code == 0, answer.err
    assert "<|start|>assistant↵\n⟦one·two<|stop|>⟧" in answer.out
    assert "river" not in answer.out
    assert "\x1b[" not in answer.out
    for words in (
        "rows.jsonl row 2: train",
        "rows kept",
        "an epoch: 3 rows",
        "no proof failed",
        "all rows proven (3 spans",
    ):
        assert words in answer.out, words


def test_json_is_one_document_with_everything(world: World) -> None:
    answer = world.preview([*GOOD, chat("the house", "of the river")], "--rows", "1", "--json", data={"validation": 1})
    document = json.loads(answer.out)
    assert set(document) == {"name", "rows", "report", "proofs", "findings"}
    (row,) = document["rows"]
    (turn,) = row["turns"]
    for token in turn["tokens"]:
        assert turn["text"][token["start"] : token["end"]] == token["text"]
    trained = "".join(token["text"] for token in turn["tokens"] if token["supervised"])
    assert trained.endswith(STOP)
    assert [token["stop"] for token in turn["tokens"]].count(True) == 1
    assert sum(len(token["ids"]) for token in turn["tokens"] if token["supervised"]) == row["supervised"]
    assert document["proofs"]["rows"] == document["proofs"]["stored_rows"] == 4
    assert set(document["report"]["splits"]) == {"train", "validation"}
    assert document["report"]["epoch"]["steps"] == 1


def test_named_rows_are_shown_kept_or_dropped(world: World) -> None:
    rows = [*GOOD, chat("a " * 80, "x")]
    answer = world.preview(
        rows,
        "--row",
        "4",
        "--row",
        "rows.jsonl:2",
        "--json",
        data={"max_length": 60, "max_dropped_fraction": 0.5},
    )
    dropped, kept = json.loads(answer.out)["rows"]
    assert (dropped["row"], dropped["status"], dropped["reason"]) == (4, "dropped", "prompt_too_long")
    assert "a a a" in dropped["fields"]["messages"]
    assert (kept["row"], kept["status"], kept["split"]) == (2, "kept", "train")


def test_too_many_dropped_rows_are_shown_and_then_refused(world: World) -> None:
    page = world.folder / "page.html"
    answer = world.preview([*GOOD, chat("a " * 80, "x")], "--row", "4", "--html", str(page), data={"max_length": 60})
    assert answer.code == 2
    assert "1 of 4 train rows dropped (at most 5% may be" in answer.err
    for words in ("rows.jsonl row 4: dropped, prompt_too_long", "rows kept", "no proof failed"):
        assert words in answer.out, words
    assert "prompt_too_long" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--row", "9"], "no row 9"),
        (["--row", "x"], "not a row: 'x'"),
        (["--row", "other.jsonl:1"], "no such source: 'other.jsonl'"),
        (["--split", "tets"], "no such split: 'tets'"),
    ],
)
def test_rows_that_are_not_there(world: World, options: list[str], words: str) -> None:
    answer = world.preview(GOOD, *options)
    assert answer.code == 2
    assert words in answer.err


def test_page_holds_rows_and_report(world: World) -> None:
    page = world.folder / "page.html"
    answer = world.preview(GOOD, "--html", str(page))
    assert answer.code == 0, answer.err
    text = page.read_text(encoding="utf-8")
    assert '<span class="token answer' in text
    assert "Yes: no proof failed" in text
    assert "http://" not in text
    assert "https://" not in text


def test_a_page_that_cannot_be_written(world: World) -> None:
    (world.folder / "file").write_text("", encoding="utf-8")
    answer = world.preview(GOOD, "--html", str(world.folder / "file" / "page.html"))
    assert answer.code == 2
    assert "cannot write the page" in answer.err


@pytest.mark.parametrize(("encoding", "begin", "end"), [("utf-8", "\u27e6", "\u27e7"), ("ascii", "[[", "]]")])
def test_brackets_stand_where_there_are_no_colours(world: World, encoding: str, begin: str, end: str) -> None:
    result = json.loads(world.preview(GOOD, "--json").out)
    shown = {}
    for colours in ("truecolor", None):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
        print_preview(Console(file=stream, force_terminal=colours is not None, color_system=colours), result)
        stream.seek(0)
        shown[colours] = stream.read()
    assert f"{begin}three<|stop|>{end}" in shown[None]
    assert "\x1b[" not in shown[None]
    assert begin not in shown["truecolor"].replace("\x1b[", "")
    assert "\x1b[1;7;35m<|stop|>" in shown["truecolor"]
    assert "?" not in shown[None]  # nothing that the stream cannot write


def test_fewer_proofs_are_said(world: World) -> None:
    answer = world.preview(GOOD, "--prove", "2")
    assert "2 of 3 rows proven" in answer.out


def test_later_turns_show_what_is_new(world: World) -> None:
    row = chat("a", "one")
    row["messages"] += chat("b", "two")["messages"]
    answer = world.preview([row], "--json")
    first, second = json.loads(answer.out)["rows"][0]["turns"]
    assert (first["seen_tokens"], first["text"]) == (0, f"<|start|>user\na{STOP}\n<|start|>assistant\none{STOP}")
    assert second["seen_tokens"] == first["prompt_tokens"] + first["answer_tokens"]
    assert second["text"] == f"\n<|start|>user\nb{STOP}\n<|start|>assistant\ntwo{STOP}"


# --- the faults, as they happen to users


def tokenized(text: str, trained: str, *, pad: int = 0, mask_pad: bool = False, **more: Any) -> dict[str, Any]:
    """Return a row as somebody else's script makes it: labels where `trained` has no blank.

    Args:
        text: rendered.
        trained: marks under the characters that carry loss.
        pad: end tokens behind it, as padding.
        mask_pad: let the attention mask leave out every end token, as a mask by id does.
        more: further columns.
    """
    tokenizer = build_tokenizer()
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoding["input_ids"] + [tokenizer.eos_token_id] * pad
    spans = encoding["offset_mapping"] + [(0, 0)] * pad
    labels = [token if trained[a:b].strip() else -100 for token, (a, b) in zip(ids, spans, strict=True)]
    mask = [int(not (mask_pad and token == tokenizer.eos_token_id)) for token in ids]
    if pad and not mask_pad:
        mask[-pad:] = [0] * pad
    labels = [label if keep else -100 for label, keep in zip(labels, mask, strict=True)]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **more}


def marked(text: str, *parts: str) -> str:
    """Return marks under the last occurrence of each part."""
    marks = [" "] * len(text)
    for part in parts:
        at = text.rindex(part)
        marks[at : at + len(part)] = "x" * len(part)
    return "".join(marks)


RENDERED = f"<|start|>user\na red bird{STOP}\n<|start|>assistant\none two{STOP}"
PLAIN = f"Q: a red bird\nA: one two{END}"


def right(text: str = RENDERED, stop: str = STOP) -> dict[str, Any]:
    """Return a row that was tokenized elsewhere and has nothing wrong with it."""
    return tokenized(text, marked(text, f"one two{stop}"))


def test_tokens_made_elsewhere_pass_where_they_are_right(world: World) -> None:
    padded = tokenized(PLAIN, marked(PLAIN, f"one two{END}"), pad=3)
    answer = world.preview([right(PLAIN, END), padded], template=None)
    assert answer.code == 0, answer.err
    assert "no proof failed, 0 warnings" in answer.out


def test_stop_token_masked(world: World) -> None:
    answer = world.preview([right(), tokenized(RENDERED, marked(RENDERED, "one two"))])
    failed(answer, 2, "stop token behind an answer carries no loss", "its label is -100")


def test_generation_prompt_missing(world: World) -> None:
    template = CHATML[: CHATML.index("{% if add_generation_prompt %}")]
    answer = world.preview(GOOD, data={"template": world.template(template)})
    failed(answer, 1, "generation prompt", "add_generation_prompt")


def test_padding_that_masks_the_end(world: World) -> None:
    rows = [right(PLAIN, END), tokenized(PLAIN, marked(PLAIN, f"one two{END}"), pad=3, mask_pad=True)]
    answer = world.preview(rows, template=None)
    failed(answer, 2, "the attention mask leaves it out", "choose another pad token")


def test_doubled_bos(world: World) -> None:
    template = world.template("{{ bos_token }}" * 2 + CHATML)
    answer = world.preview(GOOD, bos=True, data={"template": template})
    failed(answer, 1, "two bos tokens", "'<|bos|>' twice")


def test_doubled_bos_in_tokens_made_elsewhere(world: World) -> None:
    ids = build_tokenizer(bos=True)(f"<|bos|><|bos|>{PLAIN}", add_special_tokens=False)["input_ids"]
    labels = [-100] * (len(ids) - 3) + ids[-3:]
    row = {"input_ids": ids, "labels": labels}
    answer = world.preview([row], template=None, bos=True)
    failed(answer, 1, "two bos tokens")


def test_answer_cut_by_max_length(world: World) -> None:
    rows = [chat("a", "b"), chat("a", "one two three red blue green " * 4)]
    found = warned(world.preview(rows, "--json", data={"max_length": 40}), "cut", 2)
    assert "raise data.max_length" in found["fix"]


def test_first_characters_of_the_answer_merged_into_the_prompt(world: World) -> None:
    # As scripts do that tokenize prompt and answer as one text and mask as many tokens as the prompt has.
    tokenizer = build_tokenizer()
    question, answer = "r", "iver sings"
    ids = tokenizer(question + answer + END, add_special_tokens=False)["input_ids"]
    count = len(tokenizer(question, add_special_tokens=False)["input_ids"])
    row = {"input_ids": ids, "labels": [-100] * count + ids[count:], "prompt": question, "completion": answer}
    ending = "{% if message['role'] == 'assistant' %}<|end|>{% endif %}"
    template = f"{{% for message in messages %}}{{{{ message['content'] }}}}{ending}{{% endfor %}}"
    failed(world.preview([row], template=template), 1, "first characters stand in the prompt", "'i'")


def test_system_message_dropped(world: World) -> None:
    template = CHATML.replace("in messages %}", "in messages if message['role'] != 'system' %}")
    rows = [*GOOD, chat("a red bird", "one", system="be blue")]
    answer = world.preview(rows, data={"template": world.template(template)})
    failed(answer, 4, "system message is not in the prompt", "'be blue'")


def test_wrong_role_labelled(world: World) -> None:
    text = RENDERED + "\n" + RENDERED
    row = tokenized(text, marked(text, f"a red bird{STOP}"))
    failed(world.preview([right(), row]), 2, "turn of another role", "<|start|>user")


def test_empty_answer(world: World) -> None:
    found = warned(world.preview([*GOOD, chat("a", " ")], "--json"), "empty_answer", 4)
    assert "leave such rows out" in found["fix"]


def test_golden_ids_changed(world: World) -> None:
    world.preview(GOOD)
    run = world.folder / "run"
    adapter = run / "adapter"
    prompter = Prompter(build_tokenizer(CHATML))
    prompter.tokenizer.save_pretrained(adapter)
    contract = build_contract(prompter)
    config = (world.folder / "run.yaml").read_text(encoding="utf-8")
    (run / "config.yaml").write_text(config, encoding="utf-8")
    (adapter / CONTRACT_FILE).write_text(json.dumps(contract), encoding="utf-8")
    assert run_here("preview", run).code == 0
    contract["golden"][1]["ids"][0] += 1
    (adapter / CONTRACT_FILE).write_text(json.dumps(contract), encoding="utf-8")
    answer = run_here("preview", run)
    failed(answer, None, "the golden prompt 'Sort these: 3, 1, 2.' gives other token ids", CONTRACT_FILE)
    assert "trained with" in answer.err
