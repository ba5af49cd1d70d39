"""The HTML pages: one self-contained file each, nothing loaded from anywhere.

Owns rendering (autoescaped, no network, safe for any text a model may write) and the page of a
run. What the page says is made in `sections.py`.
"""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from loralab.reports.facts import load_facts
from loralab.reports.sections import report_context
from loralab.run import RunFolder, write_text

TEMPLATE = "report.html.jinja"
# Control characters are no text in HTML: browsers drop or replace them. Their pictures can be seen.
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n\r"} | {127: 0x2421}


def render_page(template_name: str, context: Mapping[str, Any]) -> str:
    """Render a page template of this package.

    Args:
        template_name: file beside this module; it extends `page.html.jinja`.
        context: the template's variables; a missing one is an error.

    Returns:
        The page; every value in it is escaped and can be written as UTF-8.
    """
    text = show_controls(_environment().get_template(template_name).render(context))
    # A token cut in the middle of a character may leave half of a surrogate pair, which UTF-8 has no bytes for.
    return text.encode("utf-8", "replace").decode("utf-8")


def show_controls(text: str) -> str:
    """Return a text with a picture in the place of each control character, tabs and line ends left as they are."""
    return text.translate(_CONTROL_PICTURES)


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("loralab", "reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def write_report(folder: RunFolder) -> Path:
    """Write `report.html`; what the run folder lacks, the page says.

    Raises:
        RunFolderError: a file of the run is there but broken.
    """
    context = report_context(load_facts(folder), picture=embed_picture)
    write_text(folder.report, render_page(TEMPLATE, context))
    return folder.report


def embed_picture(path: Path) -> str | None:
    """Return a PNG file as a data URI, or None where there is no such file."""
    if not path.is_file():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
