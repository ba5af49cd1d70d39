"""Real files open whole, and plain text becomes windows that predict every token once."""

import csv
import gzip
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from acceptance.reference import VOCABULARIES, read_rows
from loralab.config.schema import DataConfig, LoraConfig, ModelConfig
from loralab.data.dataset import PreparedData, prepare_data
from loralab.data.formats.table import FORMATS, resolve_format
from loralab.data.reading.sources import resolve_sources
from loralab.evaluation.perplexity import measure_loss
from loralab.layout.planner import Planner
from loralab.models.adapters import build_adapter
from loralab.models.load import load_base_model
from loralab.progress import Reporter

pytestmark = pytest.mark.slow

# Rows as the SOURCE.md beside each file counts them, and the format that its columns show.
FILES: dict[str, tuple[int, str | None]] = {
    "sft/alpaca_en_demo/alpaca_en_demo.json": (999, "alpaca"),
    "sft/alpaca_en_demo/alpaca_zh_demo.json": (1000, "alpaca"),
    "sft/gpteacher_14k/gpteacher_14k.jsonl": (14131, "alpaca"),
    "sft/unusual_rows/unusual_rows.jsonl": (151, "alpaca"),
    "text/wikitext-2/valid.txt": (1, "text"),
    "text/wikitext-2/test.txt": (1, "text"),
    "text/wikitext-2/train_60_articles.txt": (1, "text"),
    "text/wikitext-2/train.txt.gz": (1, "text"),
    "price/items_prompts/items_prompts_train.jsonl": (900, "prompt_completion"),
    "price/items_prompts/items_prompts_val.jsonl": (150, "prompt_completion"),
    # 250 records and no header: the first one becomes the names of the columns.
    "price/items_prompts/human_guesses_250.csv": (249, None),
    "yesno/boolq/train.json": (9427, "alpaca"),
    "yesno/boolq/test.json": (3270, "alpaca"),
    "yesno/pubmedqa/pubmedqa_train.jsonl": (500, None),
}
STORIES = "models/stories260k"
WINDOW = 512
WIKITEXT = "text/wikitext-2/valid.txt"
# Folder, id that begins a text (None: nothing does) and id that ends it.
BEGIN_END: dict[str, tuple[str, int | None, int]] = {
    "stories260k": (STORIES, 1, 2),
    **{name: (known.folder, known.bos, known.stop) for name, known in VOCABULARIES.items()},
}


@pytest.mark.parametrize("file", FILES)
def test_file_opens_whole(file: str, data_folder: Path) -> None:
    """Every row comes, numbered from 1, twice the same, with the values that stand in the file."""
    count, form = FILES[file]
    path = data_folder / file
    (source,) = resolve_sources(str(path), where="test")
    rows = list(source.rows())
    assert [row.number for row in rows] == list(range(1, count + 1))
    assert [row.fields for row in source.rows()] == [row.fields for row in rows]
    if path.suffix in (".json", ".jsonl"):
        assert [dict(row.fields) for row in rows] == read_rows(path)
    elif form == "text":
        assert rows[0].fields["text"] == _text(path)
    if form is not None:
        found, _ = resolve_format("auto", {}, first=rows[0].fields, where=file)
        assert found == form
        for row in rows:
            FORMATS[form].build(row.fields)


def _text(path: Path) -> str:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return raw.decode("utf-8")


def test_wikitext_has_the_published_number_of_words(data_folder: Path) -> None:
    """WikiText-2's train, valid and test files read as 2051910, 213886 and 241211 words."""
    words = {"train.txt.gz": 2051910, "valid.txt": 213886, "test.txt": 241211}
    for name, count in words.items():
        (source,) = resolve_sources(str(data_folder / "text/wikitext-2" / name), where="test")
        assert sum(len(str(row.fields["text"]).split()) for row in source.rows()) == count, name


def test_csv_keeps_fields_of_several_lines(data_folder: Path) -> None:
    """Quoted fields with line breaks come as Python's csv module reads them."""
    path = data_folder / "price/items_prompts/human_guesses_250.csv"
    (source,) = resolve_sources(str(path), where="test")
    with path.open(encoding="utf-8", newline="") as stream:
        header, *records = csv.reader(stream)
    assert [list(row.fields.values()) for row in source.rows()] == records
    assert all(list(row.fields) == header for row in source.rows())
    assert any("\n" in prompt for prompt, _ in records)
    assert all(prompt.endswith("Price is $") for prompt, _ in records)


