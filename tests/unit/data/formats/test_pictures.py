"""Pictures in rows: values, columns, markers and parts."""

import base64
from typing import Any

import pytest

from loralab.data.example import Conversation, Example, ImagePart, Message
from loralab.data.formats.fields import RowError
from loralab.data.formats.pictures import read_picture
from loralab.data.formats.table import build_example, resolve_format

SCHEME = "file:" + "//"
URL = "data:image/png;base64," + base64.b64encode(b"bytes of a picture").decode()
Part = str | ImagePart
A, B = ImagePart("a.png"), ImagePart("b.png")
BOT = {"role": "assistant", "content": "yes"}


def build(*messages: Any, **fields: Any) -> Example:
    return build_example("messages", {"messages": list(messages), **fields}, {})


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def turn(*parts: Part, role: str = "user") -> Message:
    return Message(role, "".join(part for part in parts if isinstance(part, str)), parts=parts)


def first_turn(content: Any, **fields: Any) -> Message:
    example = build(user(content), BOT, **fields)
    assert isinstance(example, Conversation)
    assert example.messages[1] == Message("assistant", "yes")
    return example.messages[0]


def error_of(*messages: Any, **fields: Any) -> str:
    with pytest.raises(RowError) as caught:
        build(*messages, **fields)
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "source"),
    [
        ("images/a.png", "images/a.png"),
        (" a.png", " a.png"),
        (f"{SCHEME}/b/a.png", f"{SCHEME}/b/a.png"),
        ("C:/a.png", "C:/a.png"),
        (b"bytes", b"bytes"),
        (bytearray(b"bytes"), b"bytes"),
        ({"bytes": b"bytes", "path": "a.png"}, b"bytes"),
        ({"bytes": None, "path": "a.png"}, "a.png"),
        ({"bytes": b"", "path": "a.png"}, "a.png"),
        ({"path": "a.png"}, "a.png"),
        ({"url": "a.png", "detail": "low"}, "a.png"),
        (URL, b"bytes of a picture"),
        ({"url": URL}, b"bytes of a picture"),
        (URL.replace("base64,", "BASE64,").replace("data:", "DATA:"), b"bytes of a picture"),
        (URL[:40] + "\n" + URL[40:], b"bytes of a picture"),
    ],
)
def test_values_of_pictures(value: Any, source: str | bytes) -> None:
    assert read_picture(value, "it") == ImagePart(source)


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        (None, "it is null: no picture"),
        ("", "it is empty: no picture"),
        (" \n", "it is empty: no picture"),
        (b"", "it is empty: no picture"),
        (5, "it is int, neither a path nor the bytes of a picture: 5"),
        (["a.png"], "it is list, neither a path nor the bytes of a picture: ['a.png']"),
        ({}, "it holds no picture: none of bytes, path, url; its keys: nothing"),
        ({"bytes": None, "path": None}, "it holds no picture: none of bytes, path, url; its keys: nothing"),
        ({"bytes": b"", "path": ""}, "it holds no picture: none of bytes, path, url; its keys: bytes, path"),
        ({"path": 5}, "it.path is int, neither a path nor the bytes of a picture: 5"),
        ("https://x.org/a.png", "it is 'https://x.org/a.png': pictures are not fetched: download them beside the data"),
        ("HTTP://x.org/a.png", "it is 'HTTP://x.org/a.png': pictures are not fetched: download them beside the data"),
        ("s3://x/a.png", "it is 's3://x/a.png': pictures are not fetched: download them beside the data"),
        ({"url": "http://x"}, "it.url is 'http://x': pictures are not fetched: download them beside the data"),
        ("data:image/svg+xml,%3Csvg/%3E", "it is a data: URL without base64: 'image/svg+xml'"),
        ("data:image/png;base64,", "it is a data: URL without data: no picture"),
        ("data:image/png;base64,AAA", "it is a data: URL that is no base64 (Incorrect padding)"),
        ("data:image/png;base64,A*==", "it is a data: URL that is no base64 ("),
        ("a\ud83d.png", "it holds \\ud83d, half of a surrogate pair, at character 1"),
    ],
)
def test_values_that_are_none(value: Any, wrong: str) -> None:
    with pytest.raises(RowError) as caught:
        read_picture(value, "it")
    assert str(caught.value).startswith(wrong)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png", "image": None},
        {"type": "image", "url": "a.png", "text": ""},
        {"type": "image_url", "value": "a.png"},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}},
        {"type": "input_image", "image_url": "a.png", "detail": "auto"},
        {"type": "image", "image": {"bytes": None, "path": "a.png"}, "text": None},
    ],
)
def test_parts_with_a_picture_of_their_own(part: dict[str, Any]) -> None:
    text = {"type": "text", "text": "what?"}
    assert first_turn([part, text]) == turn(A, "what?")
    assert first_turn(["see ", part, " there"]) == turn("see ", A, " there")
    assert first_turn(part) == turn(A)


