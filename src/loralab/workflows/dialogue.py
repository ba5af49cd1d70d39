"""A chat without its model: turns, commands, and which of them still fit.

Owns what a turn does and what is kept of the conversation. Who answers, and where turns come
from and text goes to, is handed in: the loop runs without a model and without a terminal.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from loralab.data.example import ImageFile, Message
from loralab.errors import ConfigError, LoralabError
from loralab.lookup import suggest
from loralab.workflows.prompts import check_text, user_turn

BASE, ADAPTER = "base", "adapter"


@dataclass(frozen=True, slots=True)
class Turn:
    """What a user wrote.

    Attributes:
        text: without the marks that held its lines together.
        where: where it stands, for errors.
        literal: whether it is a text whatever it begins with, never a command.
    """

    text: str
    where: str
    literal: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """What an answerer wrote.

    Attributes:
        text: the answer, all of which has been written.
        cut: why it ended without a stop token, or None where it ended by one.
        interrupted: whether the user stopped it.
    """

    text: str
    cut: str | None = None
    interrupted: bool = False


@dataclass(frozen=True, slots=True)
class Exchange:
    """A user turn and its answer.

    Attributes:
        question: the user turn.
        answer: the answer.
        speaker: `BASE` or `ADAPTER`, who gave it.
        pictures: that stood before the user turn's text.
    """

    question: str
    answer: str
    speaker: str
    pictures: tuple[ImageFile, ...] = ()


class Answerer(Protocol):
    """The model, as a chat knows it."""

    def fits(self, messages: Sequence[Message]) -> bool:
        """Return whether the prompt of a conversation leaves an answer its room."""

    def check_system(self, system: str) -> None:
        """Raise `DataError` where the template cannot send a system message."""

    def look_at(self, path: str) -> ImageFile:
        """Look at a picture; raise `DataError` where it is none, `ModelError` where the model reads none."""

    def answer(self, messages: Sequence[Message], *, base: bool, write: Callable[[str], None]) -> Reply:
        """Answer the last turn and write the text as it comes; `base` leaves the adapter out."""


class Chat:
    """A conversation and what a user can do with it.

    Args:
        answerer: who answers.
        write: takes an answer's text, piece by piece.
        note: takes lines about the chat itself.
        system: the system message, or None.
        base: whether the base model answers, without the adapter.

    Attributes:
        exchanges: turns and answers so far, the oldest first.
        pictures: what the next question begins with.
        left_out: number of the oldest exchanges that the last prompt had no room for.
        done: whether the user has left.
    """

    def __init__(
        self,
        answerer: Answerer,
        *,
        write: Callable[[str], None],
        note: Callable[[str], None],
        system: str | None = None,
        base: bool = False,
    ) -> None:
        self.system = system
        self.base = base
        self.note = note
        self.exchanges: list[Exchange] = []
        self.pictures: list[ImageFile] = []
        self.left_out = 0
        self.done = False
        self._answerer = answerer
        self._write = write

    @property
    def speaker(self) -> str:
        """Who answers the next turn: `BASE` or `ADAPTER`."""
        return BASE if self.base else ADAPTER

    def take(self, turn: Turn) -> None:
        """Answer a turn, or do what it commands; an empty one is passed over.

        Raises:
            ConfigError: no such command.
            DataError: the turn is no text, or the template cannot render the conversation.
            ModelError: the turn alone is longer than the model's positions.
        """
        if not turn.text.strip():
            return
        text = turn.text
        if not turn.literal and text.startswith("/"):
            if not text.startswith("//"):
                self._obey(turn)
                return
            text = text[1:]
        check_text(text, where=turn.where)
        self._ask(text)

    def start_anew(self, system: str | None) -> None:
        """Forget the conversation and go on under another system message.

        Raises:
            DataError: the system message is no text, or the template refuses it.
        """
        if system is not None:
            check_text(system, where="system message")
            self._answerer.check_system(system)
        self.system = system
        self.exchanges.clear()
        self.pictures.clear()
        self.left_out = 0

    def show(self, path: str) -> None:
        """Put a picture into the next question.

        Raises:
            DataError: it is not there, or is no picture.
            ModelError: the model reads no pictures.
        """
        self.pictures.append(self._answerer.look_at(path))

    def _obey(self, turn: Turn) -> None:
        name, *rest = turn.text.split(maxsplit=1)
        if name not in COMMANDS:
            hint = f"{suggest(name, COMMANDS)}; a text that begins with / is written with //"
            raise ConfigError(f"no such command: {name!r}", where=turn.where, fix=hint)
        command, argument = COMMANDS[name], rest[0].rstrip() if rest else ""
        if argument and command.argument is None:
            raise ConfigError(f"{name} takes no text, got {argument!r}", where=turn.where, fix=f"write {name} alone")
        command.run(self, argument)

    def _ask(self, text: str) -> None:
        messages = self._fitting(text)
        reply = self._answerer.answer(messages, base=self.base, write=self._write)
        self._write("\n")
        if reply.interrupted and not reply.text:
            self.note("stopped before a word was written: your turn is not kept")
            return
        if reply.interrupted:
            self.note("stopped; what was written is kept as the answer")
        elif reply.cut is not None:
            self.note(reply.cut)
        elif not reply.text:
            self.note("an empty answer: the stop token came first")
        self.exchanges.append(Exchange(text, reply.text, self.speaker, tuple(self.pictures)))
        self.pictures.clear()

    def _fitting(self, text: str) -> list[Message]:
        """Return the messages of the next prompt, without the oldest exchanges where they do not fit."""
        left_out = 0
        messages = self._messages(text, left_out)
        while left_out < len(self.exchanges) and not self._answerer.fits(messages):
            left_out += 1
            messages = self._messages(text, left_out)
        if left_out > self.left_out:
            oldest = "exchange is" if left_out == 1 else f"{left_out} exchanges are"
            self.note(f"the conversation has grown longer than the model's positions: its oldest {oldest} left out")
        self.left_out = left_out
        return messages

    def _messages(self, text: str, left_out: int) -> list[Message]:
        before = [Message("system", self.system)] if self.system else []
        turns = [
            message
            for exchange in self.exchanges[left_out:]
            for message in (user_turn(exchange.question, exchange.pictures), Message("assistant", exchange.answer))
        ]
        return [*before, *turns, user_turn(text, self.pictures)]


def hold_chat(chat: Chat, read: Callable[[str], Turn | None], *, interactive: bool) -> None:
    """Take turns until there are no more, or the user leaves.

    Args:
        chat: the conversation.
        read: shows a prompt and returns the next turn, or None at the end of the input.
        interactive: whether a person sits there: mistakes are then told and forgiven.

    Raises:
        LoralabError: a mistake in input that nobody sits at.
    """
    leaving = False
    while not chat.done:
        try:
            turn = read(f"to {chat.speaker}> ")
            if turn is None:
                return
            leaving = False
            _answer(chat, turn, interactive=interactive)
        except LoralabError as error:
            if not interactive:
                raise
            for problem in error.problems:
                chat.note(f"{problem.what}; {problem.fix}")
        except KeyboardInterrupt:
            if not interactive:
                raise
            if leaving:
                return
            leaving = True
            chat.note("to leave: Ctrl-C again, Ctrl-D or /exit")


def _answer(chat: Chat, turn: Turn, *, interactive: bool) -> None:
    try:
        chat.take(turn)
    except KeyboardInterrupt:  # the second Ctrl-C: the first one waits for the token that is being computed
        if not interactive:
            raise
        chat.note("broken off: your turn is not kept")


@dataclass(frozen=True, slots=True)
class Command:
    """Something that a chat does at the user's word.

    Attributes:
        run: takes the chat and the text behind the command.
        does: what it does, for `/help`.
        argument: name of the text behind the command, or None where there is none.
    """

    run: Callable[[Chat, str], None]
    does: str
    argument: str | None = None


def _switch(chat: Chat, *, base: bool) -> None:
    chat.base = base
    who = "the base model, without the adapter," if base else "the adapter"
    chat.note(f"{who} answers from now on")


def _reset(chat: Chat, _: str) -> None:
    count = len(chat.exchanges)
    chat.start_anew(chat.system)
    kept = "" if chat.system is None else "; the system message stays"
    chat.note(f"forgotten: {count} {'exchange' if count == 1 else 'exchanges'}{kept}")


def _system(chat: Chat, text: str) -> None:
    if not text:
        chat.note("no system message" if chat.system is None else f"system message: {chat.system}")
        return
    chat.start_anew(None if text == "-" else text)
    what = "no system message" if chat.system is None else "new system message"
    chat.note(f"{what}; the conversation starts anew")


def _image(chat: Chat, path: str) -> None:
    if path == "-":
        count = len(chat.pictures)
        chat.note(f"taken out again: {count} {'picture' if count == 1 else 'pictures'}")
        chat.pictures.clear()
    elif path:
        chat.show(path)
    for picture in chat.pictures:
        chat.note(f"in the next question: {picture.path} ({picture.width} x {picture.height})")
    if not chat.pictures and not path:
        chat.note("no picture in the next question")


def _history(chat: Chat, _: str) -> None:
    if chat.system is not None:
        chat.note(f"system: {chat.system}")
    for number, exchange in enumerate(chat.exchanges):
        if number == chat.left_out and number:
            chat.note("(up to here left out of the last prompt)")
        shown = "".join(f"[{picture.path}] " for picture in exchange.pictures)
        chat.note(f"user: {shown}{exchange.question}\n{exchange.speaker}: {exchange.answer}")
    if not chat.exchanges:
        chat.note("nothing said yet")


def _undo(chat: Chat, _: str) -> None:
    if not chat.exchanges:
        chat.note("nothing to take back")
        return
    chat.note(f"taken back: {chat.exchanges.pop().question}")
    chat.left_out = min(chat.left_out, len(chat.exchanges))


def _help(chat: Chat, _: str) -> None:
    for name, command in COMMANDS.items():
        usage = name if command.argument is None else f"{name} {command.argument}"
        chat.note(f"{usage:<16}{command.does}")
    chat.note('A line that ends with \\ goes on in the next one. """ opens a text of several lines and ends it.')
    chat.note("A text that begins with / is written with //. Ctrl-C stops an answer, Ctrl-D leaves.")


def _exit(chat: Chat, _: str) -> None:
    chat.done = True


COMMANDS: dict[str, Command] = {
    "/base": Command(lambda chat, _: _switch(chat, base=True), "let the base model answer, without the adapter"),
    "/adapter": Command(lambda chat, _: _switch(chat, base=False), "let the adapter answer"),
    "/system": Command(_system, "start anew under this system message (-: none); alone, show it", "[TEXT]"),
    "/image": Command(_image, "put a picture into the next question (-: take all out); alone, show them", "[FILE]"),
    "/reset": Command(_reset, "forget the conversation"),
    "/undo": Command(_undo, "take the last exchange back"),
    "/history": Command(_history, "show the conversation"),
    "/help": Command(_help, "show this"),
    "/exit": Command(_exit, "leave"),
    "/quit": Command(_exit, "leave"),
}
