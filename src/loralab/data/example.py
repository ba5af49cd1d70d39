"""What a row means (`Example`) and what it becomes (`TokenizedExample`).

The two halves of the data contract meet here: a format knows a row's columns and builds an
`Example`; the tokenizer side turns an `Example` into tokens; nothing knows both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

TokenIds: TypeAlias = npt.NDArray[np.int32]

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that an assistant turn calls.

    Attributes:
        name: of the function.
        arguments: by name; a string where the row's was no JSON object.
        id: what the row calls this call, or None.
    """

    name: str
    arguments: Mapping[str, Any] | str
    id: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the form that chat templates read."""
        identity = {} if self.id is None else {"id": self.id}
        return {**identity, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: one of `ROLES`.
        content: the text, exactly as in the row.
        reasoning: what an assistant thought before it answered, or None.
        tool_calls: functions that an assistant turn calls, behind its content.
        name: of the function whose result a tool turn holds, or None.
        call_id: of the call that a tool turn answers, or None.
        train: whether the turn may carry loss; `data.train_on` says which turns do.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    call_id: str | None = None
    train: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Return the form that chat templates read; what the turn does not have is left out."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        if self.name is not None:
            message["name"] = self.name
        if self.call_id is not None:
            message["tool_call_id"] = self.call_id
        return message


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns that a template renders; which of them carry loss, `data.train_on` says.

    Attributes:
        messages: at least one.
        tools: functions that the assistant may call, as JSON schemas that templates read.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of preformatted text.

    Attributes:
        text: exactly as it stands, markers and end tokens included.
        train: whether its tokens carry loss.
    """

    text: str
    train: bool


@dataclass(frozen=True, slots=True)
class Preformatted:
    """Text that was put together elsewhere, in pieces; no template touches it."""

    segments: tuple[Segment, ...]


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
        masked_end: first token that the attention mask left out behind the row, or None: where
            that is an end token, padding may have been told by its id.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    masked_end: int | None = None


Example: TypeAlias = Conversation | Preformatted | Document | Tokens


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
