"""Task metrics: each is one function over answers and references.

Owns what counts as right. The losses are `perplexity.py`'s.
"""

from collections.abc import Sequence


def exact_matches(answers: Sequence[str], references: Sequence[str]) -> int:
    """Return how many answers equal their references, outer blanks aside.

    Args:
        answers: generated texts.
        references: the texts of the data, one per answer.
    """
    return sum(a.strip() == r.strip() for a, r in zip(answers, references, strict=True))
