"""What a row means (`Example`) and what it becomes (`TokenizedExample`).

The two halves of the data contract meet here: a format knows a row's columns and builds an
`Example`; the tokenizer side turns an `Example` into tokens; nothing knows both.
"""

from collections.abc import Mapping, Sequence
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
class ImageFile:
    """A picture that was looked at, but not decoded.

    Attributes:
        path: where its file lies, absolute.
        sha256: of the file's bytes, as hexadecimal digits.
        width: in pixels, as it is seen: behind the rotation that its EXIF orientation asks for.
        height: in pixels, as it is seen.
        size_bytes: of the file.
        modified_ns: when the file was written last, in nanoseconds.
    """

    path: str
    sha256: str
    width: int
    height: int
    size_bytes: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class ImagePart:
    """A picture in a turn.

    Attributes:
        source: as the row has it: a path, or the bytes of a file.
        file: the picture itself, once it was looked at.
    """

    source: str | bytes
    file: ImageFile | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: one of `ROLES`.
        content: the text, exactly as in the row; of a turn with pictures, its texts joined.
        reasoning: what an assistant thought before it answered, or None.
        tool_calls: functions that an assistant turn calls, behind its content.
        name: of the function whose result a tool turn holds, or None.
        call_id: of the call that a tool turn answers, or None.
        train: whether the turn may carry loss; `data.train_on` says which turns do.
        parts: of a turn with pictures, its texts and pictures in order; empty for all others.
    """

    role: str
    content: str
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    call_id: str | None = None
    train: bool = True
    parts: tuple["str | ImagePart", ...] = ()

    @property
    def images(self) -> tuple[ImagePart, ...]:
        """The turn's pictures, in order."""
        return tuple(part for part in self.parts if isinstance(part, ImagePart))

    @property
    def texts(self) -> tuple[str, ...]:
        """The turn's texts, in order: one, but where pictures stand between them."""
        return tuple(part for part in self.parts if isinstance(part, str)) if self.parts else (self.content,)

    def as_dict(self, *, listed: bool = False) -> dict[str, Any]:
        """Return the form that chat templates read; what the turn does not have is left out.

        Args:
            listed: whether content is a list of parts in any case; with pictures it always is.
        """
        content: str | list[dict[str, str]] = self.content
        if self.parts or listed:
            content = [_part_as_dict(part) for part in self.parts or (self.content,)]
        message: dict[str, Any] = {"role": self.role, "content": content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        if self.name is not None:
            message["name"] = self.name
        if self.call_id is not None:
            message["tool_call_id"] = self.call_id
        return message


def _part_as_dict(part: str | ImagePart) -> dict[str, str]:
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}


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
class PlacedImage:
    """A picture among the tokens of a prompt.

    Attributes:
        file: the picture.
        start: index of the first of its tokens in the prompt.
        length: of its tokens, those included that only mark its parts.
        rows: rows of features, where positions go by rows and columns; else 0.
        columns: columns of features, likewise.
    """

    file: ImageFile
    start: int
    length: int
    rows: int = 0
    columns: int = 0

    @property
    def end(self) -> int:
        """Index past the last of its tokens."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Branch:
    """One prompt and the answer that continues it.

    Attributes:
        prompt_ids: tokens that carry no loss; at least one.
        answer_ids: tokens that carry loss; at least one.
        images: pictures in the prompt, in order.
    """

    prompt_ids: TokenIds
    answer_ids: TokenIds
    images: Sequence[PlacedImage] = ()


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
