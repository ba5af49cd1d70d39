"""A chat, turn by turn: what is asked, what is kept, what a user is told."""

from collections.abc import Callable, Sequence

import pytest

from loralab.data.example import ImageFile, Message
from loralab.errors import ConfigError, DataError
from loralab.workflows.dialogue import COMMANDS, Chat, Reply, Turn, hold_chat

CUT = "the answer ended at max_new_tokens (2), not by a stop token"


class Echo:
    """Answers a turn with its own words, one piece each; keeps what it was asked."""

    def __init__(self, *, room: int | None = None) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.shown: list[tuple[tuple[str, ...], ...]] = []  # the pictures of each turn, answers among them
        self.room = room  # the longest conversation that fits, in messages

    def fits(self, messages: Sequence[Message]) -> bool:
        return self.room is None or len(messages) <= self.room

    def check_system(self, system: str) -> None:
        if system == "refused":
            raise DataError("the template refuses it", where="key data.template", fix="leave it")

    def look_at(self, path: str) -> ImageFile:
        if path == "missing":
            raise DataError("no such file", where="/image", fix="name another")
        return ImageFile(path, "0" * 64, 4, 3, 1, 1)

    def answer(self, messages: Sequence[Message], *, base: bool, write: Callable[[str], None]) -> Reply:
        self.asked.append(tuple(f"{message.role[0]}:{message.content}" for message in messages))
        self.shown.append(tuple(tuple(str(image.source) for image in message.images) for message in messages))
        words = messages[-1].content.split()
        match words[0]:
            case "silence":
                return Reply("")
            case "broken":
                return Reply("", interrupted=True)
            case "twice":
                raise KeyboardInterrupt
        name = "base" if base else "adapter"
        pieces = [name, *(f" {word}" for word in words)]
        if words[0] == "stopped":
            pieces = pieces[:2]
        for piece in pieces:
            write(piece)
        cut = CUT if words[0] == "long" else None
        return Reply("".join(pieces), cut, interrupted=words[0] == "stopped")


class Talk:
    """A chat over given turns, and what came of it; a turn that is an error is raised by the reader."""

    def __init__(self, *turns: object, interactive: bool = True, room: int | None = None, **options: object) -> None:
        self.out, self.notes, self.prompts = "", list[str](), list[str]()
        self.echo = Echo(room=room)
        self.chat = Chat(self.echo, write=self.write, note=self.notes.append, **options)  # type: ignore[arg-type]
        self.waiting = list(turns)
        hold_chat(self.chat, self.read, interactive=interactive)

    def write(self, text: str) -> None:
        self.out += text

    def read(self, prompt: str) -> Turn | None:
        self.prompts.append(prompt)
        turn = self.waiting.pop(0) if self.waiting else None
        if isinstance(turn, BaseException):
            raise turn
        return turn if turn is None or isinstance(turn, Turn) else Turn(str(turn), "line 1")


def test_every_turn_is_asked_with_what_was_said_before() -> None:
    talk = Talk("one", "two", "", "  ", "three")
    assert talk.out == "adapter one\nadapter two\nadapter three\n"
    assert talk.echo.asked == [
        ("u:one",),
        ("u:one", "a:adapter one", "u:two"),
        ("u:one", "a:adapter one", "u:two", "a:adapter two", "u:three"),
    ]
    assert talk.notes == []


def test_base_and_adapter_answer_by_turns() -> None:
    talk = Talk("one", "/base", "two", "/adapter", "three", base=False)
    assert talk.out == "adapter one\nbase two\nadapter three\n"
    assert talk.prompts == [f"to {name}> " for name in ("adapter", "adapter", "base", "base", "adapter", "adapter")]
    assert talk.echo.asked[1] == ("u:one", "a:adapter one", "u:two")
    assert Talk("one", base=True).out == "base one\n"


def test_reset_keeps_the_system_message_and_undo_takes_one_exchange() -> None:
    talk = Talk("one", "two", "/undo", "three", "/reset", "four", system="be")
    assert talk.echo.asked[2:] == [("s:be", "u:one", "a:adapter one", "u:three"), ("s:be", "u:four")]
    assert talk.notes == ["taken back: two", "forgotten: 2 exchanges; the system message stays"]
    assert Talk("/undo").notes == ["nothing to take back"]


def test_system_message_is_shown_replaced_and_taken_away() -> None:
    talk = Talk("/system", "one", "/system  be kind, \nalways ", "/system", "two", "/system -", "three")
    assert talk.echo.asked == [("u:one",), ("s:be kind, \nalways", "u:two"), ("u:three",)]
    assert talk.notes == [
        "no system message",
        "new system message; the conversation starts anew",
        "system message: be kind, \nalways",
        "no system message; the conversation starts anew",
    ]


def test_refused_system_message_changes_nothing() -> None:
    talk = Talk("one", "/system refused", "two", system="be")
    assert talk.echo.asked[1] == ("s:be", "u:one", "a:adapter one", "u:two")
    assert talk.notes == ["the template refuses it; leave it"]


