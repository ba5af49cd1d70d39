"""Hypothesis strategies: good rows of every format, and rows that are almost good or nothing like it."""

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from loralab.data.formats.chat import ROLE_NAMES
from loralab.data.formats.table import FORMATS

# What JSON, Parquet and CSV readers can give, and more.
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([5000, 10]).map(lambda digits: 10**digits)  # Python writes no number of 5000 digits
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=8)  # halves of surrogate pairs too
    | st.binary(max_size=4)
    | st.datetimes()
    | st.decimals()
    | st.sampled_from(["yes", "\ud800", "[]", "{}", "null", '{"name": "f"}', "user", "assistant", "tool"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


def deep(levels: int, *, as_text: bool, as_object: bool) -> Any:
    """Return a value of many levels, or JSON text of one."""
    if as_text:
        return '{"a":' * levels if as_object else "[" * levels + "]" * levels
    value: Any = "x"
    for _ in range(levels):
        value = {"a": value} if as_object else [value]
    return value


ANYTHING = VALUES | st.builds(deep, st.sampled_from([50, 150, 1200]), as_text=st.booleans(), as_object=st.booleans())

TEXT = st.text(max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TEXT, lambda inner: st.lists(inner, max_size=2), max_leaves=3
)
ARGUMENTS = st.dictionaries(TEXT, JSON, max_size=2)


def as_it_is_or_json(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return strategy | strategy.map(json.dumps)


BODY = st.fixed_dictionaries({"name": TEXT}, optional={"arguments": as_it_is_or_json(ARGUMENTS)})
CALL = BODY | st.fixed_dictionaries({"function": BODY}, optional={"id": TEXT, "type": st.just("function")})
TOOL = st.fixed_dictionaries({"name": TEXT, "parameters": ARGUMENTS}) | st.fixed_dictionaries(
    {"type": st.just("function"), "function": st.fixed_dictionaries({"name": TEXT})}
)
TEXT_PART = st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}) | TEXT
REASONING_PART = st.fixed_dictionaries({"type": st.just("reasoning"), "value": TEXT})
CALL_PART = st.fixed_dictionaries({"type": st.just("tool_call"), "value": as_it_is_or_json(BODY)})
ANSWER_PARTS = st.builds(
    lambda *parts: [part for some in parts for part in some],
    *(st.lists(part, max_size=2) for part in (REASONING_PART, TEXT_PART, CALL_PART)),
)
FLAG = st.sampled_from([True, False, 0, 1, 0.0, 1.0, None])
ABOUT = {"id": TEXT, "train": FLAG, "name": TEXT}


def good_messages(role: str, content: str) -> st.SearchStrategy[list[Any]]:
    """Return lists of messages whose two main keys have these names."""
    roles = {kind: [name for name, meant in ROLE_NAMES.items() if meant == kind] for kind in ROLE_NAMES.values()}
    kept = ("system", "user", "tool")
    plain = st.fixed_dictionaries(
        {role: st.sampled_from([name for kind in kept for name in roles[kind]]), content: TEXT | st.lists(TEXT_PART)},
        optional={**ABOUT, "tool_call_id": TEXT},
    )
    answer = st.fixed_dictionaries(
        {role: st.sampled_from(roles["assistant"]), content: TEXT | ANSWER_PARTS}, optional=ABOUT
    )
    calling = st.fixed_dictionaries(
        {role: st.sampled_from(roles["assistant"]), "tool_calls": st.lists(CALL, min_size=1, max_size=2)},
        optional={**ABOUT, content: TEXT | st.none(), "reasoning": TEXT},
    )
    call = st.fixed_dictionaries({role: st.sampled_from(roles["function_call"]), content: as_it_is_or_json(CALL)})
    return st.lists(plain | answer | calling | call, min_size=1, max_size=3)


MESSAGES = good_messages("role", "content")
SHARED = {"tools": as_it_is_or_json(st.lists(TOOL, max_size=2))}
IDS = st.lists(st.integers(0, 9), min_size=1, max_size=4)
SEGMENT = st.fixed_dictionaries({"text": TEXT, "train": FLAG.filter(lambda flag: flag is not None)})
HISTORY = as_it_is_or_json(st.lists(st.tuples(TEXT, TEXT).map(list)))
PICTURE = st.sampled_from(["a.png", b"bytes", {"bytes": b"bytes", "path": None}, {"bytes": None, "path": "a.png"}])
PICTURES = PICTURE | st.lists(PICTURE, min_size=1, max_size=2)
GOOD_ROWS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "tokenized": IDS.map(lambda ids: {"input_ids": ids, "labels": [*ids], "attention_mask": [1] * len(ids)}),
    "segments": st.lists(SEGMENT, max_size=2).map(lambda some: {"segments": [*some, {"text": "a", "train": True}]}),
    "messages": st.fixed_dictionaries({"messages": MESSAGES}, optional=SHARED),
    "sharegpt": st.fixed_dictionaries({"conversations": good_messages("from", "value")}, optional=SHARED),
    "alpaca": st.fixed_dictionaries(
        {"instruction": TEXT, "output": TEXT},
        optional={
            "input": TEXT,
            "system": TEXT,
            "history": as_it_is_or_json(st.lists(st.tuples(TEXT, TEXT).map(list))),
        },
    ),
    "conversational_prompt_completion": st.fixed_dictionaries(
        {"prompt": MESSAGES | TEXT, "completion": MESSAGES | MESSAGES.map(lambda some: some[0])}, optional=SHARED
    ),
    "prompt_completion": st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}, optional={"system": TEXT}),
    "vqa": st.fixed_dictionaries(
        {"image": PICTURES, "question": TEXT, "answer": TEXT | st.lists(TEXT, min_size=1, max_size=3)},
        optional={"context": TEXT, "system": TEXT},
    ),
    "yes_no": st.fixed_dictionaries(
        {"question": TEXT, "answer": st.sampled_from(["Yes.", "no", " maybe", True, 0])}, optional={"passage": TEXT}
    ),
    "question_answer": st.fixed_dictionaries({"question": TEXT, "answer": TEXT}, optional={"context": TEXT}),
    "text": st.fixed_dictionaries({"text": TEXT}),
}


# What may turn up in an object that has something else there, or nothing.
KEYS = ("role", "from", "content", "value", "train", "weight", "mask", "tool_calls", "function", "type", "image", "x")


@st.composite
def good_rows(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A format and a row that it can use."""
    name = draw(st.sampled_from(list(FORMATS)))
    return name, draw(GOOD_ROWS[name])


def _places(value: Any, *, levels: int = 8) -> Iterator[tuple[Any, Any]]:
    """Yield container and key of everything inside, down to some level."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if levels and isinstance(value[key], dict | list):
            yield from _places(value[key], levels=levels - 1)


@st.composite
def malformed_rows(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A format and a row with one to three values, anywhere in it, that are changed, left out or put in."""
    name, row = draw(good_rows())
    row = copy.deepcopy(row)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(row))
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if change == "remove":
            del container[key]
        elif change == "replace":
            container[key] = draw(ANYTHING)
        elif isinstance(container, list):
            container.insert(key, draw(ANYTHING))
        else:
            known = [
                "role",
                "from",
                "content",
                "value",
                "train",
                "weight",
                "mask",
                "tool_calls",
                "function",
                "type",
                "x",
            ]
            container[draw(st.sampled_from(known))] = draw(ANYTHING)
    return name, row
