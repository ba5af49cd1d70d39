"""One answer as it comes: text that is whole, piece by piece.

Owns which part of a growing answer no later token can change, and how a generation is stopped
on request. What an answer is, and its settings, stand in `generate.py`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from loralab.data.example import PlacedImage
from loralab.data.prompts.prompter import Prompter
from loralab.evaluation.generate import Answer, GenerationSettings, build_generation_config, read_answer
from loralab.evaluation.prompt_pictures import PictureInputs
from loralab.models.supervised import SupervisedPeftModel

# How SentencePiece-like vocabularies write a token that is one byte of a character.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# What decoders put where bytes are no whole character (yet).
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class WholeText:
    """The text of a growing list of tokens, given out as soon as no later token can change it.

    All tokens are decoded together each time: the blank that decoders take from the first token,
    or put between two, then comes out as in the whole answer.

    Args:
        prompter: decodes.
    """

    def __init__(self, prompter: Prompter) -> None:
        self.given = ""
        self._prompter = prompter
        self._ids: list[int] = []

    def add(self, token: int) -> str:
        """Take the next token and return the text that is whole by now, as far as it is new."""
        self._ids.append(token)
        # A run of byte tokens is decoded as one: until it ends, a bad byte would undo its good ones.
        if _BYTE_TOKEN.fullmatch(str(self._prompter.tokenizer.convert_ids_to_tokens(token))):
            return ""
        return self._give(self._prompter.decode(self._ids).rstrip(_INCOMPLETE))

    def finish(self) -> str:
        """Return the rest, characters that stay incomplete included."""
        text = self._prompter.decode(self._ids)
        if not text.startswith(self.given):  # a decoder that takes back what it gave: then all of it, anew
            self.given = text
            return f"\n{text}"
        return self._give(text)

    def _give(self, text: str) -> str:
        if not text.startswith(self.given):
            return ""
        new = text[len(self.given) :]
        self.given = text
        return new


class _Streamer(BaseStreamer):
    """Writes an answer's text while its tokens come; the prompter decodes a stop token to nothing."""

    def __init__(self, prompter: Prompter, write: Callable[[str], None]) -> None:
        self._write = write
        self._text = WholeText(prompter)
        self._prompt_seen = False

    @property
    def written(self) -> str:
        return self._text.given

    def put(self, value: Tensor) -> None:
        """Take the prompt, which comes first, or the next token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.flatten().tolist():
            self._pass_on(self._text.add(token))

    def end(self) -> None:
        """Take the end of the generation; what to do with the rest is the caller's to say."""

    def finish(self) -> None:
        """Write the rest."""
        self._pass_on(self._text.finish())

    def _pass_on(self, text: str) -> None:
        if text:
            self._write(text)


class _OnRequest(StoppingCriteria):
    """Ends a generation once it is asked to."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self._should_stop(), dtype=torch.bool, device=input_ids.device)


def stream_answer(
    model: SupervisedPeftModel,
    prompt: Sequence[int],
    *,
    images: Sequence[PlacedImage] = (),
    prompter: Prompter,
    settings: GenerationSettings,
    write: Callable[[str], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> Answer:
    """Answer one prompt and write the text as it comes.

    Sampling goes on with torch's generator as it stands: `settings.seed` is the caller's to set.

    Args:
        model: base with adapter (call within `model.disable_adapter()` for the base).
        prompt: token ids of the prompt; it must leave room for the answer.
        images: pictures in the prompt, in order.
        prompter: knows stop tokens and decoding.
        settings: how to generate.
        write: takes the text, piece by piece, without the stop token.
        should_stop: asked after every token.

    Returns:
        The answer; one that was stopped on request has the text that was written.

    Raises:
        DataError: a picture cannot be decoded.
        ModelError: there are pictures, and the model reads none.
    """
    ids = torch.as_tensor([list(prompt)], dtype=torch.int64, device=model.embedding.weight.device)
    pictures = PictureInputs(model, prompter.pictures).read(ids, [images]) if images else {}
    streamer = _Streamer(prompter, write)
    was_training = model.training
    model.eval()
    generate = cast(Callable[..., Tensor], model.generate)
    try:
        with torch.inference_mode():
            out = generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **pictures,
                generation_config=build_generation_config(settings, prompter),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_OnRequest(should_stop)]),
            )
    finally:
        model.train(was_training)
    answer = read_answer(out[0, ids.shape[1] :].tolist(), prompter)
    if not answer.stopped and answer.tokens != settings.max_new_tokens:  # stopped on request
        return Answer(streamer.written, False, answer.tokens)
    streamer.finish()
    return answer
