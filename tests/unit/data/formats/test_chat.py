"""Conversations in every spelling, row by row; and rows of anything, which give an example or a `RowError`."""

import datetime
import decimal
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings

from loralab.data.example import ROLES, Conversation, Document, Example, Message, Preformatted, Tokens, ToolCall
from loralab.data.formats.chat import ROLE_NAMES
from loralab.data.formats.fields import RowError
from loralab.data.formats.table import FORMATS, build_example, resolve_format
from loralab.data.reading.sources import resolve_sources
from loralab.errors import DataError
from unit.data.malformed_rows import good_rows, malformed_rows

USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
SEARCH = {"name": "search", "description": "Finds.", "parameters": {"q": {"default": None}}}
CALL = ToolCall("weather", {"city": "Paris", "days": 2})


def nested(levels: int) -> Any:
    """Return lists in lists."""
    return [nested(levels - 1)] if levels else "x"


def read(*messages: Any, **columns: Any) -> Conversation:
    example = build_example("messages", {"messages": list(messages), **columns}, {})
    assert isinstance(example, Conversation)
    return example


def read_turn(**keys: Any) -> Message:
    """Return an assistant turn as it is read."""
    return read(USER, {"role": "assistant", **keys}).messages[1]


def read_sharegpt(*messages: tuple[str, Any], **columns: Any) -> Conversation:
    turns = [{"from": name, "value": value} for name, value in messages]
    example = build_example("sharegpt", {"conversations": turns, **columns}, {})
    assert isinstance(example, Conversation)
    return example


def error_of(*messages: Any, **columns: Any) -> str:
    with pytest.raises(RowError) as caught:
        read(*messages, **columns)
    return str(caught.value)


def test_text_stays_as_it_is() -> None:
    texts = [" \n{{name}} {% if %}\t", "", "é 中 🚀 <|im_end|>", "<think>\nx</think>"]
    found = read(*({"role": role, "content": text} for role in ("system", "user", "assistant") for text in texts))
    assert [message.content for message in found.messages] == texts * 3
    assert all(message == Message(message.role, message.content) for message in found.messages)


@pytest.mark.parametrize(("name", "role"), ROLE_NAMES.items())
def test_every_name_of_a_role(name: str, role: str) -> None:
    text = '{"name": "weather", "arguments": {"city": "Paris", "days": 2}}'
    for spelled in (name, f" {name.upper()}"):
        (message,) = read({"role": spelled, "content": text}).messages
        assert (message,) == read_sharegpt((spelled, text)).messages
        assert message.role in ROLES
        expected = Message("assistant", "", tool_calls=(CALL,)) if role == "function_call" else Message(role, text)
        assert message == expected


def test_turns_of_one_role_in_a_row_stay_apart() -> None:
    assert read(USER, USER, BOT, BOT).messages == (
        *(Message("user", "a"),) * 2,
        *(Message("assistant", "b"),) * 2,
    )
    calls = [("function_call", '{"name": "weather"}')] * 2
    assert len(read_sharegpt(("human", "a"), ("gpt", "Let me look."), *calls, ("observation", "3")).messages) == 5


def test_no_assistant_turn_is_for_the_tokenizer_to_count() -> None:
    assert read(USER).messages == (Message("user", "a"),)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([], Message("assistant", "")),
        (["b", " c"], Message("assistant", "b c")),
        (["b", {"type": "reasoning", "text": ""}], Message("assistant", "b")),
        ([{"type": "text", "text": "b"}, {"type": "text", "value": " c"}], Message("assistant", "b c")),
        ({"type": "output_text", "text": "b", "annotations": [], "image_url": None}, Message("assistant", "b")),
        ([{"type": "reasoning", "value": "r"}, {"type": "text", "value": "b"}], Message("assistant", "b", "r")),
        ([{"type": "thinking", "thinking": "r", "signature": "x"}, "b"], Message("assistant", "b", "r")),
        (
            [{"type": "tool_call", "value": {"name": "weather", "arguments": {"city": "Paris", "days": 2}}}],
            Message("assistant", "", tool_calls=(CALL,)),
        ),
        (
            [
                {"type": "reasoning", "text": "r1 "},
                {"type": "reasoning", "reasoning": "r2"},
                {"type": "text", "value": ""},
                {"type": "tool_call", "value": '{"name": "weather", "arguments": {"city": "Paris", "days": 2}}'},
                {"type": "tool_call", "value": '{"name": "w", "arguments": "Paris"}'},
            ],
            Message("assistant", "", "r1 r2", (CALL, ToolCall("w", "Paris"))),
        ),
    ],
)
def test_parts_become_one_turn(content: Any, expected: Message) -> None:
    assert read_turn(content=content) == expected


