"""Reading a template without running it: mistakes, dates, variables, layout, the mark behind an answer."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError

from loralab.data.example import Message
from loralab.data.prompts.prompter import render_with
from loralab.data.prompts.template_text import (
    explain_render_error,
    freeze_date,
    freeze_values,
    missing_end,
    parse_template,
    put_in_front,
    render_literal,
    without_layout,
)
from loralab.data.prompts.templates import Template, prepare_template
from loralab.errors import DataError
from unit.data.prompters import build_tokenizer

TOKENIZER = build_tokenizer()
ASK = [Message("user", "a")]


def render(text: str) -> str:
    """Return what transformers' own renderer makes of a template."""
    return str(TOKENIZER.apply_chat_template([m.as_dict() for m in ASK], chat_template=text, tokenize=False))


def dated(text: str) -> str:
    return put_in_front(freeze_date(parse_template(text, where="w"), where="w"), text)


def valued(text: str, **values: Any) -> str:
    return put_in_front(freeze_values(parse_template(text, where="w"), values), text)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("{{ a", 1, "end of template"),
        ("a\n\n{% if x %}", 3, "Unexpected end of template"),
        ("\n{% nonsense %}", 2, "unknown tag 'nonsense'"),
        ("\n\n\n{{ a | nonsense }}", 4, "No filter named 'nonsense'"),
        ("\n{% include 'other.jinja' %}", 2, "takes in another file"),
        ("{% import 'other.jinja' as o %}", 1, "takes in another file"),
        ("a\nb\n{% extends 'base' %}", 3, "takes in another file"),
    ],
)
def test_mistakes_name_their_line(text: str, line: int, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        parse_template(text, where="file f")
    assert caught.value.problems[0].where == f"file f, line {line}"


@pytest.mark.parametrize(
    "text",
    ["{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "{{ f(a=1, a=2) }}", "{% for x in y %}" * 30 + "{% endfor %}" * 30],
)
def test_what_no_compiler_takes_is_an_error_of_ours(text: str) -> None:
    with pytest.raises(DataError, match="no valid Jinja") as caught:
        parse_template(text, where="file f")
    assert caught.value.problems[0].where == "file f"


def test_blocks_of_training_templates_and_loop_controls_are_known() -> None:
    text = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% break %}{% endfor %}"
    parse_template(text, where="w")
    assert render(text) == "a"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{{ strftime_now(format='%Y-%m-%d') }}", "2024-07-26"),
        ("{{ strftime_now('%d' + ' %m') }}", "26 07"),
        (
            "{{ strftime_now('%H:%M') + '|' + strftime_now('%B %d') + '|' + strftime_now('%H:%M') }}",
            "00:00|July 26|00:00",
        ),
        ("{% if strftime_now is defined %}{% set d = strftime_now('%Y') %}{% endif %}{{ 'In ' + d }}", "In 2024"),
        (
            "{% macro day() %}<{{ strftime_now('%d') }}>{% endmacro %}{% for m in messages %}{{ day() }}{% endfor %}",
            "<26>",
        ),
        ("\n \n{{ strftime_now('\\'%Y\\' \"%m\"\\n') }}", "\n \n'2024' \"07\"\n"),
        ("{{ strftime_now('世界 👋 %Y') }}", "世界 👋 2024"),
    ],
)
def test_dates_are_fixed(text: str, expected: str) -> None:
    fixed = dated(text)
    assert fixed.endswith(text)
    assert render(fixed) == expected
    assert dated(fixed) == fixed


@pytest.mark.parametrize("text", ["{{ messages[0]['content'] }}", "{% if strftime_now is defined %}x{% endif %}"])
def test_template_without_a_date_stays_as_it_is(text: str) -> None:
    assert dated(text) == text


@pytest.mark.parametrize(
    "call",
    [
        "strftime_now(form)",
        "strftime_now()",
        "strftime_now('%d', 1)",
        "strftime_now(*f)",
        "strftime_now",
    ],
)
def test_dates_that_are_not_written_out_are_refused(call: str) -> None:
    text = "{% set form = '%d' %}\n{% set today = " + call + " %}{{ today }}"
    with pytest.raises(DataError, match="today's date without writing the format out") as caught:
        dated(text)
    assert caught.value.problems[0].where == "w, line 2"


VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -3,
    1.5,
    -1e-07,
    1e300,
    "",
    'it\'s "quoted" \\ %} }} {{ {# #}',
    "line\nbreak\ttab\r\x00\x7f\u2028👋",
    [],
    [1, [True, None]],
    {},
    {"a": {"b": {}}, "{{": "}}"},
]


@pytest.mark.parametrize("value", VALUES)
def test_values_come_back_as_they_were(value: Any) -> None:
    fixed = valued("{{ x | tojson }}", x=value)
    assert json.loads(render(fixed)) == value
    assert type(json.loads(render(fixed))) is type(value)
    assert render(fixed) == render(valued("{{ (x if true else '') | tojson }}", x=value))


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=6,
    ).filter(lambda value: "\\ud8" not in repr(value).lower() and "\\udc" not in repr(value).lower())
)
def test_any_json_value_is_a_literal(value: Any) -> None:
    assert json.loads(render(valued("{{ x | tojson }}", x=value))) == value


def test_variables_are_seen_everywhere() -> None:
    text = (
        "{% macro m() %}{{ x }}{% endmacro %}{% if not x is defined %}{% set x = 1 %}{% endif %}"
        "{% for message in messages %}{{ x }}{{ m() }}{% endfor %}{{ y }}"
    )
    assert render(valued(text, x=7, y="é")) == "77é"


