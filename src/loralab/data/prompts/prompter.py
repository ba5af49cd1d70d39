"""The one place where prompts are made: messages to text to token ids.

Owns the serving call and the stop tokens. Training takes its prompts from here too, so what is
trained is what is sent. How a conversation becomes turns is `turns.py`'s, what travels with an
adapter `contract.py`'s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from loralab.data.example import ImageFile, Message, PlacedImage
from loralab.data.images.folding import fold_pictures
from loralab.data.images.processor import PictureProcessor
from loralab.data.prompts.encoding import TextEncoder
from loralab.data.prompts.template_text import explain_render_error, missing_end
from loralab.data.prompts.templates import BOS_PREFIXES, RenderProbe, usable_templates
from loralab.errors import DataError, ModelError, TemplateError
from loralab.lookup import suggest

_PROBE = "loralab-probe-answer"
_BEGINNINGS = ("Below is a text.", "a", "1 + 1")

Tools: TypeAlias = Sequence[Mapping[str, Any]]
Request: TypeAlias = tuple[Sequence[Message], Tools]


@dataclass(frozen=True, slots=True)
class StopTokens:
    """Tokens that end an answer.

    Attributes:
        ids: token ids, the one that training writes first.
        texts: the same tokens as text.
        reason: where they come from.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    reason: str


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer starts plain text with its bos token."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def choose_bos_prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the Jinja text that makes a rendered prompt begin as the tokenizer begins plain text."""
    if not adds_bos(tokenizer):
        return ""
    plain = [tokenizer(text)["input_ids"] for text in _BEGINNINGS]
    for blank, prefix in BOS_PREFIXES.items():
        rendered = [f"{tokenizer.bos_token}{blank}{text}" for text in _BEGINNINGS]
        if tokenizer(rendered, add_special_tokens=False)["input_ids"] == plain:
            return prefix
    return BOS_PREFIXES[""]


def apply_stop_setting(tokenizer: PreTrainedTokenizerBase, setting: Sequence[str] | None) -> None:
    """Make the first of `data.stop_tokens` the tokenizer's end token, so that templates write it.

    Raises:
        DataError: a stop token is not one token of the vocabulary.
    """
    if setting is None:
        return
    if not setting:
        raise DataError("no stop token given", where="key data.stop_tokens", fix="list at least one, or remove the key")
    vocabulary = tokenizer.get_vocab()
    for text in setting:
        if text not in vocabulary:
            known = [*tokenizer.all_special_tokens] or list(vocabulary)[:8]
            raise DataError(
                f"not a token of this tokenizer: {text!r}", where="key data.stop_tokens", fix=suggest(text, known)
            )
    tokenizer.eos_token = setting[0]
    added = tokenizer.added_tokens_decoder.get(vocabulary[setting[0]])
    if added is None or not added.special:
        # As loading the saved tokenizer would make it; else serving would read the same text as other tokens.
        tokenizer.add_special_tokens({"eos_token": setting[0]})


def own_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the tokenizer's own chat template, of several named ones the default, or None."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    return own if isinstance(own, str) else None


def no_sight() -> ModelError:
    """Return the error of rows with pictures for a model that reads none, or none in a way that is known here."""
    return ModelError(
        "rows with pictures, but the model reads none",
        where="key model.name",
        fix="take one that does in a way that is known here: qwen2_vl, qwen2_5_vl, llava, idefics3, smolvlm "
        "(qwen3_vl, gemma3 and others put pictures into the decoder in ways that token trees cannot take)",
    )


