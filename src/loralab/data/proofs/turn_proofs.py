"""The proof of one trained turn: its prompt is what serving sends, its span the answer, its end a stop.

Owns the checks, and the words for what they see. What a turn is held against is the row itself,
the serving call and the template's rendering of the whole conversation.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from loralab.data.example import Conversation, Message, PlacedImage
from loralab.data.prompts.decoding import REPLACEMENT, Decoder
from loralab.data.prompts.prompter import Prompter
from loralab.data.proofs.findings import Seen, show_text
from loralab.data.tokens.tokenize import TokenizeSettings


@dataclass(slots=True)
class TrainedTurn:
    """One trained turn: what the row says of it, and what is stored.

    Attributes:
        number: of the row, among those that are proven together.
        conversation: the row's, with the system message that is put before it.
        turn: place of the turn in it.
        prompt: stored ids that carry no loss, with one marker for each picture.
        answer: stored ids that carry loss.
        made_here: whether the tokens are this program's, not somebody else's.
        served: ids that serving sends before the turn, or None where nobody does.
        before: messages that the prompt is made of.
        whole: the conversation up to the turn as the template renders it, or "" without a template.
        encoding: the ids and offsets of `whole`, or None where the tokenizer gives none.
        stored: the prompt with all tokens of its pictures; `prompt` where it has none.
        images: pictures in it, in order.
    """

    number: int
    conversation: Conversation
    turn: int
    prompt: list[int]
    answer: list[int]
    made_here: bool = True
    served: list[int] | None = None
    before: tuple[Message, ...] = ()
    whole: str = ""
    encoding: Any = None
    stored: list[int] = field(default_factory=list)
    images: tuple[PlacedImage, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of prompt and answer, those of pictures counted."""
        return len(self.prompt) + len(self.answer) + sum(image.length - 1 for image in self.images)

    @property
    def message(self) -> Message:
        """The trained turn."""
        return self.conversation.messages[self.turn]

    @property
    def answered(self) -> bool:
        """Whether an assistant speaks."""
        return self.message.role == "assistant"

    def is_ended(self, stops: Collection[int]) -> bool:
        """Return whether the span ends with a stop token."""
        return bool(self.answer) and self.answer[-1] in stops

    def body(self, stops: Collection[int]) -> list[int]:
        """Return the ids of the span without the stop token at its end."""
        return self.answer[:-1] if self.is_ended(stops) else self.answer