def test_parts_without_a_picture_take_the_next_of_the_column() -> None:
    image = {"type": "image", "image": None}
    for fields in ({"images": ["a.png", "b.png"]}, {"images": '["a.png", "b.png"]'}):
        assert first_turn([image, "left, ", {"type": "image"}, "right?"], **fields) == turn(A, "left, ", B, "right?")
    found = build(user([image]), BOT, user(["and?", image]), images=["a.png", "b.png"])
    assert isinstance(found, Conversation)
    assert [message.parts for message in found.messages] == [(A,), (), ("and?", B)]
    assert first_turn([image, "what?"], image="a.png") == turn(A, "what?")


def test_parts_may_number_the_pictures_of_the_column() -> None:
    parts = [{"type": "image", "index": number, "text": None} for number in (1, 0, 1)]
    assert first_turn([*parts, {"type": "text", "index": None, "text": "?"}], images=["a.png", "b.png"]) == turn(
        B, A, B, "?"
    )
    wrong = "messages[0].content[0] asks for picture 1 of the row, which has 1, from 0"
    assert error_of(user(parts), images=["a.png"]) == wrong
    assert "ask for 1 pictures" in error_of(user(parts[:1]), images=["a.png", "b.png"])


@pytest.mark.parametrize(
    ("parts", "wrong"),
    [
        (
            [{"type": "image", "image": "a.png", "path": "b.png"}],
            "messages[0].content[0] has values that would be lost: path",
        ),
        (
            [{"type": "image", "image": "a.png", "max_pixels": 9}],
            "messages[0].content[0] has values that would be lost: max_pixels",
        ),
        ([{"type": "image", "image": 5}], "messages[0].content[0].image is int, neither a path nor the bytes of a pic"),
        (
            [{"type": "image", "source": {"data": "x"}}],
            "messages[0].content[0] has none of image, path, url, value, im",
        ),
        (
            [{"type": "image_url", "image_url": {"url": "https://x/a.png"}}],
            "messages[0].content[0].image_url.url is 'https://x/a.png': pictures are not fetched",
        ),
        ([{"type": "image"}], "the turns ask for 1 pictures (<image> or parts without a value); the row has no column"),
        ([{"type": "video", "video": "a.mp4"}], "messages[0].content[0] is of type video: videos and sound are not re"),
    ],
)
def test_bad_parts_are_named(parts: list[Any], wrong: str) -> None:
    assert error_of(user(parts), BOT).startswith(wrong)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<image>what?", (A, "what?")),
        ("what?<image>", ("what?", A)),
        ("<image>\nwhat?", (A, "what?")),
        ("<image>\r\nwhat?", (A, "what?")),
        ("<image>\n what?", (A, " what?")),
        ("<image> \nwhat?", (A, " \nwhat?")),
        ("what?\n<image>", ("what?", A)),
        ("what? \n<image>\n", ("what? ", A)),
        ("<image>\n\nwhat?", (A, "\nwhat?")),
        ("see\n<image>\nthere", ("see", A, "there")),
        ("<image>", (A,)),
        ("\n<image>\n", (A,)),
        ("<Image><image>", ("<Image>", A)),
    ],
)
def test_markers_are_places_of_pictures(text: str, parts: tuple[Part, ...]) -> None:
    for fields in ({"image": "a.png"}, {"images": ["a.png"]}, {"images": "a.png", "image": "a.png"}):
        assert first_turn(text, **fields) == turn(*parts)
    assert first_turn([{"type": "text", "text": text}], images=["a.png"]) == turn(*parts)


@pytest.mark.parametrize("text", ["<image><image>which?", "<image>\n<image>\nwhich?", "\n<image>\n\n<image>\nwhich?"])
def test_two_markers(text: str) -> None:
    assert first_turn(text, images=["a.png", "b.png"]) == turn(A, B, "which?")


def test_markers_of_every_turn_count() -> None:
    tool = {"role": "tool", "content": "<image>", "name": "camera"}
    found = build(
        {"role": "system", "content": "<image>s"}, tool, user("a<image>"), BOT, images=["a.png", "b.png", "c"]
    )
    assert isinstance(found, Conversation)
    assert [message.parts for message in found.messages] == [(A, "s"), (B,), ("a", ImagePart("c")), ()]


@pytest.mark.parametrize(
    ("texts", "pictures", "wrong"),
    [
        (
            ["<image>a"],
            ["a.png", "b.png"],
            "the turns ask for 1 pictures (<image> or parts without a value); field 'im",
        ),
        (
            ["<image>a", "<image>"],
            ["a.png"],
            "the turns ask for 2 pictures (<image> or parts without a value); field '",
        ),
        (["<image>a"], [], "the turns ask for 1 pictures (<image> or parts without a value); field 'images' holds 0"),
        (["<image>a"], None, "the turns ask for 1 pictures (<image> or parts without a value); field 'images' holds 0"),
        (["a"], [None], "field 'images'[0] is null: no picture"),
        (["<image>"], ["http://x/a.png"], "field 'images'[0] is 'http://x/a.png': pictures are not fetched"),
    ],
)
def test_counts_that_differ(texts: list[str], pictures: Any, wrong: str) -> None:
    messages = [message for text in texts for message in (user(text), BOT)]
    assert error_of(*messages, images=pictures).startswith(wrong)