@pytest.mark.parametrize(
    ("parts", "wrong"),
    [
        ([{"type": "text", "text": "b"}, {"type": "reasoning", "text": "r"}], "[1]: reasoning behind text"),
        ([{"type": "tool_call", "value": {"name": "w"}}, "b"], "[1]: text behind tool_call"),
        ([{"type": "video", "video": "x.mp4"}], "[0] is of type video: videos and sound are not read"),
        ([{"type": "input_audio"}], "[0] is of type input_audio: videos and sound are not read"),
        ([{"type": "image"}], "[0] has none of image, path, url, value, image_url, bytes; its keys: type"),
        ([{"type": "poem", "text": "b"}], "[0].type is 'poem', no known part"),
        ([{"text": "b"}], "[0] has no 'type'; its keys: text"),
        ([{"type": "text"}], "[0] has none of text, value, content; its keys: type"),
        ([{"type": "text", "text": "b", "value": "c"}], "[0] has values that would be lost: value"),
        ([{"type": "text", "text": "b", "more": "c"}], "[0] has values that would be lost: more"),
        ([{"type": "text", "text": 5}], "[0].text is int, not a string: 5"),
        ([{"type": "tool_call", "value": "weather"}], "[0].value is no JSON (Expecting value"),
        ([5], "[0] is int, not an object: 5"),
        (5, " is int, neither a string nor a list of parts: 5"),
        ({"a": 1}, " has no 'type'; its keys: a"),
    ],
)
def test_bad_parts_are_named(parts: Any, wrong: str) -> None:
    assert error_of(USER, {"role": "assistant", "content": parts}).startswith(f"messages[1].content{wrong}")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_under_a_key(key: str) -> None:
    assert read_turn(content="b", **{key: " r\n"}) == Message("assistant", "b", " r\n")
    assert read_turn(content="b", **{key: ""}) == Message("assistant", "b")
    assert read_turn(content=None, **{key: "r"}) == Message("assistant", "", "r")


def test_reasoning_in_two_places() -> None:
    assert read_turn(content="b", reasoning="r", reasoning_content="r") == Message("assistant", "b", "r")
    bad = {"role": "assistant", "content": [{"type": "reasoning", "text": "r"}, "b"], "reasoning": "other"}
    assert error_of(bad) == "messages[0] has two reasonings that differ"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"city": "Paris"}, {"city": "Paris"}),
        ('{"city": "Paris", "n": [1, null, {"a": 2.5}]}', {"city": "Paris", "n": [1, None, {"a": 2.5}]}),
        ("{}", {}),
        ("", {}),
        (None, {}),
        ("Paris", "Paris"),
        ('["Paris"]', '["Paris"]'),
        ('{"n": NaN}', '{"n": NaN}'),
        ('{"n": 1, "n": 2}', '{"n": 1, "n": 2}'),  # an object would lose one of the two
        ('{"n": "\\ud800"}', '{"n": "\\ud800"}'),
        ("[" * 5000, "[" * 5000),
    ],
)
def test_arguments_are_an_object_where_they_can_be(arguments: Any, expected: Any) -> None:
    calls: list[Any] = [
        {"id": "7", "type": "function", "function": {"name": "w", "arguments": arguments}, "index": 0},
        {"id": "7", "name": "w", "arguments": arguments},
        {"id": "7", "type": "function", "name": "w", "arguments": arguments},
    ]
    expected_turn = Message("assistant", "", tool_calls=(ToolCall("w", expected, "7"),))
    for call in calls:
        assert read_turn(content=None, tool_calls=[call]) == expected_turn
        assert read_turn(tool_calls=json.dumps([call])) == expected_turn


