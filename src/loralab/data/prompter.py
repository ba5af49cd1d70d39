"""The one place where prompts are made: messages to text to token ids.

Owns the serving call, the stop tokens and the prompt contract that travels with an adapter.
Training takes its prompts from here too, so what is trained is what is sent.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase

from loralab.data.example import Message
from loralab.data.templates import BOS_PREFIXES
from loralab.errors import DataError, PromptContractError
from loralab.lookup import suggest

CONTRACT_VERSION = 1
_PROBE = "loralab-probe-answer"
_BEGINNINGS = ("Below is a text.", "a", "1 + 1")
_GOLDEN_PROMPTS = ("What is the capital of France?", "Sort these: 3, 1, 2.", "Grüße, 世界! 👋\n\nSecond line.")


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


class Prompter:
    """A tokenizer with its template and stop tokens.

    Args:
        tokenizer: with `chat_template` set.
        stop_setting: `data.stop_tokens`, already applied by `apply_stop_setting`.

    Raises:
        DataError: the template cannot be rendered, or there is no stop token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_setting: Sequence[str] | None = None) -> None:
        self.tokenizer = tokenizer
        self.stop = self._resolve_stop(stop_setting)
        self._joint = self._choose_joint()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Return the text that the template makes of `messages`.

        Raises:
            DataError: the template refuses them.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                [message.as_dict() for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is a program: whatever it raises is its own
            raise DataError(
                f"the template cannot render {' > '.join(m.role for m in messages)}: {error}",
                where="key data.template",
                fix="choose another data.template, or mend the Jinja file",
            ) from error
        return str(text)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of rendered texts; the template alone decides on special tokens."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

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

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the serving call: the rendered messages and the generation prompt."""
        return self.encode([self.render(messages, add_generation_prompt=True)])[0]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without stop tokens at the end."""
        kept = list(ids)
        while kept and kept[-1] in self.stop.ids:
            kept.pop()
        return str(self.tokenizer.decode(kept, clean_up_tokenization_spaces=False))

    def split_turn(self, messages: Sequence[Message], turn: int) -> tuple[str, str]:
        """Return prompt and answer text of one assistant turn.

        The prompt is the serving call's text; the answer is the rest of the rendering, up to and
        including the stop token (without one where the template writes none).

        Raises:
            DataError: the rendering of the turn does not begin with its own prompt.
        """
        prompt = self.render(messages[:turn], add_generation_prompt=True)
        whole = self.render(messages[: turn + 1], add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise DataError(
                f"the template does not extend its own prompt at turn {turn + 1} ({messages[turn].role})",
                where="key data.template",
                fix="choose another data.template: with this one, training would not see what serving sends",
            )
        rest, content = whole[len(prompt) :], messages[turn].content
        if content not in rest:
            content = content.strip()
        start = rest.find(content) + len(content) if content in rest else 0
        ends = [rest.find(text, start) + len(text) for text in self.stop.texts if text in rest[start:]]
        return prompt, rest[: min(ends)] if ends else rest

    def contract(self) -> dict[str, Any]:
        """Return the prompt contract: template, stop tokens and golden prompts with their ids."""
        template = str(self.tokenizer.chat_template)
        return {
            "version": CONTRACT_VERSION,
            "template": template,
            "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
            "special_tokens": "written by the template alone (add_special_tokens=False)",
            "stop_token_ids": list(self.stop.ids),
            "stop_tokens": list(self.stop.texts),
            "golden": [{"prompt": p, "ids": self.encode_prompt([Message("user", p)])} for p in _GOLDEN_PROMPTS],
        }

    def check_contract(self, contract: Mapping[str, Any], *, where: str) -> None:
        """Check that this prompter sends what the contract's golden prompts promise.

        Raises:
            PromptContractError: template, stop tokens or golden ids differ.
        """
        now = self.contract()
        if now["template"] != contract.get("template"):
            _break(f"template {_first_difference(now['template'], str(contract.get('template')))}", where)
        if now["stop_token_ids"] != contract.get("stop_token_ids"):
            _break(f"stop_token_ids is {now['stop_token_ids']}, trained with {contract.get('stop_token_ids')}", where)
        for golden in contract.get("golden", []):
            ids = self.encode_prompt([Message("user", golden["prompt"])])
            if ids != golden.get("ids"):
                _break(f"{golden['prompt']!r} gives ids {ids}, trained with {golden.get('ids')}", where)

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
        added = (str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special)
        special = {*tokenizer.all_special_tokens, *added}
        written = [token for token in special if token and behind.startswith(token)]
        stops = [max(written, key=len)] if written else []
        reason = f"the template writes {stops[0]} after an answer" if stops else ""
        if tokenizer.eos_token is not None and tokenizer.eos_token not in stops:
            stops.append(tokenizer.eos_token)
            ends = "the tokenizer's end token"
            reason = f"{reason}; {ends} also stops" if reason else f"{ends} (the template writes none)"
        if not stops:
            raise self._no_stop()
        return StopTokens(self._ids_of(stops), tuple(stops), reason)


def load_contracted(tokenizer: PreTrainedTokenizerBase, contract: Mapping[str, Any], *, where: str) -> Prompter:
    """Return the prompter of an adapter's tokenizer, checked against the adapter's contract.

    Raises:
        PromptContractError: the contract is damaged, or the tokenizer does not keep it.
    """
    missing = [key for key in ("template", "stop_tokens", "stop_token_ids", "golden") if not contract.get(key)]
    if missing:
        _break(f"the contract has no {', '.join(missing)}", where)
    if not isinstance(tokenizer.chat_template, str):
        _break("the tokenizer's chat template is missing", where)
    unknown = [token for token in contract["stop_tokens"] if token not in tokenizer.get_vocab()]
    if unknown:
        _break(f"the tokenizer has no {unknown[0]!r}", where)
    prompter = Prompter(tokenizer, contract["stop_tokens"])
    prompter.check_contract(contract, where=where)
    return prompter


def _break(what: str, where: str) -> NoReturn:
    raise PromptContractError(
        f"prompt contract broken: {what}",
        where=where,
        fix="restore the adapter folder's tokenizer files, or train again with the new template",
    )


def _first_difference(now: str, trained: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(now, trained, strict=False)) if a != b), min(len(now), len(trained)))
    start = max(at - 20, 0)
    return f"is ...{now[start : at + 20]!r}..., trained with ...{trained[start : at + 20]!r}... (character {at})"
