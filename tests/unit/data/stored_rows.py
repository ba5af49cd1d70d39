"""Rows as they are stored, made in memory and spoilt on purpose, and what their proofs say."""

from typing import Any

import numpy as np
import pytest

from loralab.data.example import Branch, Example
from loralab.data.prompts.prompter import Prompter
from loralab.data.proofs.findings import Finding, Findings, check_findings
from loralab.data.proofs.prove import Prover, StoredRow
from loralab.data.tokens.tokenize import TokenizeSettings, tokenize_examples
from loralab.errors import MaskError
from unit.data.prompters import CHATML, build_prompter

CHAT = build_prompter(CHATML)


def settings(**chosen: Any) -> TokenizeSettings:
    return TokenizeSettings(
        **{"train_on": "response", "max_length": 512, "truncation": "right", "long_text": "split", **chosen}
    )


def stored(example: Example, prompter: Prompter, **chosen: Any) -> StoredRow:
    (units,) = tokenize_examples([example], prompter=prompter, settings=settings(**chosen))
    assert all(unit.dropped is None for unit in units), [unit.dropped for unit in units]
    return StoredRow("rows.jsonl", 7, example, tuple(tuple(unit.branches) for unit in units))


def changed(row: StoredRow, *branches: tuple[Any, Any]) -> StoredRow:
    """Return the row with other branches stored."""
    unit = tuple(Branch(np.asarray(prompt, np.int32), np.asarray(answer, np.int32)) for prompt, answer in branches)
    return StoredRow(row.source, row.row, row.example, (unit,), twin=row.twin, longest=row.longest)


def prove(row: StoredRow, prompter: Prompter = CHAT, *, own: Prompter | None = None, **chosen: Any) -> list[Finding]:
    return Prover(prompter, settings(**chosen), own=own).prove([row])


def kinds(found: list[Finding]) -> list[str]:
    assert all((finding.source, finding.row) == ("rows.jsonl", 7) for finding in found)
    return [finding.kind for finding in found]


def failure(found: list[Finding]) -> MaskError:
    """Return the error that findings end in; its message names row and fix."""
    findings = Findings()
    findings.add(found)
    with pytest.raises(MaskError) as caught:
        check_findings(findings.as_list())
    for problem in caught.value.problems:
        assert "rows.jsonl row 7" in problem.where
        assert problem.fix
    return caught.value
