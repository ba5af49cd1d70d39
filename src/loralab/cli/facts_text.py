"""Titled lists of facts on a terminal, as `inspect` and `plan` show them."""

from collections.abc import Mapping

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from loralab.console import printable

INDENT = 2


def print_facts(console: Console, title: str, facts: Mapping[str, str]) -> None:
    """Print a title and under it names with their values.

    Args:
        console: where to.
        title: of the list.
        facts: value by name, in order.
    """
    console.print(Text(f"--- {title}", style="bold"))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(Text(printable(name)), Text(printable(value)))
    console.print(Padding(table, (0, 0, 0, INDENT), expand=False))
