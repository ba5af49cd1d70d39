"""Which browser `judge` opens, and names that are not known."""

import getpass
import threading
import webbrowser
from pathlib import Path

import pytest

from loralab.cli import judging
from support.command import read_problems, run_here
from support.preference_tests import write_run


class _Windowed(webbrowser.BaseBrowser):
    def __init__(self) -> None:
        super().__init__("windowed")
        self.opened: list[str] = []
        self.done = threading.Event()

    def open(self, url: str, new: int = 0, autoraise: bool = True) -> bool:
        self.opened.append(url)
        self.done.set()
        return True


def _never(_address: str) -> bool:
    raise AssertionError("the terminal was taken over")


def test_browser_with_windows_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    browser = _Windowed()
    monkeypatch.setattr(webbrowser, "get", lambda: browser)
    judging.open_page("http://127.0.0.1:1/x/")
    assert browser.done.wait(10)
    assert browser.opened == ["http://127.0.0.1:1/x/"]


def test_browser_in_the_terminal_is_not_opened_unless_it_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BROWSER", raising=False)
    browser = webbrowser.GenericBrowser("w3m")
    monkeypatch.setattr(webbrowser, "get", lambda: browser)
    monkeypatch.setattr(browser, "open", _never)
    judging.open_page("http://127.0.0.1:1/x/")
    opened = threading.Event()
    monkeypatch.setenv("BROWSER", "w3m")
    monkeypatch.setattr(browser, "open", lambda _address: opened.set())
    judging.open_page("http://127.0.0.1:1/x/")
    assert opened.wait(10)


def test_no_browser_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> webbrowser.BaseBrowser:
        raise webbrowser.Error("none")

    monkeypatch.setattr(webbrowser, "get", none)
    judging.open_page("http://127.0.0.1:1/x/")


def test_login_name_that_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", 2)

    def unknown() -> str:
        raise KeyError("uid")

    monkeypatch.setattr(getpass, "getuser", unknown)
    (problem,) = read_problems(run_here("judge", run.path, "--terminal"))
    assert (problem.what, problem.fix) == ("the login name is not known", "give a name: --rater NAME")
    monkeypatch.setattr(getpass, "getuser", lambda: "DOMAIN\\anna")
    (problem,) = read_problems(run_here("judge", run.path, "--terminal"))
    assert problem.what == "not a rater's name: 'DOMAIN\\\\anna'"
    assert "option --rater takes another" in problem.where


def test_page_without_a_pair_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2, same=2)
    (problem,) = read_problems(run_here("judge", run.path, "--html", tmp_path / "p.html", "--rater", "anna"))
    assert problem.what == "nothing to vote on: all 2 pairs of answers are the same text"
    assert not (tmp_path / "p.html").exists()
