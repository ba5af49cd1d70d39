"""Bars of other libraries stay out of what is said; their words do not."""

import sys

import pytest
from tqdm.auto import tqdm

from loralab.models.quiet_loading import without_bars


def test_bars_go_and_lines_stay(capsys: pytest.CaptureFixture[str]) -> None:
    with without_bars():
        for _ in tqdm(range(3), desc="Converting"):
            pass
        print("a word", file=sys.stderr)
    assert capsys.readouterr().err == "a word\n"


def test_lines_come_out_where_the_work_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with without_bars():
            print("a word", file=sys.stderr)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()
    assert capsys.readouterr().err == "a word\n"
