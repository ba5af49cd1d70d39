"""The command that shares: `push`."""

from pathlib import Path
from typing import Annotated

import typer

from loralab.cli.application import print_json
from loralab.console import ConsoleReporter
from loralab.options import AsJson, usable_path


def push(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="Run folder, adapter folder, or a folder that `loralab merge` wrote.",
            callback=usable_path,
        ),
    ],
    *,
    repo: Annotated[
        str | None,
        typer.Option(
            "--repo",
            help="OWNER/NAME, or NAME below your own; by default the run's output.hub.repo, else {user}/{run}.",
        ),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Visibility where the repository is made; by default the run's, else private."
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision", help="Branch to push to, made where it does not exist; by default the repository's own."
        ),
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of changing the branch.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the weights of another run in that repository.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Push an adapter or a merged model to the Hub, with its card, and verify that it arrived.

    Example: loralab push runs/price --repo price-adapter
    """
    from loralab.workflows.first_look import check_run

    check_run(run, merged=True)
    from loralab.workflows.push import PushRequest
    from loralab.workflows.push import push as run_push

    request = PushRequest(repo, private, revision, create_pr, overwrite)
    result = run_push(run, request, reporter=ConsoleReporter())
    if as_json:
        print_json(result)
    else:
        print(result["url"])
