"""What `doctor` shows on a terminal: facts by topic, then what was found, each with its fix."""

from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from loralab.console import printable
from loralab.doctor.findings import SEVERITIES, render_bytes

_STYLES = {"problem": "bold red", "warning": "yellow", "note": "cyan"}
_INDENT = 2
# A section with more facts than this (the libraries) is shown as running text.
_MANY = 12


def print_diagnosis(console: Console, result: dict[str, Any]) -> None:
    """Print sections and findings.

    Args:
        console: where to.
        result: of the workflow.
    """
    for section in result["sections"]:
        if not section["facts"]:
            continue
        console.print(Text(f"--- {section['name']}", style="bold"))
        if len(section["facts"]) > _MANY:
            listed = ", ".join(f"{name} {value}" for name, value in section["facts"].items())
            console.print(Padding(Text(printable(listed)), (0, 0, 0, _INDENT), expand=False))
            continue
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in section["facts"].items():
            table.add_row(name.removesuffix("_bytes").replace("_", " "), Text(printable(_render(name, value))))
        console.print(Padding(table, (0, 0, 0, _INDENT), expand=False))
    console.print()
    for finding in result["findings"]:
        print_finding(console, finding)
    console.print(Text(_summary(result), style="bold"))


def print_finding(console: Console, finding: dict[str, Any]) -> None:
    """Print one finding, its reason and its fix.

    Args:
        console: where to.
        finding: with `severity`, `what`, `why` and `fix`.
    """
    head = Text(f"{finding['severity']}: ", style=_STYLES[finding["severity"]])
    head.append(printable(finding["what"]), style="bold")
    console.print(head, overflow="fold")
    for label in ("why", "fix"):
        console.print(
            Padding(Text(f"{label}: {printable(finding[label])}", overflow="fold"), (0, 0, 0, _INDENT), expand=False)
        )


def _render(name: str, value: Any) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return render_bytes(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_render(key, each)}" for key, each in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _summary(result: dict[str, Any]) -> str:
    counts = dict.fromkeys(SEVERITIES, 0)
    for finding in result["findings"]:
        counts[finding["severity"]] += 1
    listed = ", ".join(f"{count} {severity}{'' if count == 1 else 's'}" for severity, count in counts.items())
    proven = sum(step["passed"] for step in result["steps"])
    steps = f"; {proven} of {len(result['steps'])} steps right" if result["steps"] else "; no step was run"
    return f"{listed}{steps}"