def test_pictures_without_markers_stand_before_the_first_user_turn() -> None:
    found = build({"role": "system", "content": "s"}, user("a"), BOT, user("b"), images=["a.png", "b.png"])
    assert isinstance(found, Conversation)
    assert found.messages == (
        Message("system", "s"),
        turn(A, B, "a"),
        Message("assistant", "yes"),
        Message("user", "b"),
    )
    assert first_turn("", image="a.png") == turn(A)
    assert "no user turn is there to take them" in error_of(BOT, image="a.png")


@pytest.mark.parametrize("fields", [{}, {"images": None}, {"images": []}, {"image": ""}, {"images": "[]"}])
def test_rows_without_pictures_are_plain(fields: dict[str, Any]) -> None:
    assert first_turn("what?", **fields) == Message("user", "what?")
    assert build(user("a"), {"role": "assistant", "content": "write <image>"}, **fields) == Conversation(
        (Message("user", "a"), Message("assistant", "write <image>"))
    )


def test_a_marker_is_text_where_no_column_holds_pictures() -> None:
    assert first_turn("what is <image> in HTML?") == Message("user", "what is <image> in HTML?")
    assert first_turn(["<image>", {"type": "image", "image": "a.png"}]) == turn("<image>", A)


@pytest.mark.parametrize("content", ["<image>", [{"type": "image"}], [{"type": "image", "image": "a.png"}, "yes"]])
def test_pictures_of_an_assistant_are_refused(content: Any) -> None:
    wrong = error_of(user("<image>"), {"role": "assistant", "content": content}, images=["a.png"])
    assert wrong.startswith("an assistant turn has a picture, which no model writes: ")


def test_pictures_in_two_places_are_refused() -> None:
    inline = user([{"type": "image", "image": "a.png"}])
    assert error_of(inline, images=["a.png"]) == (
        "pictures stand in the messages, and 1 more in field 'images': keep one of them"
    )
    wrong = "two fields hold pictures that differ, images and image: keep one of them"
    assert error_of(user("a"), images=["a.png"], image="b.png") == wrong


def test_errors_name_the_column_that_the_row_has() -> None:
    assert error_of(user("a"), image="http://x").startswith("field 'image' is 'http://x'")
    assert error_of(user("a"), images="http://x").startswith("field 'images' is 'http://x'")


def test_sharegpt_with_markers() -> None:
    row = {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "Is it?\n<image>"}, {"from": "gpt", "value": "Yes"}],
    }
    assert resolve_format("auto", {}, first=row, where="f")[0] == "sharegpt"
    assert build_example("sharegpt", row, {}) == Conversation((turn("Is it?", A), Message("assistant", "Yes")))


@pytest.mark.parametrize(
    "prompt", ["<image>what?", "what?", [user("<image>\nwhat?")], user([{"type": "image"}, "what?"])]
)
def test_pictures_of_a_prompt(prompt: Any) -> None:
    row = {"prompt": prompt, "completion": [BOT], "images": ["a.png"]}
    found = build_example("conversational_prompt_completion", row, {})
    asked = Message("user", "what?", parts=(A, "what?"), train=False)
    assert found == Conversation((asked, Message("assistant", "yes")))


def test_pictures_of_a_completion_are_refused() -> None:
    row = {"prompt": "a", "completion": [{"role": "assistant", "content": "<image>"}], "images": ["a.png"]}
    with pytest.raises(RowError, match="an assistant turn has a picture"):
        build_example("conversational_prompt_completion", row, {})


def test_columns_may_be_mapped() -> None:
    row = {"messages": [user("<image>a"), BOT], "photo": "a.png"}
    found = build_example("messages", row, {"images": "photo"})
    assert isinstance(found, Conversation)
    assert found.messages[0] == turn(A, "a")
    asked = {"photo": "a.png", "q": "what?", "a": "yes"}
    columns = {"image": "photo", "question": "q", "answer": "a"}
    assert resolve_format("auto", columns, first=asked, where="f")[0] == "vqa"
    assert build_example("vqa", asked, columns) == Conversation((turn(A, "what?"), Message("assistant", "yes")))


@pytest.mark.parametrize(
    ("answers", "taken"),
    [
        (["a", "b", "b"], "b"),
        (["a", "b", "b", "a"], "a"),
        ([{"answer": "b", "answer_id": 1, "answer_confidence": "yes"}, {"answer": "b"}, {"answer": "a"}], "b"),
        (("a",), "a"),
        ("[a, b]", "[a, b]"),
    ],
)
def test_the_most_frequent_answer_is_taken(answers: Any, taken: str) -> None:
    row = {"image": "a.png", "question": "what?", "answers": answers}
    found = build_example("vqa", row, {})
    assert isinstance(found, Conversation)
    assert found.messages[1] == Message("assistant", taken)


def test_markers_in_a_question() -> None:
    row = {"images": ["a.png", "b.png"], "question": "Is <image>\nlike <image>?", "answer": "yes", "context": "Look."}
    found = build_example("vqa", row, {})
    assert isinstance(found, Conversation)
    assert found.messages[0] == turn("Look.\n\nIs ", A, "like ", B, "?")
