"""The `preview` command: rows as tokens, the data report, and the proofs that masks are what they should be.

Reads top to bottom in the order of the work. Loads the tokenizer and no model.
"""

import functools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from loralab.config.load import LoadedConfig
from loralab.config.schema import Config
from loralab.data.dataset import PreparedData, prepare_data
from loralab.data.prompts.contract import CONTRACT_FILE, build_contract, check_contract, load_contracted
from loralab.data.prompts.prompter import Prompter, own_template
from loralab.data.proofs.answer_survey import AnswerSurvey
from loralab.data.proofs.findings import Finding, Findings, check_findings
from loralab.data.proofs.prove import Prover
from loralab.data.proofs.reread import count_stored_rows, read_stored_rows
from loralab.data.proofs.survey import SplitHashes, find_overlaps, find_repeated_answer, hash_split, survey_split
from loralab.data.split_report import check_dropped
from loralab.errors import DataError, PromptContractError
from loralab.layout.planner import Planner
from loralab.models.load import load_tokenizer
from loralab.models.trainable_tokens import settle_tokens
from loralab.progress import Reporter
from loralab.run import read_json
from loralab.training.arguments import count_steps
from loralab.workflows.pictures import open_tokenizers_pictures
from loralab.workflows.pinning import name_commits
from loralab.workflows.preview_rows import RowViewer
from loralab.workflows.step_layout import build_sampler

# Steps of an epoch that are laid out to count tokens; more would tell the same.
_SAMPLED_STEPS = 48
# Without a model there is no memory to go by.
_ASSUMED_BUDGET = 16_384


@dataclass(frozen=True, slots=True)
class PreviewRequest:
    """What to show and how much to prove.

    Attributes:
        rows: how many rows of the split to show, where none is named.
        named: rows to show by number, or `FILE:NUMBER`.
        split: split that `rows` are taken from.
        prove: most rows to prove, spread over all; None for all.
    """

    rows: int = 3
    named: Sequence[str] = ()
    split: str = "train"
    prove: int | None = None


def preview(
    loaded: LoadedConfig, request: PreviewRequest, *, reporter: Reporter, adapter: Path | None = None
) -> dict[str, Any]:
    """Prepare the data, prove it and describe it.

    Args:
        loaded: the configuration.
        request: what to show and how much to prove.
        reporter: told of progress.
        adapter: adapter folder whose prompt contract is checked too.

    Returns:
        `rows` to show, `report`, `proofs` (how much was proven) and `findings`.

    Raises:
        UserError: the data cannot be used.
        MaskError: what would carry loss is not the answer, as tokenizing found out.
    """
    config = name_commits(loaded, reporter).config
    # Too many dropped rows are something to look at: `check_preview` refuses them, after they were shown.
    section = config.data.model_copy(update={"max_dropped_fraction": 1.0})
    pictures = open_tokenizers_pictures(config)
    data = prepare_data(section, _load_tokenizer(config), reporter=reporter, pictures=pictures)
    viewer = RowViewer(data)
    if request.named:
        rows = [row for name in request.named for row in viewer.named_row(name)]
    else:
        rows = viewer.first_rows(request.split, request.rows)
    findings = Findings()
    findings.add(_prove_contract(config, data, adapter))
    proofs = _prove(config, data, findings, request=request, reporter=reporter)
    report = _describe(config, data, findings, reporter)
    proofs |= {"errors": findings.count("error"), "warnings": findings.count("warning")}
    return {"name": loaded.name, "rows": rows, "report": report, "proofs": proofs, "findings": findings.as_list()}


def check_preview(result: dict[str, Any], config: Config) -> None:
    """Check that training would take what the preview showed.

    Args:
        result: of `preview`.
        config: its configuration.

    Raises:
        MaskError: a proof failed.
        DataError: more rows of a split were dropped than may be.
    """
    check_findings(result["findings"])
    for name, facts in result["report"]["splits"].items():
        check_dropped(name, facts, config.data)


def _prove_contract(config: Config, data: PreparedData, adapter: Path | None) -> list[Finding]:
    """Ask the golden prompts again: of the tokenizer saved and loaded, and of an adapter's contract."""
    checks = [functools.partial(_check_saved, config, data.prompter)]
    if adapter is not None and (adapter / CONTRACT_FILE).is_file():
        checks.append(functools.partial(_check_adapter, config, data.prompter, adapter))
    found = []
    for check in checks:
        try:
            check()
        except PromptContractError as error:
            problem = error.problems[0]
            found.append(Finding("contract_broken", problem.where, 0, problem.what))
    return found


def _check_saved(config: Config, prompter: Prompter) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prompter.tokenizer.save_pretrained(folder)
        again = load_tokenizer(config.model, folder=Path(folder))
        load_contracted(again, build_contract(prompter), where="the tokenizer as an adapter folder keeps it")


def _check_adapter(config: Config, prompter: Prompter, adapter: Path) -> None:
    where = str(adapter / CONTRACT_FILE)
    contract = read_json(adapter / CONTRACT_FILE)
    load_contracted(load_tokenizer(config.model, folder=adapter), contract, where=where)
    check_contract(prompter, contract, where=where)


