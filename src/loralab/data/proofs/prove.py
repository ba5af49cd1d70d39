"""Proofs that stored tokens are what their rows say: read again, and checked by another way than they were made.

Owns what is held against what: each stored span against the turn that the row says is trained.
Shares no code with `turns.py` and `tokenize.py`. The checks themselves are `turn_proofs.py`'s and,
for rows that no template touches, `untemplated_proofs.py`'s.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from loralab.data.example import Branch, Conversation, Document, Example, Message, Preformatted, Tokens
from loralab.data.prompts.decoding import Decoder
from loralab.data.prompts.prompter import Prompter, Tools
from loralab.data.proofs.findings import Finding, Seen
from loralab.data.proofs.picture_proofs import PictureProver
from loralab.data.proofs.turn_proofs import TrainedTurn, TurnProof
from loralab.data.proofs.untemplated_proofs import UntemplatedProver
from loralab.data.tokens.tokenize import TokenizeSettings


@dataclass(frozen=True, slots=True)
class StoredRow:
    """A row as its source has it, and what is stored of it.

    Attributes:
        source: name of the source.
        row: number of the row there, from 1.
        example: what the row means, made anew from its fields.
        units: branches of each stored unit, in order.
        twin: conversation that the row also holds beside tokens made elsewhere, or None.
        longest: length of the longest row of the source, in tokens.
        lost: why a picture of the row cannot be read any more, or None.
    """

    source: str
    row: int
    example: Example
    units: tuple[tuple[Branch, ...], ...]
    twin: Conversation | None = None
    longest: int = 0
    lost: str | None = None

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches of all units."""
        return tuple(branch for unit in self.units for branch in unit)


