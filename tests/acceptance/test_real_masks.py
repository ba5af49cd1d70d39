"""What is supervised, row by row, on real Alpaca data under real tokenizers.

Every row of four files goes through `prepare_data`, once uncut and once at 512 tokens, and is
compared with prompts and answers that this test makes without the product's code.
"""

import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from acceptance.reference import (
    VOCABULARIES,
    Rows,
    Vocabulary,
    chat_messages,
    plain_prompt,
    read_rows,
    tiling_error,
    token_bytes,
)
from loralab.config.schema import DataConfig
from loralab.data.dataset import PreparedData, prepare_data
from loralab.progress import Reporter

pytestmark = pytest.mark.slow

FILES = {
    "alpaca_en_demo": "sft/alpaca_en_demo/alpaca_en_demo.json",
    "alpaca_zh_demo": "sft/alpaca_en_demo/alpaca_zh_demo.json",
    "unusual_rows": "sft/unusual_rows/unusual_rows.jsonl",
    "gpteacher_14k": "sft/gpteacher_14k/gpteacher_14k.jsonl",
}
UNCUT, CUT = 1_000_000, 512
# More rows than one process of the pipeline would keep to itself.
MANY_ROWS = 2048

Ids = list[int]


@dataclass
class Case:
    """One file under one tokenizer: the product's tokens and the reference's.

    Attributes:
        name: file and tokenizer.
        vocabulary: facts of the tokenizer.
        tokenizer: loaded apart from the product's.
        rows: of the file, read by the test.
        outputs: answers in the tokenizer's normal form.
        prompts: ids of the serving call, by the product's tokenizer saved and loaded again.
        uncut: the product's data at `UNCUT` tokens.
        cut: the product's data at `CUT` tokens.
        whole: prompt and answer ids of `uncut`, by row number from 1.
        short: prompt and answer ids of `cut`, by row number from 1.
    """

    name: str
    vocabulary: Vocabulary
    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    outputs: list[str]
    prompts: list[Ids]
    uncut: PreparedData
    cut: PreparedData
    whole: dict[int, tuple[Ids, Ids]] = field(default_factory=dict)
    short: dict[int, tuple[Ids, Ids]] = field(default_factory=dict)


def _normal(text: str, vocabulary: Vocabulary) -> str:
    # Qwen's tokenizer brings text to NFC before anything else: the most that can be asked of it.
    return unicodedata.normalize("NFC", text) if vocabulary.own_template else text


def _prepare(path: Path, tokenizer: PreTrainedTokenizerBase, *, length: int, cache: Path, workers: int) -> PreparedData:
    data = DataConfig(
        train=str(path), max_length=length, cache_dir=str(cache), num_workers=workers, max_dropped_fraction=1.0
    )
    return prepare_data(data, tokenizer, reporter=Reporter())


def _by_row(prepared: PreparedData) -> dict[int, tuple[Ids, Ids]]:
    found: dict[int, tuple[Ids, Ids]] = {}
    for example in prepared.splits["train"]:
        assert example.row not in found, f"row {example.row} is there twice"
        assert len(example.branches) == 1, f"row {example.row} has {len(example.branches)} branches"
        branch = example.branches[0]
        found[example.row] = branch.prompt_ids.tolist(), branch.answer_ids.tolist()
    return found


