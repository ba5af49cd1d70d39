"""Answers that deserve a look, row by row: what stands in them as text.

Owns rules that do not cry wolf: each names something that no clean data set has.
"""

import re
from collections.abc import Collection, Iterator, Sequence

from loralab.data.example import Conversation, Message
from loralab.data.proofs.findings import Finding, show_text
from loralab.data.proofs.prove import StoredRow

# Texts that templates write around turns. Not `<s>` and `</s>`, which are HTML too.
MARKERS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|begin_of_text|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<</SYS>>",
    "### Instruction:",
    "### Response:",
)
# A shorter beginning of a marker may be the end of ordinary text.
_BEGINNING_CHARACTERS = 4


class AnswerSurvey:
    """Looks at the answers of rows.

    Args:
        special: texts of the tokenizer's special tokens, which are markers too.
    """

    def __init__(self, special: Collection[str]) -> None:
        own = [text for text in special if len(text) > _BEGINNING_CHARACTERS]
        self._markers = list(dict.fromkeys([*MARKERS, *own]))
        self._pattern = re.compile("|".join(map(re.escape, self._markers)))
        self._starts = tuple({marker[:_BEGINNING_CHARACTERS] for marker in self._markers})
        self._longest = max(map(len, self._markers))

    def look(self, rows: Sequence[StoredRow]) -> Iterator[Finding]:
        """Yield what is odd about the trained answers of conversations."""
        for row in rows:
            example = row.example if isinstance(row.example, Conversation) else row.twin
            if example is None:
                continue
            for place, message in enumerate(example.messages):
                if message.role == "assistant" and message.train and place:
                    for kind, what in self._look_at(message, example.messages[place - 1]):
                        yield Finding(kind, row.source, row.row, what)

    def _look_at(self, message: Message, before: Message) -> Iterator[tuple[str, str]]:
        text = message.content
        found = self._pattern.search(text)
        if found is not None:
            yield "markers_in_answer", f"{found.group()!r} in {show_text(text[max(found.start() - 20, 0) :])}"
        elif (tail := self._cut_marker(text)) is not None:
            yield "marker_cut_off", f"it ends with {tail!r}"
        if before.role == "user" and text.strip() and text.strip() == before.content.strip():
            yield "answer_is_question", f"both are {show_text(text)}"

    def _cut_marker(self, text: str) -> str | None:
        tail = text.rstrip()[-self._longest :]
        if not any(start in tail for start in self._starts):
            return None
        for length in range(len(tail), _BEGINNING_CHARACTERS - 1, -1):
            if any(marker.startswith(tail[-length:]) and len(marker) > length for marker in self._markers):
                return tail[-length:]
        return None
