"""Processes of one run that would train something else are refused, by all of them alike."""

from dataclasses import dataclass
from typing import Any

import pytest

from loralab.config.schema import Config
from loralab.errors import ConfigError
from loralab.training.distributed import ALONE
from loralab.workflows.same_start import check_same_contract, check_same_settings


@dataclass(frozen=True)
class Others:
    """Three processes, of which the last one has something else."""

    changes: dict[str, Any]
    count: int = 3

    def gather(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        return [value, dict(value), {**value, **self.changes}]


def config() -> Config:
    return Config.model_validate({"model": {"name": "base"}, "data": {"train": "rows.json"}})


def test_alike() -> None:
    same: Any = Others({})
    for processes in (ALONE, same):
        check_same_settings(config(), processes)
        check_same_contract({"data.rows": "a"}, processes)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"training.save_steps": 7}, "training.save_steps is 500, there 7"),  # who saves waits for the others
        ({"data.columns": {"a": "b"}}, "data.columns is {}, there {'a': 'b'}"),
        ({"version of torch": "1.0"}, "version of torch is "),
    ],
)
def test_other_settings(changes: dict[str, Any], what: str) -> None:
    other: Any = Others(changes)
    with pytest.raises(ConfigError) as caught:
        check_same_settings(config(), other)
    problem = caught.value.problems[0]
    assert problem.what.startswith(f"process 2 would train something else than process 0: {what}")
    assert problem.where == "process 2 of 3"


def test_other_files() -> None:
    other: Any = Others({"model weights": "b" * 64})
    with pytest.raises(ConfigError) as caught:
        check_same_contract({"model weights": "a" * 64}, other)
    assert "model weights is sha256 aaaaaaaaaaaa.., there sha256 bbbbbbbbbbbb.." in caught.value.problems[0].what