def _prove(
    config: Config, data: PreparedData, findings: Findings, *, request: PreviewRequest, reporter: Reporter
) -> dict[str, Any]:
    """Hold every stored row against its source."""
    settings = data.pools[0].workers[0].settings
    prover = Prover(data.prompter, settings, own=_own_prompter(config, data, reporter))
    survey = AnswerSurvey(data.prompter.tokenizer.all_special_tokens)
    total = count_stored_rows(data)
    wanted = total if request.prove is None else min(request.prove, total)
    started, done = time.monotonic(), 0
    for rows in read_stored_rows(data, limit=request.prove):
        findings.add(prover.prove(rows))
        findings.add(survey.look(rows))
        done += len(rows)
        reporter.progress("prove", done, wanted, detail=f"{done / max(time.monotonic() - started, 1e-3):,.0f} rows/s")
    reporter.finish("prove")
    rate = round(done / max(time.monotonic() - started, 1e-3))
    pictures = {} if data.prompter.pictures is None else {"pictures": prover.pictures}
    return {"rows": done, "stored_rows": total, "spans": prover.spans, **pictures, "rows_per_second": rate}


def _load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer, with the new tokens that training gives it."""
    tokenizer = load_tokenizer(config.model)
    settle_tokens(config.lora, tokenizer)
    return tokenizer


def _own_prompter(config: Config, data: PreparedData, reporter: Reporter) -> Prompter | None:
    """Return what proves rows that were tokenized elsewhere: the template of their folder, else the tokenizer's own."""
    formats = {worker.format for pool in data.pools for worker in pool.workers}
    if "tokenized" not in formats:
        return None
    if data.template.name == "prepared":
        return data.prompter
    tokenizer = _load_tokenizer(config)
    own = own_template(tokenizer)
    if own is None:
        reporter.say("the tokenizer has no chat template: of rows tokenized elsewhere, roles cannot be proven")
        return None
    tokenizer.chat_template = own
    try:
        return Prompter(tokenizer)
    except DataError as error:
        reporter.say(f"rows tokenized elsewhere are proven without a template: {error.problems[0].what}")
        return None


def _describe(config: Config, data: PreparedData, findings: Findings, reporter: Reporter) -> dict[str, Any]:
    """Return the data report: that of the run, and what only counting shows."""
    names = {split: [source.name for source in pool.sources] for pool in data.pools for split in pool.parts}
    hashes: dict[str, SplitHashes] = {}
    splits: dict[str, Any] = {}
    for split, store in data.splits.items():
        reporter.progress(f"count {split}", 0, len(store))
        hashes[split] = hash_split(store, stop_ids=data.prompter.stop.ids)
        splits[split] = data.report["splits"][split] | survey_split(store, hashes[split], names=names[split])
        reporter.finish(f"count {split}")
        findings.add(_repeated(data, split, hashes[split], names[split]))
    return {
        **data.report,
        "splits": splits,
        "overlaps": find_overlaps(data.splits, hashes, names),
        "epoch": _describe_epoch(config, data, reporter),
    }


def _repeated(data: PreparedData, split: str, hashes: SplitHashes, names: Sequence[str]) -> list[Finding]:
    found = find_repeated_answer(hashes)
    if found is None:
        return []
    place, count = found
    example = data.splits[split][place]
    text = data.prompter.decode(example.branches[0].answer_ids.tolist())
    what = f"{count:,} of {len(hashes.answers):,} {split} rows have the answer {text[:60]!r}"
    return [Finding("repeated_answer", names[example.source], example.row, what)]


def _describe_epoch(config: Config, data: PreparedData, reporter: Reporter) -> dict[str, Any]:
    """Return what one epoch has: steps, rows, and tokens laid out with and without sharing."""
    train = data.splits["train"]
    sampler, _ = build_sampler(config, train, shares=data.shares)
    steps = sampler.steps()
    places = np.unique(np.linspace(0, len(steps) - 1, min(_SAMPLED_STEPS, len(steps))).astype(np.int64))
    budget = config.training.token_budget
    planner = Planner(token_budget=budget if isinstance(budget, int) else _ASSUMED_BUDGET)
    alone = shared = 0
    for done, place in enumerate(places.tolist(), 1):
        batch = planner([train[row] for row in steps[place]])
        alone, shared = alone + batch.example_tokens, shared + batch.tokens
        reporter.progress("lay out", done, len(places))
    reporter.finish("lay out")
    order = np.fromiter((row for step in steps for row in step), dtype=np.int64)
    every = int(train.tokens_alone()[order].sum())
    return {
        "rows": len(order),
        "rows_per_step": sampler.rows_per_step,
        "steps": len(steps),
        "total_steps": count_steps(config.training, len(steps)),
        "supervised_tokens": int(train.supervised()[order].sum()),
        "tokens_without_sharing": every,
        # What was not laid out shares as much as what was.
        "tokens_with_sharing": round(every * shared / max(alone, 1)),
        "laid_out_steps": len(places),
        "token_budget": planner.token_budget,
        "sampling": config.training.sampling,
    }
