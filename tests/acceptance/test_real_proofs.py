"""No false alarm: every row of the real data sets is proven, under real tokenizers and templates, cut and uncut.

What a template has no place for (tools under alpaca) is refused when it is tokenized, and no proof's concern.
"""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from loralab.config.schema import DataConfig
from loralab.data.dataset import prepare_data
from loralab.data.proofs.answer_survey import AnswerSurvey
from loralab.data.proofs.findings import Findings, check_findings
from loralab.data.proofs.prove import Prover
from loralab.data.proofs.reread import count_stored_rows, read_stored_rows
from loralab.errors import DataError
from loralab.progress import Reporter

pytestmark = pytest.mark.slow

TOOLS = {"chat/llamafactory/glaive_toolcall_en_demo.json", "chat/llamafactory/reason_tool_use_demo_50.jsonl"}
FILES = (
    "sft/alpaca_en_demo/alpaca_en_demo.json",
    "sft/alpaca_en_demo/alpaca_zh_demo.json",
    "sft/gpteacher_14k/gpteacher_14k.jsonl",
    "sft/unusual_rows/unusual_rows.jsonl",
    "chat/oasst_multiturn/oasst_multiturn.jsonl",
    "chat/llamafactory/identity.json",
    "chat/llamafactory/v1_sft_demo.jsonl",
    *sorted(TOOLS),
    "price/items_prompts/items_prompts_train.jsonl",
    "price/items_prompts/messages_a_train.jsonl",
    "price/items_prompts/messages_b_train.jsonl",
    "yesno/boolq/train.json",
    "yesno/pubmedqa/pubmedqa_train.jsonl",
    "text/wikitext-2/test.txt",
)
CASES = [
    ("gpt2", "alpaca"),
    ("gpt2", "none"),
    ("qwen2.5", "tokenizer"),
    ("llama2", "alpaca"),
    ("llama2", "vicuna"),
    ("llama2", "mistral"),
]
REFUSED = {(template, file) for template in ("alpaca", "none", "vicuna") for file in TOOLS}
UNCUT, CUT = 100_000, 512
# What cutting and templates do to clean rows; nothing else is to be said of them.
_EXPECTED = {"cut", "turns_dropped", "answer_altered", "reasoning_left_out", "empty_answer"}


@pytest.mark.parametrize("max_length", [UNCUT, CUT])
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(("tokenizer", "template"), CASES)
def test_no_false_alarm(
    data_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    *,
    tokenizer: str,
    template: str,
    file: str,
    max_length: int,
) -> None:
    """All stored rows of the file are proven; warnings are counted and printed."""
    is_text = file.startswith("text/")
    if is_text and (max_length == UNCUT or template not in ("alpaca", "tokenizer")):
        pytest.skip("text knows no template, and its windows need a length")
    data = DataConfig(
        train=str(data_folder / file),
        template="auto" if is_text else template,
        max_length=max_length,
        truncation="right" if max_length == UNCUT or is_text else "left" if file.startswith("chat/") else "right",
        cache_dir=str(tmp_path),
        max_dropped_fraction=1.0,
        num_workers=0,
    )
    loaded = AutoTokenizer.from_pretrained(str(data_folder / "tokenizers" / tokenizer))
    if (template, file) in REFUSED:
        with pytest.raises(DataError, match="cannot render"):
            prepare_data(data, loaded, reporter=Reporter())
        return
    prepared = prepare_data(data, loaded, reporter=Reporter())
    prover = Prover(prepared.prompter, prepared.pools[0].workers[0].settings)
    survey = AnswerSurvey(loaded.all_special_tokens)
    findings, rows = Findings(), 0
    for chunk in read_stored_rows(prepared):
        findings.add(prover.prove(chunk))
        findings.add(survey.look(chunk))
        rows += len(chunk)
    assert rows == count_stored_rows(prepared) > 0
    check_findings(findings.as_list())
    warnings = {group["kind"]: group["count"] for group in findings.as_list()}
    assert set(warnings) <= _EXPECTED
    with capsys.disabled():
        print(f"\n{file} x {tokenizer}, {template}, {max_length}: {rows} rows, {prover.spans} spans, {warnings or 0}")
