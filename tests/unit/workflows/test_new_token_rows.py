"""New tokens in what is prepared and shown before a run, and in the memory that a plan counts."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from loralab.config.load import LoadedConfig
from loralab.data.prompts.prompter import apply_stop_setting
from loralab.data.tokens.identity import tokenizer_sha256
from loralab.models.trainable_tokens import new_tokens_of, settle_tokens
from loralab.progress import Reporter
from loralab.run import RunFolder
from loralab.training.distributed import ALONE
from loralab.workflows.configure import load_run_config
from loralab.workflows.plan import plan
from loralab.workflows.prepare import prepare
from loralab.workflows.preview import PreviewRequest, preview
from loralab.workflows.train import prepare_run
from support import tiny

ROWS = 8


@pytest.fixture
def files(tmp_path: Path) -> Path:
    tiny.save_base(tmp_path / "base")
    rows = [{**row, "output": f"<tool_call>{row['output']}"} for row in tiny.alpaca_rows(ROWS)]
    tiny.write_rows(tmp_path / "rows.json", rows)
    return tmp_path


def configured(files: Path, *tokens: str, rows: str = "rows.json") -> LoadedConfig:
    lora: dict[str, Any] = {"trainable_token_indices": list(tokens)} if tokens else {}
    return load_run_config(tiny.run_config(files / "base", files / rows, files / "run", lora=lora))


def test_preview_shows_and_proves_the_rows_that_training_takes(files: Path) -> None:
    shown = [
        preview(configured(files, *tokens), PreviewRequest(), reporter=Reporter()) for tokens in ((), ("<tool_call>",))
    ]
    plain, new = (result["report"]["splits"]["train"] for result in shown)
    size = len(tiny.build_tokenizer().encode("<tool_call>"))
    assert plain["total_tokens"] - new["total_tokens"] == ROWS * (size - 1)
    assert [result["proofs"]["errors"] for result in shown] == [0, 0]
    assert shown[1]["findings"] == shown[0]["findings"]


def test_prepared_rows_are_trained_with_the_same_tokens(files: Path) -> None:
    facts = prepare(configured(files, "<tool_call>"), files / "prepared", overwrite=False, reporter=Reporter())
    loaded = configured(files, "<tool_call>", rows="prepared")
    run = prepare_run(loaded, RunFolder(files / "run"), reporter=Reporter(), processes=ALONE, saved=None)
    (token,) = new_tokens_of(settle_tokens(loaded.config.lora, tiny.build_tokenizer()))
    rows = run.data.splits["train"]
    assert sum(int(row.branches[0].answer_ids[0] == token.id) for row in rows) == ROWS
    assert facts["splits"]["train"]["rows"] == ROWS


def test_what_grew_is_no_page_of_the_base(files: Path) -> None:
    """Weights in the type of the run are pages of their file, and count apart; a matrix that grew is none."""
    plain, new = (
        plan(configured(files, *tokens), probe=False, reporter=Reporter())
        for tokens in (("<|end|>",), ("<tool_call>",))
    )
    grown = new["parameters"]["grown_bytes"]
    assert grown == 2 * (len(tiny.build_tokenizer()) + 1) * 32 * 4
    assert new["memory"]["parts"]["weights"] - plain["memory"]["parts"]["weights"] == grown
    both = [each["memory"]["parts"]["weights"] + each["memory"]["mapped_bytes"] for each in (plain, new)]
    assert both[1] - both[0] == 2 * 32 * 4  # a row of each


def test_a_new_token_that_ends_answers_is_special_as_it_is_once_loaded(tmp_path: Path) -> None:
    tokenizer = tiny.build_tokenizer()
    settle_tokens(configured(tmp_path, "<|stop|>").config.lora, tokenizer)
    apply_stop_setting(tokenizer, ["<|stop|>"])
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_sha256(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_sha256(tokenizer)
    assert tokenizer.decode(tokenizer.encode("cat<|stop|>"), skip_special_tokens=True) == "cat"