def test_legacy_function_call_and_result() -> None:
    call = {"name": "weather", "arguments": '{"city": "Paris", "days": 2}'}
    result = {"role": "function", "name": "weather", "content": "12"}
    assert read(USER, {"role": "assistant", "content": "", "function_call": call}, result).messages[1:] == (
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", "12", name="weather"),
    )


def test_result_keeps_the_id_of_its_call() -> None:
    result = {"role": "tool", "tool_call_id": "7", "content": [{"type": "text", "text": "12"}]}
    assert read(USER, result).messages[1] == Message("tool", "12", call_id="7")


def test_empty_calls_are_none() -> None:
    assert read_turn(content="b", tool_calls=[], function_call=None) == Message("assistant", "b")


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        ({"tool_calls": [{"function": {"arguments": "{}"}}]}, "tool_calls[0] has no name; its keys: arguments"),
        ({"tool_calls": [{"function": "w"}]}, "tool_calls[0].function is str, not an object: 'w'"),
        (
            {"tool_calls": [{"name": "w", "parameters": {}}]},
            "tool_calls[0] has keys that no call of a fun",
        ),
        ({"tool_calls": [{"type": "custom", "name": "w"}]}, "tool_calls[0].type is 'custom'; only calls of functions"),
        ({"tool_calls": [{"name": "w", "arguments": [1]}]}, "tool_calls[0].arguments is list, neither an object nor"),
        ({"tool_calls": [{"name": "w", "id": 7}]}, "tool_calls[0].id is int, not a string: 7"),
        ({"tool_calls": [{"name": "w", "arguments": {"t": datetime.date.min}}]}, "tool_calls[0].arguments holds date"),
        ({"tool_calls": [{"name": "w", "arguments": {"t": float("nan")}}]}, "tool_calls[0].arguments holds nan"),
        ({"tool_calls": [{"name": "w", "arguments": {"t": 10**5000}}]}, "tool_calls[0].arguments holds a whole number"),
        ({"tool_calls": [{"name": "w", "arguments": {"\ud800": 1}}]}, "a key of messages[0].tool_calls[0].arguments h"),
        ({"tool_calls": 5}, "tool_calls is int, not an object: 5"),
        ({"function_call": {"name": ["w"]}}, "function_call.name is list, not a string: ['w']"),
        ({"tool_calls": [{"name": "w"}], "function_call": {"name": "w"}}, " has tool calls in two places"),
        ({}, "content is missing or null"),
        ({"content": None, "tool_calls": []}, "content is missing or null"),
        ({"content": "b", "reasoning": ["r"]}, "reasoning is list, not a string: ['r']"),
    ],
)
def test_bad_calls_are_named(keys: dict[str, Any], wrong: str) -> None:
    if not wrong.startswith(("a key", " has")):
        wrong = f"messages[0].{wrong}"
    elif wrong.startswith(" has"):
        wrong = f"messages[0]{wrong}"
    assert error_of({"role": "assistant", **keys}).startswith(wrong)


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ({"role": "narrator", "content": "a"}, "messages[0].role is 'narrator', no known role: system, developer"),
        ({"role": None, "content": "a"}, "messages[0] has no 'role'; its keys: content"),
        ({"role": 3, "content": "a"}, "messages[0].role is int, not a string: 3"),
        ({"role": "user", "content": None}, "messages[0].content is missing or null"),
        ({"role": "user", "content": "a\ud83d"}, "messages[0].content holds \\ud83d, half of a surrogate pair, at ch"),
        ({"role": "user", "content": "a", "name": 5}, "messages[0].name is int, not a string: 5"),
        ({"role": "user", "content": "a", "reasoning": "r"}, "messages[0] has reasoning, but its role is user"),
        ({"role": "tool", "tool_calls": [{"name": "w"}]}, "messages[0] has tool calls, but its role is tool"),
        (
            {"role": "user", "content": "a", "images": ["x.png"]},
            "messages[0] has the key 'images', whose value w",
        ),
        ({"role": "user", "content": "a", "refusal": "No."}, "messages[0] has the key 'refusal', whose value w"),
        ({"role": "user", "content": "a", "mask": True}, "messages[0] has the key 'mask'; write `train: true` or"),
        ({"from": "human", "value": "a"}, "messages[0] has the key 'from', whose value would be lost; known keys: rol"),
        ({5: "a"}, "messages[0] has a key that is no string: 5"),
        ("a", "messages[0] is str, not an object: 'a'"),
        (None, "messages[0] is NoneType, not an object: None"),
    ],
)
def test_bad_messages_are_named(message: Any, wrong: str) -> None:
    assert error_of(message).startswith(wrong)


