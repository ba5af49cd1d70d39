"""Hypothesis strategies for rows with values of any kind under the names that formats know."""

from typing import Any

from hypothesis import strategies as st

from loralab.data.chat_formats import ROLE_NAMES
from loralab.data.formats import FORMATS

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
    | st.sampled_from(
        ["yes", "[]", "{}", "null", '{"name": "f", "arguments": "{}"}', "user", "assistant", "tool", "\ud800"]
    )
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
    if as_text:
        return '{"a":' * levels if as_object else "[" * levels + "]" * levels
    value: Any = "x"
    for _ in range(levels):
        value = {"a": value} if as_object else [value]
    return value


DEEP = st.builds(deep, st.sampled_from([50, 150, 3000]), as_text=st.booleans(), as_object=st.booleans())
ANY = VALUES | DEEP
ROLE = st.sampled_from([*ROLE_NAMES, "narrator"]) | ANY
PARTS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["text", "reasoning", "thinking", "tool_call", "image"]) | ANY,
            "text": st.text(max_size=4) | ANY,
            "value": st.text(max_size=4) | ANY,
            "more": ANY,
        },
    )
    | ANY,
    max_size=3,
)
CALLS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "id": st.text(max_size=3) | ANY,
            "type": st.just("function") | ANY,
            "name": st.text(max_size=3) | ANY,
            "arguments": st.sampled_from(["{}", "", '{"a": 1}', {}]) | ANY,
            "function": st.fixed_dictionaries({"name": st.text(max_size=3) | ANY}, optional={"arguments": ANY}) | ANY,
        },
    )
    | ANY,
    max_size=2,
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("role", "from"), ROLE),
        **dict.fromkeys(("content", "value"), st.text(max_size=4) | PARTS | ANY),
        **dict.fromkeys(("tool_calls", "function_call"), CALLS | ANY),
        **dict.fromkeys(("train", "weight", "name", "reasoning", "mask", "other"), ANY),
    },
)
SEGMENT = st.fixed_dictionaries({"text": ANY}, optional={"train": ANY, "label": ANY})
LISTS = st.lists(MESSAGE | ANY, max_size=3)
FIELD_VALUES = {
    **dict.fromkeys(("messages", "conversations", "prompt", "completion"), LISTS | MESSAGE | ANY),
    "tools": CALLS | ANY,
    "history": st.lists(st.lists(ANY, max_size=3), max_size=2) | ANY,
    "segments": st.lists(st.fixed_dictionaries({"text": ANY}, optional={"train": ANY, "label": ANY}) | ANY, max_size=3)
    | ANY,
    **dict.fromkeys(
        ("input_ids", "labels", "attention_mask"),
        st.lists(st.integers(0, 3) | st.sampled_from([-100, 2**31]), min_size=2, max_size=2) | ANY,
    ),
}


@st.composite
def malformed_rows(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A format and a row with values of any kind under the names that the format knows, some of them missing."""
    name = draw(st.sampled_from(list(FORMATS)))
    form = FORMATS[name]
    keys = st.lists(st.sampled_from(form.fields), max_size=3) if draw(st.booleans()) else st.just([*form.required])
    chosen = dict.fromkeys([*draw(keys), *draw(st.lists(st.sampled_from(form.optional or ("id",)), max_size=2))])
    return name, {key: draw(FIELD_VALUES.get(key, ANY)) for key in chosen}