class Prover:
    """Proves stored rows.

    Args:
        prompter: that of training; its serving call and renderings are the measure.
        settings: what decided on tokens.
        own: prompter with the tokenizer's own template, for rows that were tokenized elsewhere;
            None where it has none.
    """

    def __init__(self, prompter: Prompter, settings: TokenizeSettings, *, own: Prompter | None = None) -> None:
        self._prompter = prompter
        self._settings = settings
        self._own = own
        self._decoder = Decoder(prompter.tokenizer, prompter.stop.ids[0])
        self._untemplated = UntemplatedProver(prompter, settings, self._decoder, own=own)
        self._pictures = PictureProver(prompter)
        self.spans = 0

    @property
    def pictures(self) -> int:
        """How many different pictures the model's processor has read."""
        return self._pictures.proven

    def prove(self, rows: Sequence[StoredRow]) -> list[Finding]:
        """Return what is wrong or worth a look in some rows; a few hundred at a time are fastest."""
        seen: list[tuple[int, Seen]] = []
        cases: list[TrainedTurn] = []
        twins: list[TrainedTurn] = []
        for number, row in enumerate(rows):
            self.spans += len(row.branches)
            if row.lost is not None:
                seen.append((number, ("picture_changed", row.lost)))
                continue
            if isinstance(row.example, Conversation):
                found, made = self._cases(number, row, row.example)
                cases += made
                seen += found
                continue
            seen += [(number, each) for each in self._prove_untemplated(row)]
            found, made = self._twin_cases(number, row)
            twins += made
            seen += found
        seen += self._prove_turns(cases, self._prompter)
        seen += [(case.number, each) for case in cases for each in self._pictures.prove(case)]
        seen += self._prove_turns(twins, self._own or self._prompter, template=self._own is not None)
        return [
            Finding(kind, rows[number].source, rows[number].row, what)
            for number, (kind, what) in sorted(seen, key=lambda each: each[0])
        ]

    def _prove_untemplated(self, row: StoredRow) -> Iterator[Seen]:
        if isinstance(row.example, Document):
            yield from self._untemplated.prove_document(row.example, row.branches)
        elif isinstance(row.example, Preformatted):
            yield from self._untemplated.prove_segments(row.example, row.branches)
        elif isinstance(row.example, Tokens):
            yield from self._untemplated.prove_tokens(row.example, row.branches, longest=row.longest)

    def _cases(
        self, number: int, row: StoredRow, conversation: Conversation
    ) -> tuple[list[tuple[int, Seen]], list[TrainedTurn]]:
        system = self._settings.system
        if system is not None and all(message.role != "system" for message in conversation.messages):
            conversation = replace(conversation, messages=(Message("system", system), *conversation.messages))
        turns = _trained_turns(conversation.messages, self._settings.train_on)
        seen: list[tuple[int, Seen]] = []
        if len(turns) != len(row.branches):
            what = f"{len(row.branches)} spans are stored, {len(turns)} turns are to be trained"
            if not self._is_cut(conversation, turns[len(row.branches) :]):
                return [(number, ("turn_missing", what))], []
            seen = [(number, ("turns_cut", what))]
        pairs = zip(turns, row.branches, strict=False)
        return seen, [self._case(number, conversation, turn, branch) for turn, branch in pairs]

    def _case(self, number: int, conversation: Conversation, turn: int, branch: Branch) -> TrainedTurn:
        stored, images = branch.prompt_ids.tolist(), tuple(branch.images)
        prompt = self._prompter.fold(stored, images)  # what a template and its serving call write of a picture
        answer = branch.answer_ids.tolist()
        return TrainedTurn(number, conversation, turn, prompt, answer, stored=stored, images=images)

    def _is_cut(self, conversation: Conversation, missing: Sequence[int]) -> bool:
        """Return whether the prompt of the first missing turn leaves no room for an answer."""
        if not missing or self._settings.truncation != "right":
            return False
        first, tools = missing[0], conversation.tools
        if conversation.messages[first].role == "assistant":
            before = conversation.messages[:first]
            return self._with_pictures(self._prompter.serve(before, tools), before) >= self._settings.max_length
        # Nobody prompts other roles: what stands before their content is no call, but a part of the rendering.
        messages = conversation.messages[: first + 1]
        whole = self._prompter.render(messages, add_generation_prompt=False, tools=tools)
        return self._with_pictures(self._prompter.encode([whole])[0], messages) >= self._settings.max_length

    def _with_pictures(self, ids: list[int], messages: Sequence[Message]) -> int:
        """Return the length of a rendered prompt with all tokens of its pictures."""
        files = [part.file for message in messages for part in message.images if part.file is not None]
        return len(self._prompter.place(ids, files)[0])

    def _twin_cases(self, number: int, row: StoredRow) -> tuple[list[tuple[int, Seen]], list[TrainedTurn]]:
        """Pair the spans of a row that was tokenized elsewhere with the answers of the conversation beside it."""
        if row.twin is None:
            return [], []
        turns = _trained_turns(row.twin.messages, "response")
        branches = row.branches
        if len(branches) == 1:
            turns = turns[-1:]
        if len(turns) != len(branches):
            what = f"labels cover {len(branches)} spans, the row's conversation has {len(turns)} answers"
            return [(number, ("turn_missing", what))], []
        return [], [
            TrainedTurn(number, row.twin, turn, branch.prompt_ids.tolist(), branch.answer_ids.tolist(), made_here=False)
            for turn, branch in zip(turns, branches, strict=True)
        ]

    def _prove_turns(
        self, cases: Sequence[TrainedTurn], prompter: Prompter, *, template: bool = True
    ) -> list[tuple[int, Seen]]:
        if not cases:
            return []
        for case in cases:
            case.before = case.conversation.messages[: case.turn]
            if template and case.answered:
                self._serve(case, prompter)
        if template:
            requests = [((*case.before, case.message), case.conversation.tools) for case in cases]
            for case, text in zip(cases, prompter.render_all(requests, add_generation_prompt=False), strict=True):
                case.whole = text
            encoded = prompter.tokenizer([case.whole for case in cases], add_special_tokens=False, verbose=False)
            encodings = encoded.encodings or [None] * len(cases)
            for case, encoding in zip(cases, encodings, strict=True):
                case.encoding = encoding
        stops = set(prompter.stop.ids)
        answers = self._decoder.texts([case.body(stops) for case in cases])
        prompts = self._decoder.texts([case.prompt for case in cases])
        return [
            (case.number, seen)
            for case, prompt, answer in zip(cases, prompts, answers, strict=True)
            for seen in TurnProof(case, prompt, answer, prompter, self._decoder, self._settings).run()
        ]

    def _serve(self, case: TrainedTurn, prompter: Prompter) -> None:
        """Set what serving sends before a turn; where oldest turns were left out, before what was kept."""
        tools, ids, given = case.conversation.tools, [*case.prompt, *case.answer], len(case.prompt)
        everything = self._settings.train_on == "all" and case.made_here  # what is sent carries loss too
        served = prompter.serve(case.before, tools)
        if everything and self._settings.truncation == "right" and len(served) >= len(ids) == self._settings.max_length:
            case.prompt, case.answer = ids, []  # cut before the answer begins: the whole conversation is the measure
            return
        for kept in self._kept(case.before, prompter, tools, None if everything else given):
            sent = prompter.serve(kept, tools)
            border = len(sent) if everything else given
            if ids[:border] == sent:
                case.served, case.before = sent, kept
                case.prompt, case.answer = ids[:border], ids[border:]
                return
        border = len(served) if everything else given
        case.served, case.prompt, case.answer = served, ids[:border], ids[border:]

    def _kept(
        self, before: Sequence[Message], prompter: Prompter, tools: Tools, length: int | None
    ) -> Iterator[tuple[Message, ...]]:
        """Yield what a prompt may be made of: all before its turn, or the newest exchanges, the likeliest first.

        Args:
            before: the messages before the turn.
            prompter: renders.
            tools: of the conversation.
            length: of the stored prompt, in tokens, where it is known.
        """
        yield tuple(before)
        if self._settings.truncation != "left":
            return
        starts = [place for place, message in enumerate(before) if message.role == "user"]
        # Fewer exchanges are shorter: trying each start of a long conversation at each of its turns would take hours.
        if length is not None and starts:
            nearest = bisect.bisect_left(
                starts, -length, key=lambda start: -len(prompter.serve(_newest(before, start), tools))
            )
            yield _newest(before, starts[min(nearest, len(starts) - 1)])
        for start in starts:
            yield _newest(before, start)


def _trained_turns(messages: Sequence[Message], train_on: object) -> list[int]:
    """Return which turns must carry loss; of a conversation that is trained as a whole, its last answer."""
    roles = {"assistant"} if isinstance(train_on, str) else set(train_on)  # type: ignore[call-overload]
    turns = [
        place
        for place, message in enumerate(messages)
        if message.train and message.role in roles and not (place == 0 and message.role == "assistant")
    ]
    return turns if train_on == "response" or not isinstance(train_on, str) else turns[-1:]


def _newest(before: Sequence[Message], start: int) -> tuple[Message, ...]:
    """Return a prompt's messages from `start` on, behind the system messages before; these stay."""
    return (*(message for message in before[:start] if message.role == "system"), *before[start:])