def test_messages_of_the_other_format_are_told() -> None:
    assert error_of({"from": "human", "value": "a"}).endswith("; from and value are of format sharegpt")
    with pytest.raises(RowError, match="; role and content are of format messages"):
        build_example("sharegpt", {"conversations": [USER]}, {})


def test_what_is_said_about_a_message_is_no_part_of_it() -> None:
    about = {"id": "x", "timestamp": datetime.datetime.min, "lang": "en", "metadata": {"a": 1}, "tokens": 7}
    assert read({**USER, **about, "toxic": False, "refusal": None, "citations": []}).messages == (Message("user", "a"),)


@pytest.mark.parametrize("key", ["train", "loss_weight", "weight", "loss", "training", "trainable"])
def test_every_spelling_of_train(key: str) -> None:
    for value, train in ((True, True), (1, True), (1.0, True), (None, True), (False, False), (0, False), (0.0, False)):
        assert read_turn(content="b", **{key: value}) == Message("assistant", "b", train=train)
    weighted = error_of({**BOT, key: 0.5})
    assert weighted == f"messages[0].{key} is 0.5: weights between 0 and 1 are not supported; write 0 or 1"
    for value in (2, -1, float("nan"), "true", [1], decimal.Decimal(1)):
        assert error_of({**BOT, key: value}).startswith(f"messages[0].{key} is ")


def test_flags_that_do_not_agree() -> None:
    assert read_turn(content="b", train=False, weight=0) == Message("assistant", "b", train=False)
    assert error_of({**BOT, "train": True, "weight": 0}) == "messages[0]: train and weight do not agree"


@pytest.mark.parametrize(
    "value", [[WEATHER, SEARCH], json.dumps([WEATHER, SEARCH]), f" {json.dumps([WEATHER, SEARCH])}"]
)
def test_tools_are_kept_as_given(value: Any) -> None:
    assert read(USER, tools=value).tools == (WEATHER, SEARCH)
    assert read(USER, functions=value).tools == (WEATHER, SEARCH)
    assert read_sharegpt(("human", "a"), tools=value).tools == (WEATHER, SEARCH)


