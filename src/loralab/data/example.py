"""What a row means (`Example`) and what it becomes (`TokenizedExample`).

The two halves of the data contract meet here: a format knows a row's columns and builds an
`Example`; the tokenizer side turns an `Example` into tokens; nothing knows both.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

TokenIds: TypeAlias = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: "system", "user" or "assistant".
        content: the text, exactly as in the row.
    """

    role: str
    content: str

    def as_dict(self) -> dict[str, str]:
        """Return the form that chat templates read."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that a template renders; assistant turns carry loss."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text; every token but the first carries loss."""

    text: str


@dataclass(frozen=True, slots=True)
class Tokens:
    """A row that was tokenized elsewhere.

    Attributes:
        input_ids: token ids without padding, L of them.
        labels: for each position its own token id, or -100 where it carries no loss (L).
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


Example: TypeAlias = Conversation | Document | Tokens


@dataclass(frozen=True, slots=True)
class Branch:
    """One prompt and the answer that continues it.

    Attributes:
        prompt_ids: tokens that carry no loss; at least one.
        answer_ids: tokens that carry loss; at least one.
    """

    prompt_ids: TokenIds
    answer_ids: TokenIds


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One row as branches, one per trained turn.

    Attributes:
        row: 1-based number of the row in its source.
        source: index of the source in the data report.
        branches: at least one.
    """

    row: int
    source: int
    branches: tuple[Branch, ...]

    @property
    def supervised_tokens(self) -> int:
        """Number of tokens that carry loss."""
        return sum(len(branch.answer_ids) for branch in self.branches)
