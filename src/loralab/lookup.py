"""Table look-up with "did you mean".

Owns the wording for a name that is not in a table; the tables live with what they hold.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from loralab.errors import ConfigError

Entry = TypeVar("Entry")


def nearest_name(name: str, known: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """Return the known name most like `name`, or None where none is as near as `cutoff` (1: equal)."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return close[0] if close else None


def suggest(name: str, known: Iterable[str]) -> str:
    """Return a sentence that names the nearest known name and lists all of them."""
    names = list(known)
    near = nearest_name(name, names)
    listing = ", ".join(names) if names else "(none)"
    hint = f"did you mean {near!r}? " if near else ""
    return f"{hint}known: {listing}"


def look_up(table: Mapping[str, Entry], name: str, *, kind: str, where: str) -> Entry:
    """Return `table[name]`.

    Args:
        table: the entries by name.
        name: the name asked for.
        kind: what the table holds, in the singular ("recipe").
        where: the key or argument that gave the name.

    Raises:
        ConfigError: `name` is not in the table; the nearest name is suggested.
    """
    if name in table:
        return table[name]
    raise ConfigError(f"no such {kind}: {name!r}", where=where, fix=suggest(name, table))
