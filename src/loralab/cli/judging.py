"""The command `judge`: a blind preference test in the browser, in the terminal or as a page for somebody else."""

import getpass
import os
import sys
import threading
import webbrowser
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loralab.cli.application import print_json
from loralab.cli.preference_text import print_preference
from loralab.config.paths import check_path
from loralab.console import ConsoleReporter
from loralab.errors import ConfigError, JudgingError, StorageError
from loralab.options import AsJson, RunPath, Split, usable_path

if TYPE_CHECKING:
    from loralab.judging.sitting import Sitting
    from loralab.workflows.judge import Compare, PreferenceTest


@dataclass(frozen=True, slots=True)
class _Ways:
    """What is asked of the command; at most one of these, and the page where there is none."""

    terminal: bool
    html: Path | None
    votes: list[Path] | None
    result: bool
    close: str | None

    @property
    def chosen(self) -> list[str]:
        given = {
            "--terminal": self.terminal,
            "--html": self.html is not None,
            "--import": bool(self.votes),
            "--result": self.result,
            "--close": self.close is not None,
        }
        return [name for name, there in given.items() if there]


def judge(
    run: RunPath,
    *,
    rater: Annotated[
        str | None, typer.Option("--rater", help="Who judges; the login name by default.", show_default=False)
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option("--examples", help="Most prompts, evenly spread; 30 by default.", show_default=False),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="File, saved data set or Hub id to compare on, instead of the run's.")
    ] = None,
    split: Split = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder of comparison, items and votes.", callback=usable_path),
    ] = None,
    new: Annotated[bool, typer.Option("--new", help="Begin a new test; the old one is kept beside it.")] = False,
    terminal: Annotated[bool, typer.Option("--terminal", help="Vote here, not in the browser.")] = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Write one page that works anywhere, for --rater NAME.", callback=usable_path),
    ] = None,
    votes: Annotated[
        list[Path] | None, typer.Option("--import", help="Take the votes that such a page saved; may be repeated.")
    ] = None,
    result: Annotated[bool, typer.Option("--result", help="Show the result of all closed sittings.")] = False,
    close: Annotated[
        str | None, typer.Option("--close", help="Close a rater's sitting as it is, and show the result.")
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", help="Port of the page; a free one by default.", min=1, max=65535)
    ] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the address, open no browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Judge blindly which answers are better, the base's or the adapter's, and test what the votes allow to say."""
    ways = _Ways(terminal, html, votes, result, close)
    opening = {"--examples": examples, "--data": data, "--split": split, "--new": new or None}
    _check_ways(ways, opening, rater=rater, page={"--port": port, "--no-browser": no_browser or None})
    from loralab.workflows.judge import JudgeRequest, load_test, open_test

    if votes or result or close is not None:
        _use_votes(load_test(run, output), ways, as_json=as_json)
        return
    name = _rater(rater)
    request = JudgeRequest(examples=examples, data=data, split=split, output=output, new=new)
    test = open_test(run, request, compare=_comparer(run), reporter=ConsoleReporter())
    if html is not None:
        _write_page(test, html, name, as_json=as_json)
        return
    _vote(test, name, _serving(port, no_browser) if not terminal else None, as_json=as_json)


def _check_ways(ways: _Ways, opening: Mapping[str, object], *, rater: str | None, page: Mapping[str, object]) -> None:
    """Refuse options that would have no effect together.

    Raises:
        ConfigError: there are some.
    """
    chosen = ways.chosen
    if len(chosen) > 1:
        raise ConfigError(
            f"{' and '.join(chosen)} together", where=f"options {', '.join(chosen)}", fix="give one of them"
        )
    way = chosen[0] if chosen else ""
    useless = [name for name, value in page.items() if value is not None and way]
    if way in ("--import", "--result", "--close"):
        useless += [name for name, value in {**opening, "--rater": rater}.items() if value is not None]
    if useless:
        raise ConfigError(f"{useless[0]} does nothing with {way}", where=f"option {useless[0]}", fix="leave it away")
    if way == "--html" and rater is None:
        raise ConfigError(
            "a page for somebody without a name",
            where="option --html",
            fix="give the name of who will judge: --rater NAME",
        )


def _rater(name: str | None) -> str:
    from loralab.judging.folder import check_rater

    if name is not None:
        return check_rater(name, where="option --rater")
    try:
        login = getpass.getuser()
    except (OSError, KeyError, ImportError):
        raise JudgingError(
            "the login name is not known", where="option --rater", fix="give a name: --rater NAME"
        ) from None
    return check_rater(login, where="the login name (option --rater takes another)")


def _comparer(run: Path) -> "Compare":
    """Return what compares where nothing is compared yet; only then torch is needed."""

    def compare(*, data: str | None, split: str | None, max_examples: int, output: Path | None) -> None:
        from loralab.options import option_overrides
        from loralab.workflows.compare import ComparisonRequest
        from loralab.workflows.compare import compare as run_comparison

        request = ComparisonRequest(data=data, split=split, max_examples=max_examples, output=output)
        own_split = split if data is None else None
        run_comparison(run, request, overrides=option_overrides(None, split=own_split), reporter=ConsoleReporter())

    return compare


def _use_votes(test: "PreferenceTest", ways: _Ways, *, as_json: bool) -> None:
    from loralab.judging.folder import check_rater
    from loralab.workflows.judge import close_sitting, import_votes

    if ways.votes:
        paths = [check_path(path, where="option --import") for path in ways.votes]
        taken = import_votes(test, paths, ConsoleReporter())
        if as_json:
            print_json({"imported": taken})
        return
    if ways.close is not None:
        close_sitting(test, check_rater(ways.close, where="option --close"))
    _show_result(test, as_json=as_json)


def _show_result(test: "PreferenceTest", *, as_json: bool) -> None:
    from loralab.workflows.judge_result import write_result

    result = write_result(test, ConsoleReporter())
    if as_json:
        print_json(result)
    else:
        print_preference(result)
    where = "; `loralab report` puts it on the run's page and model card" if test.place.exists() else ""
    ConsoleReporter().say(f"wrote {test.place.preference}{where}")


def _write_page(test: "PreferenceTest", path: Path, rater: str, *, as_json: bool) -> None:
    from loralab.judging.page import render_offline
    from loralab.run import write_text
    from loralab.workflows.judge import check_unvoted

    check_unvoted(test, rater)
    if not test.items.shown:
        raise JudgingError(
            f"nothing to vote on: all {len(test.items.items)} pairs of answers are the same text",
            where=str(test.place.comparison),
            fix="see the result: loralab judge RUN --result",
        )
    pairs = test.items.pairs_for(rater)
    text = render_offline(pairs, items_sha256=test.items.sha256, rater=rater, title=_title(test))
    try:
        write_text(path, text)
    except OSError as error:
        raise StorageError(
            f"cannot write the page: {error.strerror or error}", where=str(path), fix="name another file with --html"
        ) from None
    test.folder.await_votes(test.items, rater)
    if as_json:
        print_json({"page": str(path), "rater": rater, "pairs": len(pairs), "items_sha256": test.items.sha256})
    else:
        print(path)
    ConsoleReporter().say(f"{len(pairs)} pairs for {rater}; take what the page saves with --import FILE")


def _title(test: "PreferenceTest") -> str:
    return f"Which answer is better? {test.name}"


def _serving(port: int | None, no_browser: bool) -> Callable[["PreferenceTest", "Sitting"], None]:
    """Return what holds a sitting in the browser."""

    def serve(test: "PreferenceTest", sitting: "Sitting") -> None:
        from loralab.judging.server import serve_sitting
        from loralab.workflows.judge_result import reveal

        def show(address: str) -> None:
            ConsoleReporter().say(f"{sitting.rater} judges at {address}  (Ctrl-C ends; what is judged is kept)")
            if not no_browser:
                open_page(address)

        serve_sitting(sitting, title=_title(test), port=port, on_ready=show, result=lambda: reveal(test, sitting.rater))

    return serve


def open_page(address: str) -> None:
    """Open the page in a browser with windows, if there is one; the address was printed anyway.

    Args:
        address: of the page.
    """
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return
    # A browser in the terminal would take it over, and cannot run the page; one that the user names is theirs to judge.
    if type(browser) is webbrowser.GenericBrowser and not os.environ.get("BROWSER"):
        return
    threading.Thread(target=browser.open, args=(address,), daemon=True).start()


def _vote(
    test: "PreferenceTest", rater: str, serve: Callable[["PreferenceTest", "Sitting"], None] | None, *, as_json: bool
) -> None:
    """Hold a rater's sitting; show the result where it is closed at the end."""
    from loralab.cli.voting import vote_in_terminal

    say = ConsoleReporter().say
    if not test.items.shown:
        say("all pairs of answers are the same text: there is nothing to vote on")
        _show_result(test, as_json=as_json)
        return
    with test.folder.open_sitting(test.items, rater) as sitting:
        if sitting.closed:
            raise JudgingError(
                f"the sitting of {rater!r} is closed",
                where=str(test.folder.votes_file(rater)),
                fix="see the result with --result; somebody else may judge (--rater NAME)",
            )
        if serve is not None:
            serve(test, sitting)
        else:
            vote_in_terminal(sitting, screen=sys.stderr if as_json else None)
        closed, done = sitting.closed, len(sitting.answers)
    if closed:
        _show_result(test, as_json=as_json)
        return
    say(f"{done} of {len(test.items.shown)} pairs judged; the same command goes on")
    if as_json:
        print_json({"rater": rater, "votes": done, "pairs": len(test.items.shown), "closed": False})
