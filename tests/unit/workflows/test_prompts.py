"""Prompts of all origins, and those that are no text."""

import io
from pathlib import Path

import pytest

from loralab.errors import DataError
from loralab.workflows.prompts import check_texts, read_prompts


def test_options_then_file_then_input(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("b\n\nc\n")
    assert read_prompts(["a"], file, io.StringIO("unread")) == ["a", "b", "c"]
    assert read_prompts(["a"], None, io.StringIO("unread")) == ["a"]
    assert read_prompts([], None, io.StringIO("d\ne\n")) == ["d\ne"]
    assert read_prompts([""], None, None) == [""]


def test_input_of_another_encoding() -> None:
    stdin = io.TextIOWrapper(io.BytesIO("größe".encode("latin-1")), encoding="utf-8")
    with pytest.raises(DataError, match="the prompt is not utf-8 text") as caught:
        read_prompts([], None, stdin)
    assert caught.value.problems[0].where == "standard input"


def test_bytes_that_are_no_text() -> None:
    for read in (lambda: read_prompts(["a", "x\udce9"], None, None), lambda: check_texts(["a", "x\udce9"])):
        with pytest.raises(DataError, match="not UTF-8 text: 'x") as caught:
            read()
        assert caught.value.problems[0].where == "prompt 2, character 2"
        assert str(caught.value).encode()
    check_texts(["größe 世界 👋", ""], "s")
