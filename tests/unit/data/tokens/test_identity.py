"""What a cache entry's name is made of: everything that decides on tokens, and nothing else."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loralab.data.reading.sources import Source
from loralab.data.tokens import identity
from loralab.data.tokens.identity import code_version, describe_entry, entry_key
from loralab.data.tokens.pipeline import RowTokenizer
from loralab.data.tokens.tokenize import TokenizeSettings
from unit.data.prompters import CHATML, NO_PICTURES, build_prompter

FOLDER = Path(identity.__file__).parent.parent
# What everybody would look for in the code's version, and what has no place there.
DECIDING = (
    "example",
    "formats/chat",
    "formats/table",
    "prompts/encoding",
    "prompts/prompter",
    "prompts/turns",
    "reading/json_rows",
    "reading/readers",
    "reading/rows",
    "tokens/packing",
    "tokens/store",
    "tokens/tokenize",
)
REPORTING = (
    "dataset",
    "proofs/prove",
    "prompts/contract",
    "split_report",
    "splits",
    "tokens/cache",
    "tokens/identity",
    "tokens/staging",
)


def build_worker(template: str = CHATML, format_name: str = "alpaca", **columns: str) -> RowTokenizer:
    settings = TokenizeSettings("response", 64, "right", "split")
    return RowTokenizer(build_prompter(template), format_name, columns, settings, "error", NO_PICTURES)


def source(fingerprint: str) -> Source:
    return Source("name", fingerprint, lambda start: iter(()))


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package that may be changed."""
    shutil.copytree(FOLDER, tmp_path / "data")
    return tmp_path / "data"


def test_code_version_is_of_the_modules_that_decide_on_tokens(package: Path) -> None:
    before = code_version(package)
    versions = [before]
    for name in (*DECIDING, *REPORTING):
        path = package / f"{name}.py"
        path.write_text(path.read_text() + "# changed\n")
        code_version.cache_clear()
        versions.append(code_version(package))
        assert (versions[-1] == versions[-2]) == (name in REPORTING), name


def test_a_new_module_counts_as_soon_as_one_that_counts_imports_it(package: Path) -> None:
    versions = []
    turns = package / "prompts" / "turns.py"
    for number, (text, line) in enumerate(
        [("1", ""), ("2", ""), ("2", "from loralab.data.prompts import new"), ("3", "")]
    ):
        (package / "prompts" / "new.py").write_text(text)
        turns.write_text(f"{turns.read_text()}{line}\n" if line else turns.read_text())
        code_version.cache_clear()
        versions.append(code_version(package))
        assert len(set(versions)) == (1, 1, 2, 3)[number]


def test_sources_that_differ_are_told_apart() -> None:
    alpaca, text = build_worker(), build_worker(format_name="text")
    mapped = build_worker(output="answer")
    one, two = source("1"), source("2")
    keys: dict[str, Any] = {
        "one": describe_entry([one], [alpaca]),
        "rows": describe_entry([two], [alpaca]),
        "both": describe_entry([one, two], [alpaca, alpaca]),
        "order": describe_entry([two, one], [alpaca, alpaca]),
        "formats": describe_entry([one, two], [alpaca, text]),
        "swapped": describe_entry([one, two], [text, alpaca]),
        "columns": describe_entry([one, two], [alpaca, mapped]),
        "template": describe_entry([one], [build_worker(CHATML + " ")]),
        "dropping": describe_entry([one], [replace(alpaca, on_bad_row="drop")]),
    }
    assert len({entry_key(parts) for parts in keys.values()}) == len(keys)
    assert (keys["both"]["format"], keys["formats"]["format"]) == ("alpaca", "alpaca, text")
    assert keys["columns"]["columns"] == '{}, {"output": "answer"}'


@pytest.mark.parametrize("name", ["tokenizers", "transformers", "jinja2"])
def test_versions_of_libraries_count(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = describe_entry([source("1")], [build_worker()])
    version = identity.importlib.metadata.version
    monkeypatch.setattr(identity.importlib.metadata, "version", lambda of: "0" if of == name else version(of))
    after = describe_entry([source("1")], [build_worker()])
    assert [part for part in before if before[part] != after[part]] == [name]
