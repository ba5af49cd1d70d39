"""Rows, files and templates that are almost good or nothing like it: whatever they hold, only errors that are meant."""

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from loralab.config.schema import DataConfig
from loralab.data.dataset import prepare_data
from loralab.data.formats.table import FORMATS
from loralab.data.prompts.contract import build_contract, load_contracted
from loralab.data.prompts.prompter import Prompter, render_with
from loralab.data.prompts.templates import SHIPPED, prepare_template, resolve_template
from loralab.data.proofs.answer_survey import AnswerSurvey
from loralab.data.proofs.findings import Finding
from loralab.data.proofs.prove import Prover
from loralab.data.proofs.reread import read_stored_rows
from loralab.data.reading.rows import Row
from loralab.data.tokens.packing import pack_rows
from loralab.data.tokens.pipeline import RowTokenizer
from loralab.data.tokens.tokenize import TokenizeSettings
from loralab.errors import LoralabError
from loralab.progress import Reporter
from unit.data.malformed_files import edited_templates, malformed_files
from unit.data.malformed_rows import GOOD_ROWS, TEXT, good_rows, malformed_rows
from unit.data.prompters import CHATML, NO_PICTURES, build_tokenizer

# What `data` may say about rows; every combination is a way through the code.
SETTINGS = st.builds(
    TokenizeSettings,
    st.sampled_from(["response", "response", "last_response", "all", ["user", "assistant"], ["system", "tool"]]),
    st.sampled_from([512, 512, 512, 16, 2, 1]),
    st.sampled_from(["right", "left", "drop", "error"]),
    st.sampled_from(["split", "truncate"]),
    st.sampled_from([None, None, "Be kind."]),
)
ON_BAD_ROW = st.sampled_from(["error", "drop"])
TOKENIZERS = {"plain": build_tokenizer(), "bos": build_tokenizer(bos=True), "rich": build_tokenizer(bos=True)}
TOKENIZERS["rich"].add_special_tokens(
    {"additional_special_tokens": sorted({t for s in SHIPPED.values() for t in s.tokens})}
)
PROMPTERS = [Prompter(build_tokenizer(CHATML, bos=bos)) for bos in (False, True)]


class Silent(Reporter):
    """Says nothing."""


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    return copy.deepcopy(TOKENIZERS[name])


def check_error(error: LoralabError) -> None:
    """Check that a person can be shown an error: what, where and fix, as text that a terminal takes, of some length."""
    event(f"{type(error).__name__}")
    assert error.problems
    for problem in error.problems:
        for text in (problem.what, problem.where, problem.fix):
            assert text.strip()
            assert len(text.encode()) < 8000, text[:300]


def check_findings(found: list[Finding]) -> None:
    for finding in found:
        assert len(finding.what.encode()) < 2000


def go_through(worker: RowTokenizer, row: Mapping[str, Any]) -> None:
    """Tokenize a row as a run does; only a `LoralabError` may come out."""
    try:
        packed = pack_rows(worker([Row(row, 1, "rows.json")]))
    except LoralabError as error:
        check_error(error)
        return
    event("dropped" if len(packed.drops) else "kept")
    assert len(packed.examples) + len(packed.drops) == packed.units
    assert packed.tokens.dtype == np.int32
    assert not len(packed.tokens) or 0 <= packed.tokens.min() <= packed.tokens.max()


def prepare_and_prove(data: DataConfig, own: PreTrainedTokenizerFast) -> None:
    """Prepare data, and prove what came of it as `preview` does; only a `LoralabError` may come out."""
    try:
        prepared = prepare_data(data, own, reporter=Silent())
        prover = Prover(prepared.prompter, prepared.pools[0].workers[0].settings)
        survey = AnswerSurvey(prepared.prompter.tokenizer.all_special_tokens)
        for rows in read_stored_rows(prepared):
            check_findings([*prover.prove(rows), *survey.look(rows)])
        load_contracted(prepared.prompter.tokenizer, build_contract(prepared.prompter), where="here")
    except LoralabError as error:
        check_error(error)
        return
    event("prepared")