@dataclass(slots=True)
class TurnProof:
    """The checks of one trained turn.

    Attributes:
        case: the turn.
        prompt: text of the stored prompt.
        answer: text of the stored span, without the stop token at its end.
        prompter: the measure.
        decoder: ids to text.
        settings: what decided on tokens.
    """

    case: TrainedTurn
    prompt: str
    answer: str
    prompter: Prompter
    decoder: Decoder
    settings: TokenizeSettings

    def run(self) -> Iterator[Seen]:
        """Yield what is wrong or worth a look."""
        case = self.case
        fault = self._prove_prompt(case.served) if case.served is not None else self._prove_header()
        if fault is not None:
            yield fault
            if fault[0] == "answer_in_prompt":
                return  # what is wrong with the span follows from it
        yield from self._prove_context()
        yield from self._prove_answer()
        yield from self._prove_end()

    def _prove_prompt(self, served: list[int]) -> Seen | None:
        ids = self.case.prompt
        if ids == served:
            return None
        bos = self.prompter.tokenizer.bos_token_id
        if bos is not None and ids == [bos, *served]:
            return "doubled_bos", f"its prompt begins with {self.prompter.tokenizer.bos_token!r} twice"
        (sent,) = self.decoder.texts([served])
        content = self.case.message.content.strip()
        more = self.prompt[len(sent) :].strip()
        if self.prompt.startswith(sent) and more and content.startswith(more):
            return "answer_in_prompt", f"the prompt ends with {show_text(more)}, the beginning of the answer"
        if sent.startswith(self.prompt):
            missing = sent[len(self.prompt) :]
            return "generation_prompt_missing", f"serving also sends {show_text(missing)} before the answer"
        lost = next((m for m in self.case.before if m.role == "system" and not self._in_prompt(m.content)), None)
        if lost is not None and self.decoder.holds(sent, lost.content):
            return "system_missing", f"serving sends {show_text(lost.content)}, the stored prompt does not have it"
        return "prompt_differs", _difference(self.prompt, sent)

    def _prove_header(self) -> Seen | None:
        """Prove the prompt of a turn that nobody prompts: with its content it begins the whole conversation."""
        if not self.case.whole or self._matches_whole():
            return None
        whole, stored = (self.decoder.normal(text) for text in (self.case.whole, self.prompt + self.answer))
        return None if whole.startswith(stored) else ("prompt_differs", _difference(stored, whole))

    def _in_prompt(self, text: str) -> bool:
        return self.decoder.holds(self.prompt, text)

    def _prove_context(self) -> Iterator[Seen]:
        """Yield what the prompt lacks of what the row says before the answer."""
        case = self.case
        if not case.answered or (self.settings.train_on == "all" and case.served is None):
            return
        if len(case.before) < case.turn:
            dropped = case.turn - len(case.before)
            yield "turns_dropped", f"{dropped} of {case.turn} messages before turn {case.turn + 1} are left out"
        if case.prompt != case.served and case.served is not None:
            return  # said already, by what differs
        for message in case.before:
            if message.role == "system" and not self._in_prompt(message.content):
                yield "system_missing", f"the template writes nothing of {show_text(message.content)}"
        asked = next((message for message in reversed(case.before) if message.role == "user"), None)
        if asked is not None and not all(map(self._in_prompt, asked.texts)):
            yield "question_missing", f"the question {show_text(asked.content)} is not in it"
        for tool in case.conversation.tools if case.served is not None else ():
            function = tool.get("function", tool)
            name = function.get("name") if isinstance(function, dict) else None
            if isinstance(name, str) and name not in self.prompt:
                yield "tools_missing", f"the template writes nothing of the tool {name!r}"

    def _prove_answer(self) -> Iterator[Seen]:
        message, text = self.case.message, self.answer
        plain = not message.tool_calls and not message.reasoning
        if plain and not message.content.strip() and not text.strip():
            if self.case.answered:
                yield "empty_answer", f"turn {self.case.turn + 1} is {show_text(message.content)}"
            return
        if self._lost_characters():
            yield "unknown_characters", f"the answer {show_text(message.content)} becomes {show_text(text)}"
            return
        inside = next((token for token in self._body if token in self.prompter.stop.ids), None)
        if inside is not None:
            token = self.prompter.tokenizer.convert_ids_to_tokens(inside)
            yield "stop_inside", f"{token!r} stands in {show_text(text)}"
            return
        if self._is_cut:
            yield from self._prove_cut()
            return
        fault = self._tokens_fault()
        if fault is not None:
            yield fault
            return
        yield from self._prove_text(plain)

    def _lost_characters(self) -> bool:
        """Return whether the span holds the token for what the tokenizer does not know, and the row does not."""
        tokenizer = self.prompter.tokenizer
        unknown = tokenizer.unk_token_id
        # Some tokenizers name their end token here, and know everything.
        if unknown is None or unknown in self.prompter.stop.ids or unknown not in self._body:
            return False
        return str(tokenizer.unk_token) not in self.case.message.content

    def _prove_text(self, plain: bool) -> Iterator[Seen]:
        message, text = self.case.message, self.answer
        exact = plain and self.decoder.same(text, message.content)
        if exact and (not self.case.made_here or not self.case.answered or self._as_rendered()):
            return
        other = self._other_turn(text)
        if other is not None:
            place, spoken = other
            yield "wrong_role", f"{show_text(text)} is turn {place + 1} ({spoken.role}), not an answer"
            return
        if not self._as_rendered():
            yield "answer_differs", f"{show_text(text)} carries loss, the answer is {show_text(message.content)}"
            return
        if self.decoder.normal(message.content) not in self.decoder.normal(text):
            yield "answer_altered", f"{show_text(message.content)} became {show_text(text)}"
        for call in message.tool_calls:
            if call.name not in text:
                yield "tool_call_missing", f"nothing of the call of {call.name!r} is in {show_text(text)}"
        if message.reasoning and not self.decoder.holds(text, message.reasoning):
            yield "reasoning_left_out", f"nothing of {show_text(message.reasoning)} is in it"

    def _other_turn(self, text: str) -> tuple[int, Message] | None:
        """Return the turn of another role whose whole content carries loss here, or None."""
        if not text.strip():
            return None
        return next(
            (
                (place, message)
                for place, message in enumerate(self.case.conversation.messages)
                if message.role != self.case.message.role
                and self.decoder.same(text.strip(), message.content.strip())
                and not self.decoder.holds(self.case.message.content, text)
            ),
            None,
        )

    @property
    def _body(self) -> list[int]:
        """The ids of the span without the stop token at its end."""
        return self.case.body(self.prompter.stop.ids)

    @property
    def _is_ended(self) -> bool:
        return self.case.is_ended(self.prompter.stop.ids)

    @property
    def _is_cut(self) -> bool:
        return self.case.length == self.settings.max_length and not self._is_ended and self.case.made_here

    def _prove_cut(self) -> Iterator[Seen]:
        """Prove a span that fills `max_length`: it must be the beginning of what the template renders."""
        length, end = self.settings.max_length, show_text(self.answer, tail=True)
        yield "cut", f"turn {self.case.turn + 1} ends at {length} tokens with {end}"
        if self._matches_whole():
            return
        text = self.decoder.normal(self.answer.rstrip(REPLACEMENT)).lstrip()
        rest = self._rendered_rest()
        wanted = [self.case.message.content, *([] if rest is None else [rest])]
        if not any(self.decoder.normal(each).lstrip().startswith(text) for each in wanted):
            yield (
                "answer_differs",
                f"{show_text(self.answer)} is no beginning of {show_text(self.case.message.content)}",
            )

    def _as_rendered(self) -> bool:
        """Return whether the span is all that the template writes between the prompt and the stop token."""
        if not self.case.whole:
            return self.decoder.holds(self.answer, self.case.message.content)
        stops = self.prompter.stop
        if not self.case.answered:  # nobody answers here: the content alone carries loss
            return self.decoder.same(self.answer, self.case.message.content.strip())
        if self._matches_whole():
            behind = self.case.encoding.ids[len(self.case.prompt) + len(self._body) :]
            return not behind or behind[0] in stops.ids
        rest = self._rendered_rest()
        if rest is None:
            return False
        written, span = self.decoder.normal(rest), self.decoder.normal(self.answer)
        left = written[len(span) :]
        return written.startswith(span) and (not left or left.startswith(stops.texts))

    def _matches_whole(self) -> bool:
        """Return whether prompt and span are the first ids of the whole conversation as one text."""
        if self.case.encoding is None:
            return False
        ids = [*self.case.prompt, *self._body]
        return bool(self.case.encoding.ids[: len(ids)] == ids)

    def _rendered_rest(self) -> str | None:
        """Return what the template writes behind the prompt of serving, or None where it rewrites the prompt."""
        if not self.case.whole or not self.case.answered:
            return None
        before, tools = self.case.before, self.case.conversation.tools
        prompt = self.prompter.render(before, add_generation_prompt=True, tools=tools)
        return self.case.whole[len(prompt) :] if self.case.whole.startswith(prompt) else None

    def _tokens_fault(self) -> Seen | None:
        """Compare the span's ids with those of the same text, with its prompt as one text or as a continuation."""
        case, body = self.case, self._body
        if case.encoding is None or not case.answered or case.prompt != case.served or self._matches_whole():
            return None
        rest = self._rendered_rest()
        if rest is None or not self.decoder.same(self.answer, rest[: len(self.answer)]):
            return None  # nothing to compare with, or not the answer at all, which the text shows
        border = len(case.whole) - len(rest)
        first = next((place for place, (_, end) in enumerate(case.encoding.offsets) if end > border), 0)
        together = case.encoding.ids[first : first + len(body)]
        tokenizer, anchor = self.prompter.tokenizer, self.prompter.stop.texts[0]
        alone = tokenizer([self.answer, anchor + self.answer], add_special_tokens=False, verbose=False)["input_ids"]
        if body in (together, alone[0], alone[1][1:]):
            return None
        return "answer_ids_differ", f"{show_text(self.answer)} is {together[:6]} as one text, {body[:6]} here"

    def _prove_end(self) -> Iterator[Seen]:
        if not self.case.answered or self._is_ended or self._is_cut or not self.case.made_here:
            return
        stops = ", ".join(map(repr, self.prompter.stop.texts))
        yield (
            "no_stop",
            f"turn {self.case.turn + 1} ends with {show_text(self.answer, tail=True)}; generation stops on {stops}",
        )


def _difference(stored: str, sent: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(stored, sent, strict=False)) if a != b), min(len(stored), len(sent)))
    start = max(at - 15, 0)
    if stored == sent:
        return "the same text in other tokens"
    return f"stored {show_text(stored[start:])}, sent {show_text(sent[start:])}"