def wants_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Return whether a template reads a turn's content as a list of parts alone, as many of vision models do.

    Such a one writes nothing of a content that is text.
    """

    def written(listed: bool) -> bool:
        message = Message("user", _PROBE).as_dict(listed=listed)
        try:
            return _PROBE in str(tokenizer.apply_chat_template([message], chat_template=template, tokenize=False))
        except Exception:  # noqa: BLE001 - a template is a program: whatever it raises is its own
            return False

    return not written(False) and written(True)


def render_with(tokenizer: PreTrainedTokenizerBase) -> RenderProbe:
    """Return what renders a conversation under a tokenizer with a template that is not chosen yet."""

    def render(template: str, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        listed = wants_parts(tokenizer, template)
        try:
            text = tokenizer.apply_chat_template(
                [message.as_dict(listed=listed) for message in messages],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
            return _writable(text)
        except Exception as error:  # a template is a program: whatever it raises is its own
            raise _refusal(messages, error) from error

    return render


def _writable(text: object) -> str:
    """Return what a template made, which may hold characters that UTF-8, and with it every tokenizer, cannot write.

    Raises:
        UnicodeEncodeError: it does.
    """
    made = str(text)
    if not made.isascii():
        made.encode()
    return made


def _refusal(messages: Sequence[Message], error: Exception) -> TemplateError:
    return TemplateError(
        f"the template cannot render {' > '.join(m.role for m in messages)}: {explain_render_error(error)}",
        where="key data.template",
        fix="choose another data.template, or mend the Jinja file",
    )


class Prompter:
    """Makes prompts with one tokenizer and its chat template.

    Args:
        tokenizer: with `chat_template` set.
        stop_setting: `data.stop_tokens`, already applied by `apply_stop_setting`.
        system_prompt: system message that belongs before conversations without one of their own.
        pictures: what the model's processor makes of pictures, or None where it reads none.

    Attributes:
        tokenizer: as given.
        pictures: as given; may be set later.
        stop: tokens that end an answer.
        system_prompt: as given, or what the rows turned out to have in common.
        opens_answers: whether the template writes a generation prompt.

    Raises:
        DataError: the template cannot be rendered, or there is no stop token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_setting: Sequence[str] | None = None,
        *,
        system_prompt: str | None = None,
        pictures: PictureProcessor | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.pictures = pictures
        self._encoder = TextEncoder(tokenizer)
        self._listed = wants_parts(tokenizer, str(tokenizer.chat_template))
        self.system_prompt = system_prompt
        self.stop = self._resolve_stop(stop_setting)
        self._joint = self._choose_joint()
        probe = [Message("user", _PROBE)]
        prompt, plain = (self.render(probe, add_generation_prompt=wanted) for wanted in (True, False))
        self.opens_answers = prompt != plain

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Tools = ()) -> str:
        """Return the text that the template makes of `messages`.

        Raises:
            TemplateError: the template refuses them.
        """
        return self._apply([messages], add_generation_prompt, tools)[0]

    def render_all(self, requests: Sequence[Request], *, add_generation_prompt: bool) -> list[str]:
        """Return the text of each of many conversations; those without tools go through one call.

        Raises:
            TemplateError: the template refuses one.
        """
        plain = [index for index, (_, tools) in enumerate(requests) if not tools]
        texts: dict[int, str] = {}
        try:
            made = self._apply([requests[index][0] for index in plain], add_generation_prompt) if plain else []
            texts = dict(zip(plain, made, strict=True))
        except TemplateError:
            if len(requests) == 1:
                raise
        # One by one where a template refused one of many: the error then names it.
        return [
            texts[index]
            if index in texts
            else self.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
            for index, (messages, tools) in enumerate(requests)
        ]

    def _apply(
        self, conversations: Sequence[Sequence[Message]], add_generation_prompt: bool, tools: Tools = ()
    ) -> list[str]:
        try:
            texts = self.tokenizer.apply_chat_template(
                [[message.as_dict(listed=self._listed) for message in messages] for messages in conversations],
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
            return [_writable(text) for text in texts]
        except Exception as error:  # a template is a program: whatever it raises is its own
            raise _refusal(conversations[0], error) from error

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of rendered texts; the template alone decides on special tokens."""
        return self._encoder(texts)

    def encode_answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of answers, as they continue a prompt.

        SentencePiece-like tokenizers put a blank before every text; an answer behind a prompt has
        none. A special token before it keeps the blank away and is taken off again.
        """
        if self._joint is None:
            return self.encode(texts)
        text, token = self._joint
        encoded = self.encode([text + answer for answer in texts])
        return [
            ids[1:] if ids[:1] == [token] else self.encode([answer])[0]
            for ids, answer in zip(encoded, texts, strict=True)
        ]

    def place(self, ids: list[int], files: Sequence[ImageFile]) -> tuple[list[int], tuple[PlacedImage, ...]]:
        """Return a prompt's ids with the tokens of its pictures in the place of their markers, and where they are.

        Args:
            ids: of the rendered prompt.
            files: its pictures, in order.

        Raises:
            TemplateError: the template does not write one marker for each picture.
            ModelError: there are pictures, and the model reads none.
        """
        if self.pictures is not None:
            return self.pictures.place(ids, files)
        if files:
            raise no_sight()
        return ids, ()

    def fold(self, ids: list[int], images: Sequence[PlacedImage]) -> list[int]:
        """Return a prompt's ids with one marker in the place of each picture's tokens, as they are shown to people."""
        return fold_pictures(ids, images, self.pictures.token) if self.pictures is not None and images else ids

    def encode_prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """Return the ids of the serving call: the rendered messages and the generation prompt, without pictures."""
        return self.encode([self.render(messages, add_generation_prompt=True, tools=tools)])[0]

    def encode_request(self, messages: Sequence[Message]) -> tuple[list[int], tuple[PlacedImage, ...]]:
        """Return the ids of the serving call with the tokens of its pictures, and where these are."""
        files = [part.file for message in messages for part in message.images if part.file is not None]
        return self.place(self.encode_prompt(messages), files)

    def serve(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """Return the ids that a server with the tokenizer's files and nothing of loralab would send.

        Raises:
            TemplateError: the template refuses the messages.
        """
        try:
            encoded: Any = self.tokenizer.apply_chat_template(
                [message.as_dict(listed=self._listed) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                tokenize=True,
                add_generation_prompt=True,
                return_dict=True,
            )
        except Exception as error:  # as in `render`
            raise _refusal(messages, error) from error
        return [int(token) for token in encoded["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without stop tokens at the end."""
        kept = list(ids)
        while kept and kept[-1] in self.stop.ids:
            kept.pop()
        return str(self.tokenizer.decode(kept, clean_up_tokenization_spaces=False))

    def _choose_joint(self) -> tuple[str, int] | None:
        """Return a special token that leaves the text behind it alone, or None."""
        for token_id, token in self.tokenizer.added_tokens_decoder.items():
            if token.special and not token.rstrip and not token.lstrip:
                return str(token.content), int(token_id)
        return None

    def _no_stop(self) -> DataError:
        example = (self.tokenizer.all_special_tokens or ["</s>"])[0]
        return DataError(
            "this tokenizer has no end token and the template writes none of its own",
            where="key data.stop_tokens",
            fix=f"name one, for example data.stop_tokens: [{example!r}]",
        )

    def _ids_of(self, tokens: Sequence[str]) -> tuple[int, ...]:
        vocabulary = self.tokenizer.get_vocab()
        return tuple(vocabulary[token] for token in tokens)

    def _resolve_stop(self, setting: Sequence[str] | None) -> StopTokens:
        tokenizer = self.tokenizer
        if setting:
            return StopTokens(self._ids_of(setting), tuple(setting), "set in data.stop_tokens")
        if tokenizer.eos_token is None and "eos_token" in str(tokenizer.chat_template):
            raise self._no_stop()
        text = self.render([Message("user", "question"), Message("assistant", _PROBE)], add_generation_prompt=False)
        behind = text.rpartition(_PROBE)[2].lstrip()
        # Added tokens count whether they are marked as special or not: what the template writes there ends answers.
        added = (str(token.content) for token in tokenizer.added_tokens_decoder.values())
        known = {*tokenizer.all_special_tokens, *added}
        written = [token for token in known if token and behind.startswith(token)]
        if not written:
            self._refuse_missing_end(behind)
        stops = [max(written, key=len)] if written else []
        reason = f"the template writes {stops[0]} after an answer" if stops else ""
        if tokenizer.eos_token is not None and tokenizer.eos_token not in stops:
            stops.append(tokenizer.eos_token)
            ends = "the tokenizer's end token"
            reason = f"{reason}; {ends} also stops" if reason else f"{ends} (the template writes none)"
        if not stops:
            raise self._no_stop()
        return StopTokens(self._ids_of(stops), tuple(stops), reason)

    def _refuse_missing_end(self, behind: str) -> None:
        vocabulary = self.tokenizer.get_vocab()
        missing = missing_end(behind, vocabulary)
        if missing is None:
            return
        end = self.tokenizer.eos_token or (self.tokenizer.all_special_tokens or ["</s>"])[0]
        raise TemplateError(
            f"the template ends an answer with {missing!r}, which is no token of this tokenizer: "
            "generation could not stop on it",
            where="key data.template",
            fix=f"choose a template that fits ({', '.join(usable_templates(vocabulary))}), or end answers with a token "
            f"that there is: data.stop_tokens: [{end!r}]",
        )
