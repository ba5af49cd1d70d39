"""The commands to begin with: `demo`, `recipes`, `init`, `schema`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from loralab.cli.application import print_json
from loralab.config.reference import render_reference
from loralab.config.schema import Config
from loralab.console import ConsoleReporter, ResultConsole
from loralab.options import AsJson, usable_path


def demo(
    output: Annotated[
        Path,
        typer.Option("--output", help="Run folder; replaced when it holds an earlier demo.", callback=usable_path),
    ] = Path("runs/demo"),
    vision: Annotated[bool, typer.Option("--vision", help="Questions about pictures, not about text.")] = False,
) -> None:
    """Run the whole pipeline on an embedded model and data set, offline, in about a minute."""
    from loralab.workflows.demo import run_demo

    folder, lines = run_demo(output, reporter=ConsoleReporter(), vision=vision)
    for line in lines:
        print(line)
    print(f"report: {folder.report.absolute()}")


def recipes(as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    from loralab.workflows.recipes import list_recipes

    found = list_recipes()
    if as_json:
        print_json(found)
        return
    table = Table("recipe", "what it does")
    for name, summary in found.items():
        table.add_row(name, summary)
    ResultConsole().print(table)


def init(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe; `loralab recipes` lists them.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", help="File to write; RECIPE.yaml by default.", callback=usable_path),
    ] = None,
) -> None:
    """Write a recipe as a commented YAML file."""
    from loralab.workflows.recipes import write_recipe

    path = write_recipe(recipe, output)
    print(f"wrote {path}; next: loralab train {path} data.train=YOUR_FILE")


def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables to read instead of the JSON schema.")] = False,
) -> None:
    """Print the JSON schema of the configuration, or a page with every setting."""
    if markdown:
        print(render_reference(), end="")
    else:
        print_json(Config.model_json_schema())
