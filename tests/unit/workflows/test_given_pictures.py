"""Pictures that a user names by hand: found from the current folder or anywhere, or told why they are none."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loralab.data.example import ImagePart
from loralab.errors import DataError, ModelError
from loralab.workflows.given_pictures import check_sight, look_at_given
from loralab.workflows.prompts import user_turn
from support.tiny_vision import draw_picture


def test_paths_start_from_the_current_folder_and_may_lead_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    paths = [draw_picture(here / "a b.png", 1), draw_picture(tmp_path / "other.png", 2, size=(20, 10))]
    first, second, third = look_at_given(["a b.png", "../other.png", str(paths[1])], where="option --image")
    assert (first.path, first.width, first.height) == (str(paths[0].resolve()), 48, 32)
    assert second == third
    assert (second.width, second.height) == (20, 10)


@pytest.mark.parametrize("name", ["missing.png", "", "a\0b", "~nobody-of-this-name/x.png", "."])
def test_what_is_no_picture_file_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        look_at_given([name], where="option --image")
    (problem,) = caught.value.problems
    assert problem.where == "option --image"
    assert re.search("no such file|a folder|empty path", problem.what)


def test_a_model_that_reads_no_pictures_is_named() -> None:
    blind: Any = SimpleNamespace(pictures=None)
    with pytest.raises(ModelError, match="this model reads none"):
        check_sight(blind, where="/image")


def test_pictures_stand_before_the_text(tmp_path: Path) -> None:
    files = look_at_given([str(draw_picture(tmp_path / "a.png", 1))], where="x")
    turn = user_turn("what?", files)
    assert turn.content == "what?"
    assert turn.parts == (ImagePart(files[0].path, files[0]), "what?")
    assert user_turn("what?", ()).parts == ()
