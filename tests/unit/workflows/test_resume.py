"""The contract of a resume: each change is named once, by its cause, with both values."""

from pathlib import Path
from typing import Any

import pytest

from loralab.errors import RunFolderError
from loralab.training.checkpoint import Checkpoint
from loralab.workflows.resume import check_contract, contract_changes

ONE, TWO = "1" * 64, "2" * 64
CONTRACT: dict[str, Any] = {
    "data.rows": ONE,
    "data.max_length": "128",
    "data.stop_token_ids": "[0]",
    "data.stop_tokens": '["<|end|>"]',
    "data.template": {"is": ONE, "shown": "alpaca"},
    "data.tokenizer": ONE,
    "data.tokens of train": ONE,
    "model weights": ONE,
    "training.seed": 1,
}
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, ""),
    "one setting": ({"training.seed": 2}, "training.seed was 1, now 2"),
    "two": (
        {"training.seed": 2, "model weights": TWO},
        "model weights was sha256 111111111111.., now sha256 222222222222..; training.seed was 1, now 2",
    ),
    "gone": ({"training.seed": None}, "training.seed was 1, now None"),
    "new": ({"lora.rank": 3}, "lora.rank was None, now 3"),
    "template": (
        {"data.template": {"is": TWO, "shown": "none"}, "data.tokens of train": TWO},
        "data.template was 'alpaca', now 'none'",
    ),
    "template of the same name": (
        {"data.template": {"is": TWO, "shown": "alpaca"}},
        "data.template was 'alpaca' (sha256 111111111111..), now 'alpaca' (sha256 222222222222..)",
    ),
    "template by another name": ({"data.template": {"is": ONE, "shown": "/a/alpaca.jinja"}}, ""),
    "rows": (
        {"data.rows": TWO, "data.tokens of train": TWO},
        "data.rows was sha256 111111111111.., now sha256 222222222222..",
    ),
    "rows of the same tokens": ({"data.rows": TWO}, ""),
    "stop token": (
        {"data.stop_tokens": '["!"]', "data.stop_token_ids": "[5]", "data.tokens of train": TWO},
        """data.stop_tokens was '["<|end|>"]', now '["!"]'""",
    ),
    "limit that cuts no row": ({"data.max_length": "64"}, "data.max_length was '128', now '64'"),
    "tokens without a cause": (
        {"data.tokens of train": TWO},
        "data.tokens of train was sha256 111111111111.., now sha256 222222222222..",
    ),
    "tokens beside a setting": (
        {"data.tokens of train": TWO, "training.seed": 2},
        "data.tokens of train was sha256 111111111111.., now sha256 222222222222..; training.seed was 1, now 2",
    ),
}


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
def test_changes_are_named_by_their_cause(change: dict[str, Any], said: str) -> None:
    assert "; ".join(contract_changes(CONTRACT, {**CONTRACT, **change})) == said


def test_changed_contract_is_refused(tmp_path: Path) -> None:
    check_contract(Checkpoint(tmp_path, 1, CONTRACT), dict(reversed(CONTRACT.items())))
    with pytest.raises(RunFolderError) as caught:
        check_contract(Checkpoint(tmp_path, 1, CONTRACT), CONTRACT | {"training.seed": 2})
    (problem,) = caught.value.problems
    assert problem.what == "cannot resume, the run has changed: training.seed was 1, now 2"
    assert problem.where == str(tmp_path)
    assert "--warm-start" in problem.fix
