"""The `chat` command: a conversation with an adapter, under its prompt contract."""

import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from loralab.data.example import ImageFile, Message
from loralab.evaluation.generate import GenerationSettings, answer_room
from loralab.evaluation.streaming import stream_answer
from loralab.models.load import max_positions
from loralab.progress import Reporter
from loralab.training.callbacks import StopRequest, catching_signals
from loralab.workflows.dialogue import Chat, Reply
from loralab.workflows.generate import check_sampling, check_system, resolve_system
from loralab.workflows.given_pictures import check_sight, look_at_given
from loralab.workflows.prompts import check_texts
from loralab.workflows.session import PROMPT_SETTINGS, Session, open_session

_READ = (
    *PROMPT_SETTINGS,
    "evaluation.max_new_tokens",
)
# A conversation gives way to its next answer until this share of the positions is free for it.
_ANSWER_SHARE = 4


def open_chat(
    path: Path,
    *,
    settings: GenerationSettings,
    system: str | None = None,
    base: bool = False,
    overrides: Sequence[str] = (),
    base_model: str | None = None,
    interactive: bool = False,
    write: Callable[[str], None],
    reporter: Reporter,
) -> Chat:
    """Open an adapter for a conversation.

    Sampling is seeded once, here, so that a question asked again may get another answer.

    Args:
        path: run folder or adapter folder.
        settings: how to generate.
        system: system message; None takes the one of the prompt contract, if there is one, and an
            empty text none.
        base: whether the base model answers first.
        overrides: `section.key=value` on top of the run's configuration.
        base_model: base to use instead of the recorded one.
        interactive: whether a person sits there, whose Ctrl-C stops an answer.
        write: takes the text of the answers.
        reporter: told of everything else.

    Raises:
        UserError: a setting cannot be used, or the adapter does not load.
        PromptContractError: the tokenizer would prompt differently than in training.
    """
    check_sampling(settings)
    check_texts([], system)
    session = open_session(path, overrides=overrides, base_model=base_model, reporter=reporter, reads=_READ)
    chosen = resolve_system(session, system, reporter)
    torch.manual_seed(settings.seed)
    answerer = SessionAnswerer(session, settings, interactive=interactive)
    return Chat(answerer, write=write, note=reporter.say, system=chosen, base=base)


class SessionAnswerer:
    """Answers a conversation with an open adapter, or with its base.

    Args:
        session: the open adapter.
        settings: how to generate.
        interactive: whether the first Ctrl-C stops an answer, not the program.
    """

    def __init__(self, session: Session, settings: GenerationSettings, *, interactive: bool) -> None:
        self._session = session
        self._settings = settings
        self._interactive = interactive
        self._wanted = settings.max_new_tokens or session.config.evaluation.max_new_tokens
        self._positions = max_positions(session.model.language_model.config)

    def fits(self, messages: Sequence[Message]) -> bool:
        """Return whether a prompt leaves room for the longest answer, or a quarter of the positions.

        Raises:
            DataError: the template cannot render the messages.
        """
        if self._positions is None:
            return True
        reserved = min(self._wanted, self._positions // _ANSWER_SHARE)
        return len(self._session.prompter.encode_request(messages)[0]) + reserved <= self._positions

    def check_system(self, system: str) -> None:
        """Check that a system message is part of what is sent.

        Raises:
            DataError: the template refuses it, or leaves it out.
        """
        check_system(self._session.prompter, system)

    def look_at(self, path: str) -> ImageFile:
        """Look at a picture for the next question.

        Raises:
            DataError: it is not there, or is no picture.
            ModelError: the model reads no pictures.
        """
        check_sight(self._session.prompter, where="/image")
        return look_at_given([path], where="/image")[0]

    def answer(self, messages: Sequence[Message], *, base: bool, write: Callable[[str], None]) -> Reply:
        """Answer the last turn and write the text as it comes.

        Raises:
            DataError: the template cannot render the messages, or makes no token of them.
            ModelError: the prompt leaves no position for an answer.
        """
        model, prompter = self._session.model, self._session.prompter
        prompt, images = prompter.encode_request(messages)
        room = answer_room(model, prompt, self._wanted, where="the last turn")
        catching = catching_signals(lambda _: None) if self._interactive else nullcontext(StopRequest())
        with catching as request, model.disable_adapter() if base else nullcontext():
            answer = stream_answer(
                model,
                prompt,
                images=images,
                prompter=prompter,
                settings=replace(self._settings, max_new_tokens=room),
                write=write,
                should_stop=lambda: bool(request),
            )
        if request.signal_number == signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)  # that one asked the program to end, not the answer
        if answer.stopped:
            return Reply(answer.text)
        if request and answer.tokens < room:
            return Reply(answer.text, interrupted=True)
        limit = f"max_new_tokens ({room})" if room == self._wanted else f"the last of {self._positions} positions"
        return Reply(answer.text, cut=f"the answer ended at {limit}, not by a stop token")
