"""The data of a run: cache, splits, report, and the limit of dropped rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from loralab.config.schema import DataConfig
from loralab.data.dataset import PreparedData, prepare_data
from loralab.data.prompts.templates import TEMPLATES
from loralab.data.tokens import identity
from loralab.data.tokens.identity import tokenizer_sha256
from loralab.errors import DataError, ModelError
from loralab.progress import Reporter
from support import reporters, tiny
from unit.data.prompters import CHATML, build_tokenizer


class Notes(reporters.Notes):
    @property
    def hits(self) -> int:
        return sum("cache hit" in line for line in self.said)


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tiny.write_rows(tmp_path / "rows.json", tiny.alpaca_rows(20))


def prepare(path: Path, notes: Notes, *, own: str | None = None, **chosen: Any) -> PreparedData:
    values: dict[str, Any] = {"train": str(path), "cache_dir": str(path.parent / "cache"), **chosen}
    extra = {name: values.pop(name) for name in ("template_text", "split") if name in values}
    return prepare_data(
        DataConfig(**values),
        build_tokenizer(own),
        reporter=notes,
        template=extra.get("template_text"),
        split=extra.get("split"),
    )


def tokens(prepared: PreparedData) -> dict[str, Any]:
    return {
        name: [[(b.prompt_ids.tolist(), b.answer_ids.tolist()) for b in example.branches] for example in part]
        for name, part in prepared.splits.items()
    }


def test_second_call_reads_the_cache(path: Path, notes: Notes) -> None:
    first = prepare(path, notes, validation=4)
    assert notes.hits == 0
    second = prepare(path, notes, validation=4)
    assert notes.hits == 1
    assert tokens(first) == tokens(second)
    assert first.report == second.report
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        {"template": "none"},
        {"max_length": 100},
        {"stop_tokens": ["<|stop|>"]},
        {"stop_tokens": [tiny.END, "<|stop|>"]},
        {"train_on": "all"},
        {"truncation": "drop"},
        {"on_bad_row": "drop"},
        {"columns": {"input": "instruction"}},
        {"own": CHATML},
        {"template_text": TEMPLATES["alpaca"] + " "},
    ],
)
def test_whatever_decides_on_tokens_misses_the_cache(path: Path, notes: Notes, changed: dict[str, Any]) -> None:
    before = prepare(path, notes)
    after = prepare(path, notes, **changed)
    assert notes.hits == 0
    assert before.fingerprint != after.fingerprint


def test_changed_row_misses_the_cache(path: Path, notes: Notes) -> None:
    before = prepare(path, notes)
    rows = tiny.alpaca_rows(20)
    rows[7]["output"] += "!"
    tiny.write_rows(path, rows)
    after = prepare(path, notes)
    assert notes.hits == 0
    assert before.fingerprint != after.fingerprint
    both = zip(tokens(before)["train"], tokens(after)["train"], strict=True)
    assert [index for index, (old, new) in enumerate(both) if old != new] == [7]


@pytest.mark.parametrize("changed", [{"num_workers": 0}, {"max_dropped_fraction": 0.5}, {"validation": 3}])
def test_what_leaves_the_tokens_alone_hits_the_cache(path: Path, notes: Notes, changed: dict[str, Any]) -> None:
    prepare(path, notes)
    prepare(path, notes, **changed)
    assert notes.hits == 1


def test_failed_preparation_leaves_no_cache(path: Path, notes: Notes) -> None:
    tiny.write_rows(path, [*tiny.alpaca_rows(3), {"instruction": "a", "output": 5}])
    with pytest.raises(DataError, match="field 'output' is int"):
        prepare(path, notes)
    assert list((path.parent / "cache").iterdir()) == []


def test_report_says_what_was_read_kept_and_why(path: Path, notes: Notes) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "a", "output": "b c"},
        {"instruction": "a", "output": ""},
        {"instruction": "a", "output": f"x{tiny.END}y"},
        {"instruction": "a", "output": None},
    ]
    tiny.write_rows(path, rows)
    prepared = prepare(path, notes, on_bad_row="drop", max_dropped_fraction=0.5)
    report = prepared.report
    kept = prepared.splits["train"]
    assert report["format"] == {"value": "alpaca", "reason": "the columns instruction, output are present"}
    assert report["template"]["name"] == "alpaca"
    assert report["template"]["text"] == TEMPLATES["alpaca"] == prepared.prompter.tokenizer.chat_template
    assert report["stop_tokens"]["ids"] == [prepared.prompter.tokenizer.eos_token_id]
    assert report["stop_tokens"]["texts"] == [tiny.END]
    assert [source["name"] for source in report["sources"]] == [str(path)]
    assert report["split"] == {"method": "random", "seed": 42}
    lengths = sorted(len(b.prompt_ids) + len(b.answer_ids) for example in kept for b in example.branches)
    part = report["splits"]["train"]
    assert part["rows_read"] == 4
    assert part["rows_kept"] == len(kept) == 2
    assert part["dropped"] == {"stop_token_inside_answer": 1, "bad_row": 1}
    assert part["dropped_rows"] == [
        {"source": str(path), "row": 3, "reason": "stop_token_inside_answer"},
        {
            "source": str(path),
            "row": 4,
            "reason": "bad_row",
            "why": "field 'output' is NoneType, not a string: None",
        },
    ]
    assert (part["truncated"], part["empty_answers"]) == (0, 1)
    assert part["supervised_tokens"] == sum(example.supervised_tokens for example in kept)
    assert part["total_tokens"] == sum(lengths)
    assert part["length_percentiles"]["p0"] == lengths[0]
    assert part["length_percentiles"]["p100"] == lengths[1]
    json.dumps(report)
    assert "dropped 1 stop_token_inside_answer, 1 bad_row" in notes.said[-1]


def test_too_many_dropped_rows_list_reasons_and_rows(path: Path, notes: Notes) -> None:
    rows = tiny.alpaca_rows(10)
    for i in (2, 6):
        rows[i]["output"] = "x" * 200
    tiny.write_rows(path, rows)
    chosen: dict[str, Any] = {"truncation": "drop", "max_length": 150}
    with pytest.raises(DataError) as caught:
        prepare(path, notes, **chosen, max_dropped_fraction=0.19)
    (problem,) = caught.value.problems
    assert problem.what == "2 of 10 train rows dropped (at most 19% may be, data.max_dropped_fraction): 2 too_long"
    assert problem.where == "split train; first rows: 3, 7"
    assert problem.fix == "raise data.max_length (now 150), or raise data.max_dropped_fraction"
    assert prepare(path, notes, **chosen, max_dropped_fraction=0.2).report["splits"]["train"]["rows_kept"] == 8


def test_nothing_kept_is_an_error_whatever_the_limit(path: Path, notes: Notes) -> None:
    with pytest.raises(DataError, match="20 of 20 train rows dropped: 20 prompt_too_long"):
        prepare(path, notes, max_length=5, max_dropped_fraction=1.0)


def test_validation_by_count_fraction_and_file(path: Path, notes: Notes, tmp_path: Path) -> None:
    count, fraction = prepare(path, notes, validation=5), prepare(path, notes, validation=0.25)
    assert {name: len(part) for name, part in count.splits.items()} == {"train": 15, "validation": 5}
    assert tokens(count) == tokens(fraction)
    every = tokens(prepare(path, notes))["train"]
    assert sorted([*tokens(count)["train"], *tokens(count)["validation"]]) == sorted(every)
    held_out = tiny.write_rows(tmp_path / "held-out.json", tiny.alpaca_rows(3, seed=9))
    by_file = prepare(path, notes, validation=str(held_out), test=2)
    assert {name: len(part) for name, part in by_file.splits.items()} == {"train": 18, "test": 2, "validation": 3}
    assert tokens(by_file)["validation"] == tokens(prepare(held_out, notes))["train"]
    assert [source["name"] for source in by_file.report["sources"]] == [str(path), str(held_out)]


def test_fingerprint_depends_on_the_split(path: Path, notes: Notes) -> None:
    chosen: list[dict[str, Any]] = [{}, {"validation": 3}, {"validation": 3, "split_seed": 1}]
    chosen.append({"validation": 3, "split_method": "first"})
    assert len({prepare(path, notes, **each).fingerprint for each in chosen}) == 4


def test_own_template_of_the_tokenizer_goes_first(path: Path, notes: Notes) -> None:
    prepared = prepare(path, notes, own=CHATML)
    assert (prepared.template.name, prepared.template.text) == ("tokenizer", CHATML)
    assert prepared.prompter.stop.texts[0] == "<|stop|>"
    assert prepare(path, notes, own=CHATML, template_text=TEMPLATES["none"]).template.name == "adapter"


SEGMENTS = {"segments": [{"text": "a", "train": False}, {"text": " b<|end|>", "train": True}]}
TOKENS = {"input_ids": [1, 2], "labels": [-100, 2]}


@pytest.mark.parametrize(
    ("rows", "own", "chosen", "name"),
    [
        ([TOKENS], CHATML, {}, "tokenizer"),
        ([SEGMENTS], CHATML, {}, "tokenizer"),
        ([TOKENS], None, {}, "none"),
        ([TOKENS], CHATML, {"template": "alpaca"}, "alpaca"),
        ([{"text": "a b"}], CHATML, {}, "none"),
        ([{"text": "a b"}, TOKENS], CHATML, {}, "tokenizer"),
    ],
)
def test_rows_that_no_template_renders_leave_an_adapter_to_be_prompted(
    path: Path, notes: Notes, rows: list[dict[str, Any]], own: str | None, chosen: dict[str, Any], name: str
) -> None:
    files = [tiny.write_rows(path.with_name(f"{number}.json"), [row]) for number, row in enumerate(rows)]
    prepared = prepare(path, notes, own=own, train=[str(file) for file in files], **chosen)
    assert prepared.template.name == name


def test_default_of_several_own_templates(path: Path, notes: Notes) -> None:
    several: Any = {"default": CHATML, "tool_use": "{{ tools }}"}
    prepared = prepare(path, notes, own=several)
    assert (prepared.template.name, prepared.template.text) == ("tokenizer", CHATML)


@pytest.mark.parametrize("row", [{"text": "a b"}, {"input_ids": [1, 2], "labels": [1, 2]}])
def test_what_an_adapter_fixes_is_no_mistake_of_rows_without_prompts(
    path: Path, notes: Notes, row: dict[str, Any]
) -> None:
    tiny.write_rows(path, [row])
    chosen = {"system": "be kind", "template": "alpaca", "template_kwargs": {"a": 1}}
    assert len(prepare(path, notes, template_text=CHATML, **chosen).splits["train"]) == 1


def test_text_is_split_into_windows(path: Path, notes: Notes) -> None:
    tiny.write_rows(path, [{"text": "red blue " * 20}, {"text": "cat"}])
    prepared = prepare(path, notes, max_length=8)
    whole = sum(len(ids) + 1 for ids in prepared.prompter.encode(["red blue " * 20, "cat"]))
    assert prepared.report["splits"]["train"]["supervised_tokens"] == whole - 2
    assert prepared.report["format"]["value"] == "text"


@pytest.mark.parametrize(
    ("row", "chosen", "key"),
    [
        ({"instruction": "a", "output": "b"}, {"long_text": "truncate"}, "long_text"),
        ({"text": "a b"}, {"template": "alpaca"}, "template"),
        ({"text": "a b"}, {"train_on": "last_response"}, "train_on"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, {"system": "be kind"}, "system"),
    ],
)
def test_setting_without_meaning_for_the_detected_format(
    path: Path, notes: Notes, row: dict[str, Any], chosen: dict[str, Any], key: str
) -> None:
    tiny.write_rows(path, [row])
    with pytest.raises(DataError, match=f"data.{key} has no meaning for format"):
        prepare(path, notes, **chosen)


def test_identity_names_what_differs(path: Path, notes: Notes, tmp_path: Path) -> None:
    def differing(**chosen: Any) -> set[str]:
        other = prepare(chosen.pop("rows", path), notes, **{"validation": 4, **chosen}).identity
        return {name for name in before.keys() | other.keys() if before.get(name) != other.get(name)}

    before = prepare(path, notes, validation=4).identity
    both = {"tokens of train", "tokens of validation"}
    changed = tiny.alpaca_rows(20)
    changed[3]["output"] += "!"
    rows = tiny.write_rows(tmp_path / "changed.json", changed)
    assert differing(cache_dir=str(tmp_path / "elsewhere")) == set()
    assert differing(max_length=400) == {"max_length"}
    assert differing(template="none") == {"template", *both}
    assert differing(split_seed=1) == {"split", *both}
    assert differing(stop_tokens=["<|stop|>"]) == {"special_tokens", "stop_tokens", "stop_token_ids", *both}
    assert differing(validation=None) == {"split", *both}
    assert differing(rows=rows) == {"rows", next(iter(differing(rows=rows) - {"rows"}))}
    assert before["max_length"] == "512"


def test_other_code_with_the_same_tokens_keeps_the_identity(
    path: Path, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prepare(path, notes)
    monkeypatch.setattr(identity, "code_version", lambda: "another")
    after = prepare(path, notes)
    assert notes.hits == 0  # the cache does not survive its code
    assert after.identity == before.identity
    assert after.fingerprint == before.fingerprint


class Plain:
    """In place of a tokenizer in Python alone, which has no backend."""

    vocab_files_names = {"vocab_file": "vocab.txt"}  # noqa: RUF012 - the library's own form

    def __init__(self, **settings: Any) -> None:
        self.init_kwargs = settings

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "b": 1}


class Other(Plain):
    """The same vocabulary under other rules."""


def test_tokenizer_without_a_backend_is_its_class_settings_and_files(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file, content in zip(files, ("1", "1", "2"), strict=True):
        file.write_text(content)
    made: list[Any] = [
        Plain(vocab_file=str(files[0]), name_or_path="here"),
        Plain(vocab_file=str(files[1]), name_or_path="there"),
        Plain(vocab_file=str(files[2])),
        Plain(vocab_file=str(files[0]), do_lower_case=True),
        Other(vocab_file=str(files[0])),
    ]
    hashes = [tokenizer_sha256(each) for each in made]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4


@pytest.mark.parametrize("part", ["validation", "test"])
def test_same_rows_under_two_names_are_refused(path: Path, notes: Notes, tmp_path: Path, part: str) -> None:
    copy = tmp_path / "copy.json"
    copy.write_bytes(path.read_bytes())
    with pytest.raises(DataError, match=r"copy\.json' holds the rows of .*rows\.json'") as caught:
        prepare(path, notes, **{part: str(copy)})
    assert caught.value.problems[0].where == f"keys data.train, data.{part}"


def test_rows_with_pictures_for_a_model_of_text_are_told_so_before_any_template(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"image": "a.png", "question": "what?", "answer": "a cat"}\n')
    data = DataConfig(train=str(rows), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="the model reads none") as caught:
        prepare_data(data, build_tokenizer(), reporter=Reporter())
    assert "qwen2_vl" in str(caught.value)