@pytest.fixture(
    scope="module",
    params=[(file, tokenizer) for file in FILES for tokenizer in VOCABULARIES],
    ids="-".join,
)
def case(request: pytest.FixtureRequest, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Return one file under one tokenizer, through the product and through the reference."""
    file, name = request.param
    vocabulary, path = VOCABULARIES[name], data_folder / FILES[file]
    folder, temporary = str(data_folder / vocabulary.folder), tmp_path_factory.mktemp("case")
    rows = read_rows(path)
    uncut = _prepare(path, AutoTokenizer.from_pretrained(folder), length=UNCUT, cache=temporary, workers=0)
    workers = 2 if len(rows) > MANY_ROWS else 0
    cut = _prepare(path, AutoTokenizer.from_pretrained(folder), length=CUT, cache=temporary, workers=workers)
    uncut.prompter.tokenizer.save_pretrained(temporary / "saved")
    reloaded = AutoTokenizer.from_pretrained(str(temporary / "saved"))
    return Case(
        name=f"{file} x {name}",
        vocabulary=vocabulary,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        rows=rows,
        outputs=[_normal(row["output"], vocabulary) for row in rows],
        prompts=reloaded.apply_chat_template(
            [chat_messages(row) for row in rows], tokenize=True, add_generation_prompt=True, return_dict=True
        )["input_ids"],
        uncut=uncut,
        cut=cut,
        whole=_by_row(uncut),
        short=_by_row(cut),
    )


def _report(prepared: PreparedData) -> dict[str, Any]:
    return prepared.report["splits"]["train"]


def test_uncut_data_keeps_every_row_in_order(case: Case) -> None:
    """Nothing is dropped, nothing is cut, and rows keep the file's order."""
    report = _report(case.uncut)
    assert list(case.whole) == list(range(1, len(case.rows) + 1))
    assert (report["rows_read"], report["rows_kept"]) == (len(case.rows), len(case.rows))
    assert (report["dropped"], report["dropped_rows"], report["truncated"]) == ({}, [], 0)


def test_supervised_text_is_the_answer(case: Case) -> None:
    """The supervised ids stand for exactly the bytes of the answer, and decode to it, behind them the stop token.

    The bytes of the pieces are the answer's UTF-8, without the blank that SentencePiece puts before
    a text of its own. Its decoder removes a leading blank, also one that the answer begins with.
    """
    vocabulary, tokenizer = case.vocabulary, case.tokenizer
    answers = [case.whole[row][1] for row in range(1, len(case.rows) + 1)]
    decoded = tokenizer.batch_decode([ids[:-1] for ids in answers], clean_up_tokenization_spaces=False)
    for row, (ids, text, output) in enumerate(zip(answers, decoded, case.outputs, strict=True), 1):
        assert ids[-1] == vocabulary.stop, f"row {row} does not end with the stop token"
        assert token_bytes(tokenizer, ids[:-1], byte_level=vocabulary.byte_level) == output.encode(), f"row {row}"
        assert text == (output if vocabulary.byte_level else output.removeprefix(" ")), f"row {row}"


def test_supervised_offsets_tile_the_answer(case: Case) -> None:
    """The answer's text behind a special token gives the supervised ids but the last; their offsets leave no gap.

    They begin at character 0 and end at the answer's length. Neighbours share a character only
    where a token holds a part of its bytes, or where SentencePiece's own blank stands at it.
    """
    mark = case.tokenizer.convert_ids_to_tokens(case.vocabulary.stop)
    marked = [mark + output for output in case.outputs]
    encoded = case.tokenizer(marked, add_special_tokens=False, return_offsets_mapping=True)
    for row, output in enumerate(case.outputs, 1):
        ids = encoded["input_ids"][row - 1][1:]
        offsets = [(a - len(mark), b - len(mark)) for a, b in encoded["offset_mapping"][row - 1][1:]]
        assert case.whole[row][1] == [*ids, case.vocabulary.stop], f"row {row}"
        error = tiling_error(offsets, len(output))
        assert error is None, f"row {row}: {error}"


def test_prompts_are_those_of_the_serving_call(case: Case) -> None:
    """A client with the saved tokenizer and nothing else sends the prompt ids that training saw, cut or not."""
    for kept in (case.whole, case.short):
        wrong = [row for row, (prompt, _) in kept.items() if prompt != case.prompts[row - 1]]
        assert wrong == []


def test_prompt_text_is_the_published_one(case: Case) -> None:
    """The prompt ids are those of the Stanford Alpaca text, or of the tokenizer's own published template."""
    if case.vocabulary.own_template:
        texts = case.tokenizer.apply_chat_template(
            [chat_messages(row) for row in case.rows], tokenize=False, add_generation_prompt=True
        )
    else:
        texts = [plain_prompt(row) for row in case.rows]
    expected = case.tokenizer(texts, add_special_tokens=not case.vocabulary.own_template)["input_ids"]
    wrong = [row for row, (prompt, _) in case.whole.items() if prompt != expected[row - 1]]
    assert wrong == []


def test_special_tokens_stand_where_they_belong(case: Case) -> None:
    """One bos at the start exactly where the tokenizer wants one; one stop token, at the answer's end."""
    vocabulary = case.vocabulary
    begins = [] if vocabulary.bos is None else [vocabulary.bos]
    for row, (prompt, answer) in case.whole.items():
        assert [token for token in prompt if token == vocabulary.bos] == begins, f"row {row}: bos"
        assert not begins or prompt[0] == vocabulary.bos, f"row {row}: bos is not the first"
        assert vocabulary.bos not in answer, f"row {row}: bos in the answer"
        assert not set(vocabulary.never) & {*prompt, *answer}, f"row {row}: a special token that nothing writes"
        assert answer.count(vocabulary.stop) == 1, f"row {row}: stop tokens"
        # Qwen's template ends the turns of system and user with the same token; elsewhere none is in a prompt.
        assert prompt.count(vocabulary.stop) == (2 if vocabulary.own_template else 0), f"row {row}: prompt"


def test_rows_at_512_are_kept_cut_or_listed(case: Case) -> None:
    """A row that fits is unchanged; a longer one loses the answer's end and its stop token, or is listed."""
    dropped, truncated = [], 0
    for row, (prompt, answer) in case.whole.items():
        room = CUT - len(prompt)
        if room <= 0:
            dropped.append({"source": _source(case), "row": row, "reason": "prompt_too_long"})
            assert row not in case.short
            continue
        assert case.short[row] == (prompt, answer[:room]), f"row {row}"
        if len(answer) > room:
            truncated += 1
            assert case.vocabulary.stop not in case.short[row][1], f"row {row}: cut, yet with a stop token"
        else:
            assert case.short[row][1].count(case.vocabulary.stop) == 1, f"row {row}: whole, yet without a stop token"
    report = _report(case.cut)
    assert list(case.short) == sorted(case.short)
    assert report["dropped_rows"] == dropped
    assert report["dropped"] == dict(Counter(entry["reason"] for entry in dropped))
    assert report["truncated"] == truncated
    assert report["rows_read"] == len(case.rows) == report["rows_kept"] + len(dropped)
    assert report["supervised_tokens"] == sum(len(answer) for _, answer in case.short.values())


def _source(case: Case) -> str:
    return str(case.cut.report["sources"][0]["name"])


def test_summary(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """Print the figures of this file and tokenizer; those of both lengths add up."""
    uncut, cut = _report(case.uncut), _report(case.cut)
    assert uncut["supervised_tokens"] == sum(len(answer) for _, answer in case.whole.values())
    assert cut["supervised_tokens"] <= uncut["supervised_tokens"]
    joined = _rows_like_one_text(case)
    with capsys.disabled():
        print(
            f"\n{case.name}: {len(case.rows)} rows, kept {uncut['rows_kept']}, "
            f"supervised tokens {uncut['supervised_tokens']}; at {CUT}: kept {cut['rows_kept']}, "
            f"truncated {cut['truncated']}, dropped {cut['dropped'] or 0}, "
            f"supervised tokens {cut['supervised_tokens']}; same ids as prompt and answer in one text: {joined}"
        )


def _rows_like_one_text(case: Case) -> int:
    texts = case.tokenizer.batch_decode([prompt for prompt, _ in case.whole.values()])
    joined = [text + output for text, output in zip(texts, case.outputs, strict=True)]
    ids = case.tokenizer(joined, add_special_tokens=False)["input_ids"]
    return sum(whole == prompt + answer[:-1] for whole, (prompt, answer) in zip(ids, case.whole.values(), strict=True))
