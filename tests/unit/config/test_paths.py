"""Paths that cannot be one: each is a finding at its key, and none is a traceback."""

import pwd
import re
from pathlib import Path
from typing import Any

import pytest

from loralab.config.load import load_config
from loralab.config.paths import check_path, local_path, path_problem
from loralab.errors import ConfigError, Problem
from loralab.workflows.configure import load_run_config

IMPOSSIBLE = {
    "null": ("a\0b", "null byte in the path"),
    "user": ("~nosuchuser/x", "cannot expand '~nosuchuser/x'"),
    "name": (f"some/{'n' * 300}/x", "name of 300 bytes in the path"),
    "letters": ("ü" * 200, "name of 400 bytes in the path"),
    "path": ("/" + "ab/" * 2000, "path of 6000 bytes"),
    "surrogate": ("a\udcffb", "UTF-8|unicode"),
}
KEYS = ("model.name", "data.train", "data.validation", "data.test", "data.template", "data.cache_dir", "output.dir")


def problems(**changed: Any) -> list[Problem]:
    values = {"model.name": "m", "data.train": "f", **changed}
    with pytest.raises(ConfigError) as caught:
        load_run_config(None, values)
    return list(caught.value.problems)


@pytest.mark.parametrize(("text", "what"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
@pytest.mark.parametrize("key", KEYS)
def test_impossible_path_is_a_finding(text: str, what: str, key: str) -> None:
    (problem,) = problems(**{key: text})
    assert re.search(what, problem.what)
    assert problem.where.endswith(f"key {key}")
    assert len(problem.render().splitlines()) == 3


def test_every_name_of_a_list_is_looked_at() -> None:
    assert len(problems(**{"data.train": ["a", "b\0", "~nosuchuser/c"]})) == 2


@pytest.mark.parametrize("text", ["a", "a/b.json", "~", "~/x", ".", "owner/name", "data/*.jsonl", "n" * 255, "ü" * 127])
def test_possible_paths(text: str) -> None:
    assert path_problem(text) is None
    assert local_path(text) == Path(text).expanduser()
    assert check_path(Path(text), where="here") == Path(text)


def test_circle_of_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "a")
    assert path_problem(str(tmp_path / "a")) is not None


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(ConfigError) as caught:
        check_path(Path("~/x"), where="option --output")
    (problem,) = caught.value.problems
    assert "cannot expand '~/x'" in problem.what
    assert "HOME" in problem.fix


def test_revision_of_a_local_folder(tmp_path: Path) -> None:
    (problem,) = problems(**{"model.name": str(tmp_path), "model.revision": "v1"})
    assert problem.what == "revision 'v1' of a local folder, which has only one"
    assert load_config(None, {"model.name": "owner/name", "model.revision": "v1", "data.train": "f"})
