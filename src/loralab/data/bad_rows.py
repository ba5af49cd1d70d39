"""Why rows were dropped as bad: read again, since a store keeps no text for each of them.

Owns the second look at the rows that a split's report lists.
"""

from collections.abc import Sequence
from typing import Any

from loralab.data.reading.sources import Source
from loralab.data.tokens.pipeline import RowTokenizer

# Reasons that a row itself can be asked about.
_ASKED = ("bad_row", "template_refused")
# So many are told when rows are tokenized; the report has all that it lists.
_TOLD = 3


def explain_bad_rows(
    report: dict[str, Any], *, sources: Sequence[Source], workers: Sequence[RowTokenizer]
) -> list[str]:
    """Add to each listed bad row of a split's report why it is one: `why`.

    Args:
        report: of `report_split`; its `dropped_rows` are changed in place.
        sources: of the split.
        workers: what tokenizes the rows of each source.

    Returns:
        Lines on the first of them, for a person; none where no row is bad.

    Raises:
        DataError: a source cannot be read any more.
    """
    listed = [entry for entry in report["dropped_rows"] if entry["reason"] in _ASKED]
    for source, worker in zip(sources, workers, strict=True):
        asked = {entry["row"]: entry for entry in listed if entry["source"] == source.name}
        for row in source.pick(sorted(asked)):
            asked[row.number]["why"] = worker.explain(row)
    told = [
        f"dropped {entry['source']} row {entry['row']}: {entry.get('why', 'it is gone')}" for entry in listed[:_TOLD]
    ]
    rest = sum(report["dropped"].get(reason, 0) for reason in _ASKED) - len(told)
    return [*told, f"and {rest:,} more, listed in data.json and by `loralab preview`"] if rest > 0 else told
