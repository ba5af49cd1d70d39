"""Which group each measured row belongs to: by a column of its source, read again, or by its reference.

Owns the values of `evaluation.group_by`. What is measured of a group is `evaluation/groups.py`'s.
"""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from loralab.data.dataset import PreparedData
from loralab.data.reading.json_rows import parse_row
from loralab.data.reading.rows import Row
from loralab.data.tokens.store import TokenStore
from loralab.errors import ConfigError, DataError
from loralab.evaluation.answers import Question
from loralab.lookup import suggest
from loralab.models.precision import Resolved

_KEY = "key evaluation.group_by"
# By this name, rows without such a column are grouped by what their answers are.
ANSWER_TYPE = "answer_type"
NO_VALUE = "(no value)"
_MOST_GROUPS = 100
_LONGEST = 80
_NUMBER_WORDS = frozenset(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
)

# Source and number of a row, as questions have them.
Place = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Groups:
    """The group of every row that is measured.

    Attributes:
        by: the setting.
        reason: where the groups come from.
        values: by split, the group of each row; empty where references tell it.
    """

    by: str
    reason: str
    values: Mapping[str, Mapping[Place, str]] = field(default_factory=dict)

    def names(self, split: str, questions: Sequence[Question]) -> list[str]:
        """Return the group of each question of a split."""
        if not self.values:
            return [answer_type(question.reference) for question in questions]
        return [self.values[split][question.source, question.row] for question in questions]


def answer_type(reference: str) -> str:
    """Return yes/no, number or other, the usual split of questions about pictures.

    Source: Antol et al. 2015, VQA: Visual Question Answering (its answer types).

    Args:
        reference: an answer of the data.
    """
    text = unicodedata.normalize("NFKC", reference).strip().rstrip(".").casefold()
    if text in ("yes", "no"):
        return "yes/no"
    digits = text.replace(",", "").lstrip("+-$")
    plain = digits.replace(".", "", 1)
    return "number" if text in _NUMBER_WORDS or (plain.isdecimal() and plain.isascii()) else "other"


def resolve_groups(by: str, data: PreparedData, splits: Mapping[str, TokenStore]) -> Resolved[Groups]:
    """Read the groups of all rows that are measured.

    Args:
        by: `evaluation.group_by`.
        data: prepared rows.
        splits: those that are measured, by the names that they are measured under.

    Returns:
        The groups, and how they came about.

    Raises:
        ConfigError: the rows have no such column.
        DataError: its values make no groups, or a source cannot be read any more.
    """
    values: dict[str, dict[Place, str]] = {}
    columns: dict[str, None] = {}
    for name, split in splits.items():
        values[name] = {}
        for source, row in _rows_of(data, split):
            columns |= dict.fromkeys(row.fields)
            values[name][source, row.number] = _as_text(row.fields.get(by), row, by)
    if by not in columns:
        if by != ANSWER_TYPE:
            raise ConfigError(f"no column {by!r} in the rows", where=_KEY, fix=suggest(by, list(columns)))
        reason = "told by the reference, since the rows have no column of this name: yes/no, number or other"
        return Resolved(Groups(by, reason), reason)
    found = {value for each in values.values() for value in each.values()}
    if len(found) > _MOST_GROUPS:
        raise DataError(
            f"column {by!r} has {len(found)} different values in the rows that are measured, at most {_MOST_GROUPS} "
            "make groups",
            where=_KEY,
            fix="choose a column with fewer values",
        )
    reason = "a column of the rows"
    return Resolved(Groups(by, reason, values), f"{reason}, with {len(found)} values")


def _rows_of(data: PreparedData, split: TokenStore) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a split as their sources have them, each with the number of its source."""
    own = next(name for name, store in data.splits.items() if store is split)
    pool = next(pool for pool in data.pools if own in pool.parts)
    origins = split.origins
    for index, source in enumerate(pool.sources):
        wanted = np.unique(origins[origins[:, 0] == index, 1]).tolist()
        yield from ((index, parse_row(unparsed)) for unparsed in source.pick(wanted))


def _as_text(value: object, row: Row, by: str) -> str:
    """Return the group that a value of a row stands for.

    Raises:
        DataError: it is a list or an object.
    """
    if value is None:
        return NO_VALUE
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int | float):
        raise DataError(
            f"column {by!r} has {type(value).__name__} as a value: {str(value)[:_LONGEST]}",
            where=row.describe(),
            fix="set evaluation.group_by to a column of texts, numbers or booleans",
        )
    return str(value).strip()[:_LONGEST] or NO_VALUE
