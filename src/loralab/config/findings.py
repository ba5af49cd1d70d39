"""What a rule over the configuration finds."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """A broken rule.

    Attributes:
        key: dotted key that the user should look at.
        what: what is wrong, with the value that was got.
        fix: what to do about it.
    """

    key: str
    what: str
    fix: str