def test_columns_map_pubmedqa(data_folder: Path, tmp_path: Path) -> None:
    """`data.columns` makes question and answer of PubMedQA a prompt / completion data set."""
    path = data_folder / "yesno/pubmedqa/pubmedqa_train.jsonl"
    data = DataConfig(
        train=str(path),
        columns={"prompt": "question", "completion": "answer"},
        cache_dir=str(tmp_path),
        validation=0.2,
    )
    tokenizer = AutoTokenizer.from_pretrained(str(data_folder / "tokenizers/gpt2"))
    prepared = prepare_data(data, tokenizer, reporter=Reporter())
    assert {name: len(part) for name, part in prepared.splits.items()} == {"train": 400, "validation": 100}
    rows = read_rows(path)
    examples = [example for part in prepared.splits.values() for example in (part[i] for i in range(len(part)))]
    assert sorted(example.row for example in examples) == list(range(1, 501))
    for example in examples:
        row, branch = rows[example.row - 1], example.branches[0]
        assert tokenizer.decode(branch.prompt_ids.tolist()) == row["question"]
        assert tokenizer.decode(branch.answer_ids.tolist()) == row["answer"] + "<|endoftext|>"


def prepare_windows(data_folder: Path, name: str, cache: Path) -> PreparedData:
    """Return WikiText-2's validation text as windows of the tokens of `name`."""
    data = DataConfig(
        train=str(data_folder / WIKITEXT), format="text", max_length=WINDOW, cache_dir=str(cache), num_workers=0
    )
    tokenizer = AutoTokenizer.from_pretrained(str(data_folder / BEGIN_END[name][0]))
    return prepare_data(data, tokenizer, reporter=Reporter())


def _window_ids(prepared: PreparedData) -> list[list[int]]:
    store = prepared.splits["train"]
    examples = [store[index] for index in range(len(store))]
    assert all(len(example.branches) == 1 for example in examples)
    assert all(len(example.branches[0].prompt_ids) == 1 for example in examples)
    return [[*e.branches[0].prompt_ids.tolist(), *e.branches[0].answer_ids.tolist()] for e in examples]


@pytest.mark.parametrize("name", ["stories260k", "gpt2", "qwen2.5", "llama2"])
def test_windows_predict_every_token_once(
    name: str, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of `tokenizer(text)` and the end token, T tokens in all, every one but the first is supervised, once.

    (The first is the bos where the tokenizer writes one, else the text's first token.) Every window
    begins with the token that the one before ended with, which it does not predict, so the windows
    without their first tokens are the text; there are ceil((T - 1) / 511) of them.
    """
    folder, bos, end = BEGIN_END[name]
    windows = prepare_windows(data_folder, name, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(str(data_folder / folder))
    whole = [*tokenizer(_text(data_folder / WIKITEXT), verbose=False)["input_ids"], end]
    found = _window_ids(windows)
    assert [token for window in found for token in window[1:]] == whole[1:]
    assert found[0][0] == whole[0]
    assert bos is None or whole[0] == bos
    assert all(later[0] == earlier[-1] for earlier, later in pairwise(found))
    assert all(len(window) == WINDOW for window in found[:-1])
    assert len(found) == math.ceil((len(whole) - 1) / (WINDOW - 1))
    report = windows.report["splits"]["train"]
    assert (report["supervised_tokens"], report["truncated"]) == (len(whole) - 1, 0)
    with capsys.disabled():
        print(f"\nwikitext-2 valid x {name}: {len(found)} windows, {report['supervised_tokens']} supervised tokens")


def test_window_loss_is_the_plain_loss(data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The measured loss of the first 20 windows, and the short last one, equals full logits without loralab."""
    windows = prepare_windows(data_folder, "stories260k", tmp_path)
    store = windows.splits["train"]
    chosen = [store[index] for index in (*range(20), len(store) - 1)]
    config = ModelConfig(name=str(data_folder / STORIES), device="cpu", precision="float32")
    base, _ = load_base_model(config, dtype=torch.float32, device=torch.device("cpu"))
    model, _ = build_adapter(base, LoraConfig(), seed=0)
    measured = measure_loss(
        model,
        chosen,
        planner=Planner(token_budget=4096, layout="padded"),
        batch_size=8,
        device=torch.device("cpu"),
        reporter=Reporter(),
        label="windows",
    )
    plain = AutoModelForCausalLM.from_pretrained(str(data_folder / STORIES), dtype=torch.float32).eval()
    totals = []
    for window in [*_window_ids(windows)[:20], _window_ids(windows)[-1]]:
        ids = torch.tensor([window])
        with torch.no_grad():
            scores = plain(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        totals.append(-float(scores.gather(1, ids[0, 1:, None]).sum()))
    tokens = sum(len(example.branches[0].answer_ids) for example in chosen)
    assert measured.totals == pytest.approx(totals, rel=1e-5)
    assert measured.loss == pytest.approx(sum(totals) / tokens, abs=1e-5)
    with capsys.disabled():
        plain_loss = sum(totals) / tokens
        print(f"\nwikitext-2 valid x stories260k, 21 windows: loss {measured.loss:.7f}, plain {plain_loss:.7f}")