def test_oldest_exchanges_give_way_and_it_is_said_each_time() -> None:
    talk = Talk("one", "two", "three", "four", "five", "/history", system="be", room=6)
    assert talk.echo.asked[2:] == [
        ("s:be", "u:one", "a:adapter one", "u:two", "a:adapter two", "u:three"),
        ("s:be", "u:two", "a:adapter two", "u:three", "a:adapter three", "u:four"),
        ("s:be", "u:three", "a:adapter three", "u:four", "a:adapter four", "u:five"),
    ]
    grown = "the conversation has grown longer than the model's positions: its oldest "
    assert talk.notes[:2] == [f"{grown}exchange is left out", f"{grown}2 exchanges are left out"]
    assert talk.notes[2:] == [
        "system: be",
        "user: one\nadapter: adapter one",
        "user: two\nadapter: adapter two",
        "(up to here left out of the last prompt)",
        "user: three\nadapter: adapter three",
        "user: four\nadapter: adapter four",
        "user: five\nadapter: adapter five",
    ]


def test_last_turn_is_asked_even_where_it_does_not_fit() -> None:
    talk = Talk("one", "two", system="be", room=1)  # the answerer refuses what has no room at all
    assert talk.echo.asked == [("s:be", "u:one"), ("s:be", "u:two")]


def test_once_it_fits_again_the_next_time_is_said_again() -> None:
    talk = Talk("one", "two", "/reset", "one", "two", room=2)
    assert [note.endswith("exchange is left out") for note in talk.notes] == [True, False, True]


@pytest.mark.parametrize(
    ("turn", "note", "kept"),
    [
        ("long one", CUT, "adapter long one"),
        ("silence", "an empty answer: the stop token came first", ""),
        ("stopped one two", "stopped; what was written is kept as the answer", "adapter stopped"),
        ("broken", "stopped before a word was written: your turn is not kept", None),
        ("twice", "broken off: your turn is not kept", None),
    ],
)
def test_answers_that_end_in_other_ways(turn: str, note: str, kept: str | None) -> None:
    talk = Talk(turn, "next")
    assert talk.notes == [note]
    assert talk.echo.asked[1] == (*(() if kept is None else (f"u:{turn}", f"a:{kept}")), "u:next")


def test_unknown_command_is_told_and_the_chat_goes_on() -> None:
    talk = Talk("/bsae", "one")
    (note,) = talk.notes
    assert note.startswith("no such command: '/bsae'; did you mean '/base'? known: /base, /adapter")
    assert talk.out == "adapter one\n"


@pytest.mark.parametrize("turn", ["/bsae", "/reset all", "caf\udce9"])
def test_mistake_in_a_script_ends_it(turn: str) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        Talk(Turn(turn, "standard input, line 3"), "one", interactive=False)
    assert caught.value.problems[0].where.startswith("standard input, line 3")


def test_texts_that_begin_with_a_slash() -> None:
    talk = Talk("//base", Turn("/base", "line 1", literal=True))
    assert [asked[-1] for asked in talk.echo.asked] == ["u:/base", "u:/base"]


@pytest.mark.parametrize("word", ["/exit", "/quit"])
def test_exit_leaves(word: str) -> None:
    talk = Talk("one", word, "two")
    assert talk.waiting == ["two"]
    assert talk.out == "adapter one\n"


def test_help_names_every_command() -> None:
    text = "\n".join(Talk("/help").notes)
    assert all(name in text for name in COMMANDS)


def test_ctrl_c_at_the_prompt_leaves_the_second_time() -> None:
    hint = "to leave: Ctrl-C again, Ctrl-D or /exit"
    talk = Talk(KeyboardInterrupt(), "one", KeyboardInterrupt(), KeyboardInterrupt(), "two")
    assert talk.notes == [hint, hint]
    assert talk.waiting == ["two"]
    with pytest.raises(KeyboardInterrupt):
        Talk(KeyboardInterrupt(), interactive=False)


def test_input_that_is_no_text_is_forgiven_only_to_a_person() -> None:
    error = DataError("a text does not end", where="your turn", fix="close it")
    talk = Talk(error, "one")
    assert (talk.notes, talk.out) == (["a text does not end; close it"], "adapter one\n")
    with pytest.raises(DataError):
        Talk(error, interactive=False)


def test_pictures_stand_in_the_next_question_and_stay_with_it() -> None:
    talk = Talk("/image a.png", "/image b c.png", "one", "two", "/history")
    assert talk.echo.shown == [(("a.png", "b c.png"),), (("a.png", "b c.png"), (), ())]
    assert "in the next question: b c.png (4 x 3)" in talk.notes
    assert "user: [a.png] [b c.png] one\nadapter: adapter one" in talk.notes
    assert "user: two\nadapter: adapter two" in talk.notes


def test_pictures_are_taken_out_and_a_fresh_start_has_none() -> None:
    talk = Talk("/image a.png", "/image -", "one", "/image b.png", "/reset", "two", "/image", "/image b.png")
    assert talk.echo.shown[0] == ((),)
    assert talk.echo.shown[1] == ((),)
    assert "taken out again: 1 picture" in talk.notes
    assert "no picture in the next question" in talk.notes


def test_pictures_of_a_question_that_was_stopped_wait_for_the_next() -> None:
    talk = Talk("/image a.png", "broken off", "one")
    assert talk.echo.shown == [(("a.png",),), (("a.png",),)]


def test_a_picture_that_is_not_there_is_told_and_forgiven() -> None:
    talk = Talk("/image missing", "one")
    assert talk.notes[0] == "no such file; name another"
    assert talk.echo.shown == [((),)]