def check_row(case: tuple[str, dict[str, Any]], how: TokenizeSettings, on_bad_row: Any, prompter: Prompter) -> None:
    name, row = case
    go_through(RowTokenizer(prompter, name, {}, how, on_bad_row, NO_PICTURES), row)


def check_file(case: tuple[str, bytes], form: str, template: str, on_bad_row: Any) -> None:
    suffix, content = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        path.write_bytes(content)
        chosen = {"train": str(path), "cache_dir": f"{folder}/cache", "format": form, "template": template}
        data = DataConfig(**chosen, on_bad_row=on_bad_row, num_workers=0, max_dropped_fraction=1.0)
        prepare_and_prove(data, tokenizer("plain"))


def check_template(text: str, case: tuple[str, dict[str, Any]], how: TokenizeSettings, name: str) -> None:
    """Choose a template from a file, make it ready, prompt with it and tokenize a row under it, as a run does."""
    own = tokenizer(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "template.jinja"
        path.write_text(text, encoding="utf-8")
        try:
            chosen = resolve_template(str(path), own=None, fallback=None, own_first=False, bos_prefix="")
            vocabulary = own.get_vocab()
            ready = prepare_template(chosen, vocabulary=vocabulary, kwargs={}, render=render_with(own))
            own.chat_template = ready.text
            prompter = Prompter(own)
            contract = build_contract(prompter)
            load_contracted(own, contract, where="here")
        except LoralabError as error:
            check_error(error)
            return
    form, row = case
    go_through(RowTokenizer(prompter, form, {}, how, "error", NO_PICTURES), row)


FORMS = st.sampled_from(["auto", "auto", *FORMATS])
TURNS = ("system", "user", "assistant", "user", "assistant")
TALKS = st.integers(0, 1).flatmap(
    lambda start: st.lists(TEXT, min_size=4, max_size=4).map(
        lambda texts: {
            "messages": [{"role": role, "content": text} for role, text in zip(TURNS[start:], texts, strict=False)]
        }
    )
)
PROMPTED = TALKS.map(lambda row: ("messages", row)) | st.sampled_from(["messages", "alpaca", "sharegpt"]).flatmap(
    lambda name: GOOD_ROWS[name].map(lambda row: (name, row))
)
SWEEP = {"deadline": None, "suppress_health_check": list(HealthCheck)}
rows = given(st.tuples(good_rows() | malformed_rows(), SETTINGS, ON_BAD_ROW, st.sampled_from(PROMPTERS)))
files = given(st.tuples(malformed_files(), FORMS, st.sampled_from(["auto", "none", "alpaca"]), ON_BAD_ROW))
templates = given(st.tuples(edited_templates(), PROMPTED, SETTINGS, st.sampled_from([*TOKENIZERS])))


@rows
@settings(max_examples=200, **SWEEP)
def test_malformed_rows_give_tokens_or_errors_that_are_meant(case: tuple[Any, ...]) -> None:
    check_row(*case)


@files
@settings(max_examples=150, **SWEEP)
def test_malformed_files_give_tokens_or_errors_that_are_meant(case: tuple[Any, ...]) -> None:
    check_file(*case)


@templates
@settings(max_examples=150, **SWEEP)
def test_edited_templates_give_prompts_or_errors_that_are_meant(case: tuple[Any, ...]) -> None:
    check_template(*case)


@pytest.mark.slow
@rows
@settings(max_examples=4000, **SWEEP)
def test_four_thousand_malformed_rows(case: tuple[Any, ...]) -> None:
    check_row(*case)


@pytest.mark.slow
@files
@settings(max_examples=3000, **SWEEP)
def test_three_thousand_malformed_files(case: tuple[Any, ...]) -> None:
    check_file(*case)


@pytest.mark.slow
@templates
@settings(max_examples=3000, **SWEEP)
def test_three_thousand_edited_templates(case: tuple[Any, ...]) -> None:
    check_template(*case)