@pytest.mark.parametrize(
    ("name", "what", "fix"),
    [
        ("messages", "not a variable that can be set: 'messages'", "reads: thinking"),
        ("bos_token", "not a variable that can be set", "thinking"),
        ("not-a-name", "not a variable that can be set: 'not-a-name'", "thinking"),
        ("a b", "not a variable that can be set", "thinking"),
        ("true", "not a variable that can be set", "thinking"),
        ("thinkin", "the template reads no variable 'thinkin'", "did you mean 'thinking'?"),
        ("local", "the template reads no variable 'local'", "known: thinking"),
    ],
)
def test_names_that_cannot_be_set(name: str, what: str, fix: str) -> None:
    text = "{{ bos_token }}{% set local = messages %}{{ local }}{{ thinking }}"
    with pytest.raises(DataError, match=what) as caught:
        valued(text, **{name: 1})
    assert fix in caught.value.problems[0].fix
    assert caught.value.problems[0].where == f"key data.template_kwargs.{name}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, {"a", "b"}, b"x", object()])
def test_values_that_are_no_json(value: Any) -> None:
    with pytest.raises(DataError, match="x cannot be written into the template"):
        valued("{{ x }}", x=value)
    with pytest.raises((TypeError, ValueError)):
        render_literal(value)


@pytest.mark.parametrize(
    "text", ["a", " a", "\n\na", "  {% if true %}\n  a\n  {% endif %}", "\t{{ 'a' }}\n", "{%- set z = 1 %}\n a"]
)
def test_what_is_put_in_front_writes_nothing(text: str) -> None:
    assert put_in_front("", text) == text
    fronted = put_in_front("{%- set x = 1 -%}{%- set y = 2 -%}", text)
    assert fronted.endswith(text)
    assert render(fronted) == render(text)


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("{% if a %}\n    {{ b }}\n{% endif %}\n", "{% if a %}{{ b }}{% endif %}"),
        ("{% if a -%}\n    {{ b }}\n    {{ '\n    ' }}{% endif %}", "{% if a -%}{{ b }}{{ '\n    ' }}{% endif %}"),
        ("{%- if a -%}\n    {{- b -}}\n{%- endif -%}", None),  # its tags take the blanks away themselves
        ("{# note\n    more #}\n    {{ a\n    + b }}", "{# note\n    more #}{{ a\n    + b }}"),
        ("{% if a %}\n{{ b }}\n{% endif %}\n", None),  # not indented
        ("{% if a %}\n    User: {{ b }}\n{% endif %}\n", None),  # text of its own
        ("{% if a %}\n    {{ b }}\n{% endif %}{% raw %}  {% endraw %}", None),
        ("", None),
    ],
)
def test_layout_is_what_stands_between_tags(text: str, bare: str | None) -> None:
    assert without_layout(text) == bare


@pytest.mark.parametrize(
    ("behind", "missing"),
    [
        ("<|im_end|>\n", "<|im_end|>"),
        (" \n</s>", "</s>"),
        ("<end_of_turn>", "<end_of_turn>"),
        ("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),  # noqa: RUF001 (as DeepSeek writes it)
        (" [/INST]", "[/INST]"),
        ("[EOS]", "[EOS]"),
        ("<|stop|>\n", None),
        ("<|stop|><|im_end|>", None),
        ("", None),
        ("\n\n", None),
        ("\nUser: <|im_end|>", None),
        ("\n### Instruction:\n", None),
        ("< b", None),
        ("[1]", None),
        ("[x]", None),
    ],
)
def test_mark_behind_an_answer(behind: str, missing: str | None) -> None:
    assert missing_end(behind, TOKENIZER.get_vocab()) == missing


def test_a_missing_special_token_is_said_in_words() -> None:
    with pytest.raises(DataError, match="the template needs a bos token, which this tokenizer does not have"):
        render_with(TOKENIZER)("{{ bos_token + 'x' }}", ASK, True)
    assert explain_render_error(UndefinedError("'eos_token' is undefined")).startswith(
        "the template needs an eos token"
    )
    assert explain_render_error(UndefinedError("'x' is undefined")) == "'x' is undefined"
    assert explain_render_error(ValueError("'eos_token' is undefined")) == "'eos_token' is undefined"


PIECES = [
    *("{{ ", " }}", "{% ", " %}", "{%- ", " -%}", "{# ", " #}", "\n", "    ", " + ", "'", '"', "|", "{", "}", "\\"),
    *("messages", "[0]", "['content']", "bos_token", "strftime_now", "('%d')", "(x)", "namespace()", "1", "0.5", "é"),
    *("if ", "else", "endif", "for m in ", "endfor", "break", "continue", "set x = ", "is defined", "trim", "tojson"),
    *("macro m() ", "endmacro", "call m()", "endcall", "raw", "endraw", "block b", "endblock", "include 'x'", "\x00"),
    *("generation", "endgeneration"),
]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=14).map("".join))
def test_no_template_raises_anything_else(text: str) -> None:
    with contextlib.suppress(DataError):
        prepare_template(
            Template("t.jinja", text, "r"),
            vocabulary=TOKENIZER.get_vocab(),
            kwargs={"x": "y"} if "x" in text else {},
            render=render_with(TOKENIZER),
        )