@pytest.mark.parametrize("value", [None, "", " ", "[]", [], "null"])
def test_no_tools(value: Any) -> None:
    assert read(USER, tools=value).tools == ()


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ("weather", "field 'tools' is text, not a list: 'weather'"),
        ("[{", "field 'tools' is no JSON (Expecting property name"),
        ({"name": "w"}, "field 'tools' is dict, not a list: {'name': 'w'}"),
        (["w"], "tools[0] is str, not an object: 'w'"),
        ([{"description": "w"}], "tools[0] has no name; its keys: description"),
        ([{"type": "function", "function": {}}], "tools[0] has no name; its keys: type, function"),
        ([{"name": "w", "parameters": {"when": datetime.date.min}}], "tools[0] holds date, which JSON does not have"),
        ({}, "field 'tools' is dict, not a list: {}"),
        ('[{"name": "w", "n": Infinity}]', "field 'tools' holds inf, which is no JSON number"),
        ('[{"name": "w", "name": "v"}]', "field 'tools' is no JSON (a key stands there twice): '[{"),
        ("[" * 9000, "field 'tools' is JSON nested too deeply"),
        ([{"name": "w", "parameters": nested(200)}], "tools[0] is nested more than 100 levels deep"),
    ],
)
def test_bad_tools_are_named(value: Any, wrong: str) -> None:
    assert error_of(USER, tools=value).startswith(wrong)


def test_system_column_goes_first() -> None:
    system = Message("system", " be brief")
    assert read(USER, system=" be brief").messages == (system, Message("user", "a"))
    assert read(USER, system_prompt=" be brief").messages[0] == system
    assert read({"role": "developer", "content": " be brief"}, USER, system=" be brief").messages[0] == system
    assert read(USER, system="").messages == read(USER, system=None).messages == (Message("user", "a"),)
    assert read_sharegpt(("human", "a"), system=" be brief").messages[0] == system
    assert error_of({"role": "system", "content": "b"}, USER, system="a").startswith("two system messages: field 'syst")


def test_no_messages() -> None:
    assert error_of() == "field 'messages' holds no message"
    with pytest.raises(RowError, match="missing field 'messages'; the row has: messages"):
        build_example("messages", {"messages": None}, {})
    with pytest.raises(RowError, match="field 'messages' is text, not a list: 'hello'"):
        build_example("messages", {"messages": "hello"}, {})


def test_messages_as_json_text() -> None:
    assert build_example("messages", {"messages": json.dumps([USER, BOT])}, {}) == read(USER, BOT)


def test_rows_of_a_parquet_file_are_those_of_json(tmp_path: Path) -> None:
    """Arrow gives every message the keys of all, with null in them."""
    call = {"id": "7", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris", "days": 2}'}}
    conversations: list[list[dict[str, Any]]] = [
        [USER, {**BOT, "train": False, "reasoning": "r"}],
        [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "7", "content": "12"}],
    ]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns} for turns in conversations]), path)
    (source,) = resolve_sources(str(path), where="test")
    rows = [row.fields for row in source.rows()]
    assert "tool_calls" in rows[0]["messages"][0]  # type: ignore[index]
    assert resolve_format("auto", {}, first=rows[0], where="f")[0] == "messages"
    assert [build_example("messages", row, {}) for row in rows] == [read(*turns) for turns in conversations]


def test_videos_and_sound_are_refused() -> None:
    expected = "field 'videos' holds ['x.mp4']: videos and sound are not read (drop the column if the text stands"
    assert error_of(USER, videos=["x.mp4"]).startswith(expected)
    assert read(USER, videos=[], audio=None).messages == (Message("user", "a"),)


@pytest.mark.parametrize(
    "value",
    [
        '{"name": "weather", "arguments": {"city": "Paris", "days": 2}}',
        '[{"name": "weather", "arguments": "{\\"city\\": \\"Paris\\", \\"days\\": 2}"}]',
        {"name": "weather", "arguments": {"city": "Paris", "days": 2}},
    ],
)
def test_sharegpt_calls(value: Any) -> None:
    found = read_sharegpt(("human", "a"), ("function_call", value), ("observation", '{"t": 12}'), ("gpt", "12"))
    assert found.messages == (
        Message("user", "a"),
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", '{"t": 12}'),
        Message("assistant", "12"),
    )


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ("weather(Paris)", r"conversations\[0\].value is no JSON \(Expecting value"),
        ("[]", r"conversations\[0\].value holds no tool call"),
        (None, r"conversations\[0\].value holds no tool call"),
        ('"weather"', r"conversations\[0\].value is str, not an object: 'weather'"),
        ('{"city": "Paris"}', r"conversations\[0\].value has keys that no call of a function has: city"),
    ],
)
def test_bad_sharegpt_calls(value: Any, wrong: str) -> None:
    with pytest.raises(RowError, match=wrong):
        read_sharegpt(("function_call", value))


