"""The command `preview`: rows, data report and findings on the terminal, as JSON or as a page."""

from pathlib import Path
from typing import Annotated

import typer

from loralab.cli.application import print_json
from loralab.cli.preview_text import print_preview
from loralab.console import ConsoleReporter, ResultConsole
from loralab.options import AsJson, Overrides, usable_path


def preview(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, or a run folder.", callback=usable_path)],
    overrides: Overrides = None,
    *,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Rows to show, from the beginning of the split.")] = 3,
    row: Annotated[
        list[str] | None,
        typer.Option("--row", metavar="ROW", help="Show this row, by number or FILE:NUMBER; may be repeated."),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Split that --rows are taken from.")] = "train",
    prove: Annotated[
        int | None,
        typer.Option("--prove", min=1, help="Prove so many rows, spread over all; by default every row."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write everything as a page.", callback=usable_path)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show rows as tokens, report on the data, and prove every mask; exit 3 where a proof fails."""
    from loralab.workflows.configure import load_run_config

    chosen, source, adapter = list(overrides or []), config, None
    if (config / "config.yaml").is_file():  # a run folder, which may have been moved or copied
        source, adapter = config / "config.yaml", config / "adapter"
    loaded = load_run_config(source, chosen)
    from loralab.workflows.preview import PreviewRequest, check_preview
    from loralab.workflows.preview import preview as run_preview

    reporter = ConsoleReporter()
    request = PreviewRequest(rows=rows, named=row or (), split=split, prove=prove)
    result = run_preview(loaded, request, reporter=reporter, adapter=adapter)
    if html is not None:
        from loralab.reports.preview_page import write_preview
        from loralab.workflows.thumbnails import preview_pictures

        reporter.say(f"wrote {write_preview(html, result, preview_pictures(result))}")
    if as_json:
        print_json(result)
    else:
        print_preview(ResultConsole(highlight=False), result)
    check_preview(result, loaded.config)
