"""The voting page, live or as one file for somebody else: the same looks and the same program in both.

Owns what the page is given. It is made of blind pairs alone, so that nothing in it can tell which side is which: not
an id, an order, an address or a word. Looks and program lie in `reports/judging/`.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from loralab.judging.sitting import BlindPair
from loralab.judging.votes import LONGEST_SECONDS, VERSION
from loralab.reports.html import render_page, show_controls

TEMPLATE = "judging/page.html.jinja"
# One program, in this order.
_SCRIPTS = ("start.js", "differences.js", "votes.js", "pair.js", "end.js", "controls.js")
_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
# What would end the element that the data lies in.
_IN_SCRIPT = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}


@dataclass(frozen=True, slots=True)
class Page:
    """A page and what it may do.

    Attributes:
        text: HTML.
        policy: its content security policy.
    """

    text: str
    policy: str


def render_live(
    pairs: Sequence[BlindPair], *, rater: str, title: str, answers: Mapping[str, str], closed: bool
) -> Page:
    """Return the page that a server sends; votes go back to it.

    Args:
        pairs: in the rater's order.
        rater: name of the rater.
        title: what the page is called.
        answers: the choice that counts now, by item.
        closed: whether the sitting is over.
    """
    given = {
        "mode": "live",
        "answers": dict(answers),
        "closed": closed,
        "pictures": [f"pictures/{number}" for number in range(len(shown_pictures(pairs)))],
        **_given(pairs, rater=rater, title=title),
    }
    policy = f"{_policy('self')}; connect-src 'self'; frame-ancestors 'none'"
    return Page(_render(given, title=title, policy=None), policy)


def render_offline(pairs: Sequence[BlindPair], *, items_sha256: str, rater: str, title: str) -> str:
    """Return the page as one file that needs no network; the rater saves the votes and sends them back.

    Args:
        pairs: in the rater's order.
        items_sha256: of the item set; the saved votes carry it.
        rater: name of the rater.
        title: what the page is called.
    """
    given = {
        "mode": "offline",
        "version": VERSION,
        "items_sha256": items_sha256,
        "pictures": [_data_uri(path) for path in shown_pictures(pairs)],
        **_given(pairs, rater=rater, title=title),
    }
    return _render(given, title=title, policy=_policy("data"))


def shown_pictures(pairs: Sequence[BlindPair]) -> tuple[Path, ...]:
    """Return the pictures of all pairs, each once; the page names them by their place here."""
    return tuple(dict.fromkeys(path for pair in pairs for path in pair.pictures))


def picture_type(data: bytes) -> str | None:
    """Return the media type of a picture that pages may show, by its first bytes; None for anything else."""
    return next((kind for signature, kind in _SIGNATURES.items() if data.startswith(signature)), None)


def _given(pairs: Sequence[BlindPair], *, rater: str, title: str) -> dict[str, Any]:
    numbers = {path: number for number, path in enumerate(shown_pictures(pairs))}
    return {
        "title": show_controls(title),
        "rater": rater,
        "longest_seconds": LONGEST_SECONDS,
        "pairs": [
            {
                "item": pair.item,
                "prompt": show_controls(pair.prompt),
                "left": show_controls(pair.left),
                "right": show_controls(pair.right),
                "pictures": [numbers[path] for path in pair.pictures],
            }
            for pair in pairs
        ],
    }


def _data_uri(path: Path) -> str | None:
    """Return a picture as a data URI; None where it is gone, which the page then says."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    kind = picture_type(data)
    return None if kind is None else f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _render(given: Mapping[str, Any], *, title: str, policy: str | None) -> str:
    # With every character beyond ASCII escaped, half of a surrogate pair does no harm either.
    data = json.dumps(given, separators=(",", ":")).translate(_IN_SCRIPT)
    # The template marks style, script and data as safe: the first two are our own files, the third is escaped.
    context = {
        "title": title,
        "policy": policy,
        "style": _style(),
        "script": _script(),
        "given": data,
    }
    return render_page(TEMPLATE, context)


def _policy(pictures: str) -> str:
    """Return a policy that runs this page's own program and style and nothing else, by their hashes.

    Args:
        pictures: where pictures come from: `self` for the server, `data` for the page itself.
    """
    sources = "'self' data: blob:" if pictures == "self" else "data:"
    return (
        f"default-src 'none'; script-src '{_hash(_script())}'; style-src '{_hash(_style())}'; img-src {sources}; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    """Return the hash of an element's text as a policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


@cache
def _style() -> str:
    return f"\n{_read('palette.css')}{_read('judging/page.css')}"


@cache
def _script() -> str:
    parts = "\n".join(_read(f"judging/{name}") for name in _SCRIPTS)
    return f'\n"use strict";\n(() => {{\n{parts}}})();\n'


def _read(name: str) -> str:
    return files("loralab.reports").joinpath(name).read_text(encoding="utf-8")