@pytest.mark.parametrize("completion", [[BOT], BOT, "b"])
@pytest.mark.parametrize("prompt", [[USER, BOT, USER], "a"])
def test_only_the_completion_is_trained(prompt: Any, completion: Any) -> None:
    row = {"prompt": prompt, "completion": completion, "tools": [WEATHER], "system": "s"}
    example = build_example("conversational_prompt_completion", row, {})
    before = [("user", "a")] if prompt == "a" else [("user", "a"), ("assistant", "b"), ("user", "a")]
    assert example == Conversation(
        (
            Message("system", "s"),
            *(Message(role, text, train=False) for role, text in before),
            Message("assistant", "b"),
        ),
        (WEATHER,),
    )


def test_a_completion_may_leave_turns_out() -> None:
    row = {"prompt": [USER], "completion": [{**BOT, "train": False}, USER, BOT]}
    example = build_example("conversational_prompt_completion", row, {})
    assert isinstance(example, Conversation)
    assert [message.train for message in example.messages] == [False, False, True, True]


@pytest.mark.parametrize("side", ["prompt", "completion"])
@pytest.mark.parametrize(
    ("value", "wrong"), [([], "holds no message"), (5, "is int, not a list: 5"), (None, "missing")]
)
def test_bad_sides(side: str, value: Any, wrong: str) -> None:
    with pytest.raises(RowError, match=wrong):
        build_example("conversational_prompt_completion", {"prompt": [USER], "completion": [BOT], side: value}, {})


def check_writable(example: Example) -> None:
    """Check that a template can write all of a conversation as JSON."""
    if isinstance(example, Conversation):
        json.dumps([message.as_dict() for message in example.messages], allow_nan=False, ensure_ascii=False).encode()
        json.dumps(example.tools, allow_nan=False, ensure_ascii=False).encode()


def check_row(name: str, row: dict[str, Any]) -> None:
    """Build the row under its format and choose a format for it; only the errors that are meant may come."""
    said: list[str] = []
    try:
        example = build_example(name, row, {})
        assert isinstance(example, Conversation | Document | Preformatted | Tokens)
        check_writable(example)
    except RowError as error:
        said.append(str(error))
    try:
        found, reason = resolve_format("auto", {}, first=row, where="rows.json")
        assert found in FORMATS
        said.append(reason)
    except DataError as error:
        said.append(str(error))
    assert all(text.encode() for text in said)  # can be printed
    assert max(map(len, said)) < 3000


@given(malformed_rows())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_malformed_rows_are_examples_or_row_errors(case: tuple[str, dict[str, Any]]) -> None:
    check_row(*case)


@pytest.mark.slow
@given(malformed_rows())
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
def test_ten_thousand_malformed_rows(case: tuple[str, dict[str, Any]]) -> None:
    check_row(*case)


def texts_in(value: Any) -> Iterator[str]:
    """Yield the text under content, parts, reasoning, names of functions and segments, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, dict):
        for key in ("reasoning", "content", "value", "text"):
            if key in value:
                yield from texts_in(value[key])


@given(good_rows())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_good_rows_are_read_and_can_be_rendered(case: tuple[str, dict[str, Any]]) -> None:
    """No good row is refused; every example is JSON that a template can write, and no message loses text."""
    name, row = case
    example = build_example(name, row, {})
    if not isinstance(example, Conversation):
        return
    check_writable(example)
    given_turns = row.get("messages") or row.get("conversations")
    if given_turns is not None:
        for turn, message in zip(given_turns, example.messages, strict=True):
            if not message.tool_calls:
                assert "".join(texts_in(turn)) == (message.reasoning or "") + message.content
            assert message.train == (turn.get("train") in (None, True))
