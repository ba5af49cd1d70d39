"""Proofs of rows that no template touches: documents, preformatted segments, tokens made elsewhere.

Owns what can be shown of labels without a conversation to hold them against, and nothing that
may be right in somebody else's data.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

from loralab.data.example import Branch, Document, Message, Preformatted, Tokens
from loralab.data.prompts.decoding import Decoder
from loralab.data.prompts.prompter import Prompter, adds_bos
from loralab.data.proofs.findings import Seen, show_text
from loralab.data.tokens.tokenize import TokenizeSettings

_QUESTION, _ANSWER = "loralab-probe-question", "loralab-probe-reply"
# A shorter header of the user's turn may be ordinary text.
_HEADER_CHARACTERS = 4
_TOKENS_BEFORE = 24


class UntemplatedProver:
    """Proves rows that no template touches.

    Args:
        prompter: that of training.
        settings: what decided on tokens.
        decoder: ids to text.
        own: prompter with the tokenizer's own template, or None where it has none.
    """

    def __init__(
        self, prompter: Prompter, settings: TokenizeSettings, decoder: Decoder, *, own: Prompter | None
    ) -> None:
        self._prompter = prompter
        self._settings = settings
        self._decoder = decoder
        self._stops = {*prompter.stop.ids, *(own.stop.ids if own is not None else ())}
        self._bos = prompter.tokenizer.bos_token_id
        self._user_header = _user_header(own) if own is not None else ""

    def prove_document(self, document: Document, windows: Sequence[Branch]) -> Iterator[Seen]:
        """Yield what is wrong with the windows of a text: together they are its tokens, each predicted once."""
        tokenizer = self._prompter.tokenizer
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        bos = [self._bos] if adds_bos(tokenizer) else []
        wanted = [*bos, *ids, self._prompter.stop.ids[0]]
        stored: list[int] = []
        for number, window in enumerate(windows):
            first, rest = window.prompt_ids.tolist(), window.answer_ids.tolist()
            if len(first) != 1 or (number and first != stored[-1:]):
                yield "text_differs", f"window {number + 1} does not go on where the one before ends"
                return
            stored += rest if number else first + rest
        cut = len(stored) < len(wanted)
        if stored != wanted[: len(stored)] or (cut and self._settings.long_text != "truncate"):
            yield "text_differs", f"{len(stored)} tokens stored, {len(wanted)} made again of {show_text(document.text)}"
            return
        if cut:
            yield "cut", f"{len(stored)} of {len(wanted)} tokens are kept"
        (text,) = self._decoder.texts([ids])
        if not self._decoder.same(text, document.text) and tokenizer.unk_token_id not in ids:
            yield "text_differs", f"the tokens decode to {show_text(text)}"

    def prove_segments(self, example: Preformatted, branches: Sequence[Branch]) -> Iterator[Seen]:
        """Yield what is wrong with preformatted text: its trained segments, and they alone, carry loss."""
        groups = groupby((each for each in example.segments if each.text), key=lambda each: each.train)
        runs = [(train, "".join(segment.text for segment in group)) for train, group in groups]
        ends, wanted = "", []
        for train, text in runs:
            ends += text
            if train:
                wanted.append((ends, text))
        if len(wanted) < len(branches) or not branches:
            yield "turn_missing", f"{len(branches)} spans are stored, {len(wanted)} are to be trained"
            return
        texts = self._decoder.texts([branch.answer_ids.tolist() for branch in branches])
        for (before, text), branch, stored in zip(wanted, branches, texts, strict=False):
            length = len(branch.prompt_ids) + len(branch.answer_ids)
            cut = length == self._settings.max_length
            # The very first token has nothing before it that could predict it.
            opens = before == text
            if cut and not self._decoder.same(stored, text):
                yield from self._prove_cut_segment(stored, text, opens=opens)
            elif not (text.endswith(stored) if opens else self._decoder.same(stored, text)):
                yield "answer_differs", f"{show_text(stored)} carries loss, the segment is {show_text(text)}"
            elif not opens:
                yield from self._prove_end(branch.answer_ids.tolist(), stored, cut=cut)
        yield from self._prove_begin(branches)

    def _prove_cut_segment(self, stored: str, text: str, *, opens: bool) -> Iterator[Seen]:
        yield "cut", f"a segment ends at {self._settings.max_length} tokens with {show_text(stored, tail=True)}"
        beginning = self._decoder.normal(stored.rstrip("\ufffd"))
        if not opens and not self._decoder.normal(text).startswith(beginning):
            yield "answer_differs", f"{show_text(stored)} is no beginning of {show_text(text)}"

    def _prove_end(self, answer: Sequence[int], text: str, *, cut: bool) -> Iterator[Seen]:
        if cut or self._stops_inside(answer):
            return
        stops = ", ".join(map(repr, self._prompter.stop.texts))
        yield "no_stop", f"a span ends with {show_text(text, tail=True)}; generation stops on {stops}"

    def _stops_inside(self, answer: Sequence[int]) -> bool:
        """Return whether a span ends with a stop token, blanks behind it aside."""
        last = max((place for place, token in enumerate(answer) if token in self._stops), default=None)
        if last is None:
            return False
        return not "".join(self._decoder.texts([list(answer[last + 1 :])])).strip()

    def _prove_begin(self, branches: Sequence[Branch]) -> Iterator[Seen]:
        first = [*branches[0].prompt_ids.tolist(), *branches[0].answer_ids.tolist()][:2]
        # Where the end token is the bos token, two of them may be an end and a beginning.
        if self._bos is not None and self._bos not in self._stops and first == [self._bos, self._bos]:
            yield "doubled_bos", f"it begins with {self._prompter.tokenizer.bos_token!r} twice"

    def prove_tokens(self, example: Tokens, branches: Sequence[Branch], *, longest: int) -> Iterator[Seen]:
        """Yield what is wrong with a row that was tokenized elsewhere, as far as its tokens alone show it.

        Args:
            example: the row.
            branches: what is stored of it.
            longest: length of the longest row of its source, in tokens.
        """
        length = self._settings.max_length
        ids, labels = list(example.input_ids[:length]), list(example.labels[:length])
        trained = [place for place, label in enumerate(labels) if label != -100 and place]
        stored: list[int] = []
        for branch in branches:
            start = len(branch.prompt_ids)
            stored += range(start, start + len(branch.answer_ids))
            if [*branch.prompt_ids.tolist(), *branch.answer_ids.tolist()] != ids[: start + len(branch.answer_ids)]:
                yield "prompt_differs", "the stored tokens are not the row's input_ids"
                return
        if stored != trained:
            yield "answer_differs", f"labels cover {len(trained)} tokens, {len(stored)} are stored as trained"
            return
        yield from self._prove_begin(branches)
        if trained == list(range(1, len(ids))):
            return  # text of which all carries loss: it need not end, and has no turns
        for branch in branches:
            yield from self._prove_span(example, ids, branch, longest)

    def _prove_span(self, example: Tokens, ids: Sequence[int], branch: Branch, longest: int) -> Iterator[Seen]:
        answer, end = branch.answer_ids.tolist(), len(branch.prompt_ids) + len(branch.answer_ids)
        before, text = self._decoder.texts([branch.prompt_ids.tolist()[-_TOKENS_BEFORE:], answer])
        header = self._user_header
        if header and before.rstrip().endswith(header):
            yield "wrong_role", f"{show_text(text)} stands behind {header!r}: it is what a user said"
            return
        if header and header in text:
            yield "wrong_role", f"{header!r} carries loss, and the user's turn behind it: {show_text(text)}"
            return
        if not self._without_stops(answer):
            yield "empty_answer", f"a span holds nothing but {show_text(text)}"
        if self._stops_inside(answer):
            return
        at_end = end == len(ids)
        behind = example.masked_end if at_end else ids[end]
        if behind in self._stops:
            token = self._prompter.tokenizer.convert_ids_to_tokens(int(behind))
            how = "the attention mask leaves it out" if at_end else "its label is -100"
            yield "stop_masked", f"{token!r} stands behind {show_text(text, tail=True)}, but {how}"
        elif at_end and (len(ids) < len(example.input_ids) or (behind is None and len(ids) >= longest)):
            # The longest rows, without padding behind them, were cut before they came here.
            yield "cut", f"the row ends at {len(ids)} tokens with {show_text(text, tail=True)}"
        else:
            yield from self._prove_end(answer, text, cut=False)

    def _without_stops(self, answer: Sequence[int]) -> str:
        (text,) = self._decoder.texts([[token for token in answer if token not in self._stops]])
        return text.strip()


def _user_header(own: Prompter) -> str:
    """Return what the tokenizer's own template writes before a user's later turn, or "" where that tells nothing."""
    messages = [Message("user", _QUESTION), Message("assistant", _ANSWER), Message("user", _QUESTION)]
    text = own.render(messages, add_generation_prompt=False)
    header = text.rpartition(_QUESTION)[0].rpartition(_ANSWER)[2].strip()
    for stop in own.stop.texts:
        header = header.removeprefix(stop).strip()
    opening = own.render(messages[:1], add_generation_prompt=True).rpartition(_QUESTION)[2]
    return header if len(header) >= _HEADER_CHARACTERS and header not in opening else ""
