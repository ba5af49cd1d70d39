"""Hypothesis strategies: data files that are almost good or nothing like it, and templates edited at random."""

import csv
import gzip
import io
import json
import re
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st
from jinja2 import Environment

from loralab.data.prompts.templates import TEMPLATES
from unit.data.malformed_rows import GOOD_ROWS, malformed_rows
from unit.data.prompters import CHATML, NO_STOP, TRIMMING, UNFAITHFUL

# What turns up in files: other encodings, marks, controls, numbers and nesting that no reader takes.
CHUNKS = (
    *(b"", b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\xff", b"\x80", b"\r", b"\r\n", b"\n", b"\n\n", b"\x1f\x8b", b"PAR1"),
    *(b'"', b"'", b",", b"\t", b"[", b"]", b"{", b"}", b"[[", b"{}", b"null", b"NaN", b"Infinity", b"1e999", b"-0"),
    *(b"9" * 5000, b"[" * 2000, b'{"a":' * 2000, b"\\ud800", b"\\u0000", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\\"),
    *(b'{"prompt": "a", "completion": "b"}\n', b'{"text": "a"}\n', b'{"prompt": 1}\n', b"[]\n", b"\xc0\x80", b"\x1a"),
)
# Rows without a fault, so that what is wrong with a file is its form.
PLAIN_ROWS: tuple[list[dict[str, Any]], ...] = (
    [{"prompt": "a", "completion": "b c"}, {"prompt": "d", "completion": "e"}],
    [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": True}]}],
    [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "a\nb", "input": '"', "output": "\u2028"}],
    [{"question": "a?", "answer": "yes"}, {"question": "b?", "answer": "no"}],
    [{"input_ids": [1, 2, 3], "labels": [-100, 2, 0], "attention_mask": [1, 1, 1]}],
    [{"text": "some text"}],
)
ROWS = (
    st.sampled_from(PLAIN_ROWS)
    | st.sampled_from([*GOOD_ROWS]).flatmap(lambda name: st.lists(GOOD_ROWS[name], min_size=1, max_size=3))
    | st.lists(malformed_rows().map(lambda case: case[1]), min_size=1, max_size=3)
)
# Parquet and Arrow have types of their own; a column may mix nothing.
COLUMNS = ("text", "prompt", "completion", "messages", "instruction", "output", "input_ids", "labels", "question")
ARRAYS: tuple[Callable[[], pyarrow.Array], ...] = (
    lambda: pyarrow.array(["a", "b"]),
    lambda: pyarrow.array(["a", None]),
    lambda: pyarrow.nulls(2),
    lambda: pyarrow.array([b"\xff", b"a"]),
    lambda: pyarrow.array([1, 2**62]),
    lambda: pyarrow.array([[1, 2], [3]]),
    lambda: pyarrow.array([[1, None], None]),
    lambda: pyarrow.array([1.5, float("nan")]),
    lambda: pyarrow.array([2**62, -(2**62)], pyarrow.timestamp("us")),
    lambda: pyarrow.array([2**62, 0], pyarrow.duration("ns")),
    lambda: pyarrow.array([10**8, 0], pyarrow.date32()),
    lambda: pyarrow.array([{"role": "user", "content": "a"}, None]),
    lambda: pyarrow.array([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 2),
    lambda: pyarrow.array([[("a", 1)], [("a", 1), ("a", 2)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    lambda: pyarrow.array(["a", "b"]).dictionary_encode(),
    lambda: pyarrow.array(["a", "b"], pyarrow.large_string()),
    lambda: pyarrow.array([True, None]),
    # Bytes that say they are text.
    lambda: pyarrow.array([b"\xff\xfe", b"a"]).view(pyarrow.string()),
)


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, default=str)
    except (TypeError, ValueError, RecursionError):
        return json.dumps(str(type(value)))


def _as_csv(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerow([str(key) for key in rows[0]])
    for row in rows:
        writer.writerow([value if isinstance(value, str) else _as_json(value) for value in row.values()])
    return stream.getvalue().encode("utf-8", "surrogatepass")


def _as_parquet(names: list[str], arrays: list[pyarrow.Array]) -> bytes:
    stream = io.BytesIO()
    width = min(len(names), len(arrays))
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(arrays[:width], names[:width]), stream)
    return stream.getvalue()


PARQUET = st.builds(
    _as_parquet,
    st.lists(st.sampled_from(COLUMNS), min_size=1, max_size=3),
    st.lists(st.sampled_from(ARRAYS).map(lambda make: make()), min_size=1, max_size=3),
)
WHOLE_FILES: dict[str, st.SearchStrategy[bytes]] = {
    ".json": ROWS.map(_as_json).map(str.encode),
    ".jsonl": ROWS.map(lambda rows: "\n".join(map(_as_json, rows)).encode()),
    ".csv": ROWS.map(lambda rows: _as_csv(rows, ",")),
    ".tsv": ROWS.map(lambda rows: _as_csv(rows, "\t")),
    ".txt": st.text(max_size=40).map(str.encode),
    ".parquet": PARQUET,
}


@st.composite
def malformed_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """The suffix and the bytes of a file, with up to three edits anywhere in it."""
    suffix = draw(st.sampled_from([*WHOLE_FILES]))
    packed = suffix != ".parquet" and draw(st.integers(0, 4)) == 0
    content = draw(WHOLE_FILES[suffix])
    edits = draw(st.sampled_from([0, 1, 1, 2, 3]))
    if packed and draw(st.booleans()):
        content, packed = gzip.compress(content, mtime=0), False
        suffix += ".gz"
    for _ in range(edits):
        content = _edit(draw, content)
    if packed:
        content = gzip.compress(content, mtime=0)
        suffix += ".gz"
    return suffix, content


def _edit(draw: st.DrawFn, content: bytes) -> bytes:
    at = draw(st.integers(0, len(content)))
    behind = draw(st.integers(at, min(len(content), at + 40)))
    kind = draw(st.sampled_from(["truncate", "insert", "replace", "duplicate", "flip"]))
    if kind == "truncate":
        return content[:at]
    if kind == "duplicate":
        return content[:behind] + content[at:]
    if kind == "flip" and at < len(content):
        return content[:at] + bytes([content[at] ^ draw(st.integers(1, 255))]) + content[at + 1 :]
    return content[:at] + draw(st.sampled_from(CHUNKS)) + content[behind if kind == "replace" else at :]


# Small programs that fail, do not end as they should, or give something else than text.
SNIPPETS = (
    "{{ raise_exception('no') }}",
    "{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}",
    "{% if not add_generation_prompt %}{{ raise_exception() }}{% endif %}",
    "{{ absent }}",
    "{{ absent.of.nothing }}",
    "{{ messages[99]['content'] }}",
    "{{ messages[0].nothing.deeper }}",
    "{{ 1 / 0 }}",
    "{{ 10 ** 6000 }}",
    "{{ 'a' + 1 }}",
    "{{ messages + 1 }}",
    "{{ messages }}",
    "{{ messages | tojson }}",
    "{{ tools | tojson }}",
    "{{ messages | length }}",
    "{{ messages | nofilter }}",
    "{{ none | tojson | int }}",
    "{{ messages | sum }}",
    "{{ messages | map(attribute='content') | join | upper }}",
    "{{ [1, 2, 3] | random }}",
    "{{ messages | random }}",
    "{{ lipsum(n=1) }}",
    "{{ strftime_now('%s %N') }}",
    "{{ strftime_now(absent) }}",
    "{{ strftime_now }}",
    "{% macro again(x) %}{{ again(x) }}{% endmacro %}{{ again(1) }}",
    "{% for i in range(1000000000) %}{{ i }}{% endfor %}",
    "{{ 'x ' * 20000 }}",
    "{{ messages.append(messages[0]) }}",
    "{{ messages[0].update({'content': 'other'}) }}",
    "{{ messages.__class__.__mro__ }}",
    "{% set messages = [] %}",
    "{% set messages = messages[1:] %}",
    "{% set add_generation_prompt = true %}",
    "{% set add_generation_prompt = false %}",
    "{{ '%c' | format(55296) }}",
    "{{ '\\ud800' }}",
    "{{ '\\x00' }}",
    "\0",
    "{{ bos_token }}{{ bos_token }}",
    "{{ eos_token }}",
    "{{ pad_token }}",
    "{{ additional_special_tokens }}",
    "{% include 'other' %}",
    "{% extends 'other' %}",
    "{% break %}",
    "{% generation %}",
    "{% generation %}{% endgeneration %}",
    "{% endfor %}",
    "{% raw %}",
    "{#",
    "{{",
    "{% for message in messages %}",
    "{% block x %}{{ super() }}{% endblock %}",
    "{% set ns = namespace(a=1) %}{% set ns.a = ns %}{{ ns.a }}",
    "{{ caller() }}",
    "{{ self }}",
    "{{ loop.index }}",
    "{{ cycler() }}",
    "<|stop|>",
    "<|im_end|>",
    "[INST]",
    "\u202e\ufeff\u200b",
)
WORDS = ("messages", "message", "role", "content", "user", "assistant", "system", "add_generation_prompt", "absent")
_SHIPPED = (*TEMPLATES.values(), CHATML, TRIMMING, UNFAITHFUL, NO_STOP)
_TAGS = re.compile(r"(\{\{.*?\}\}|\{%.*?%\})", re.DOTALL)
_LEXER = Environment(keep_trailing_newline=True)


def _pieces(text: str, *, fine: bool) -> list[str]:
    """Return whole tags and what stands between them; or every word and mark."""
    if not fine:
        return [piece for piece in _TAGS.split(text) if piece]
    return [piece for _, _, piece in _LEXER.lex(text)]


@st.composite
def edited_templates(draw: st.DrawFn) -> str:
    """A template that ships, or one of the tests, with one to four edits of its pieces."""
    pieces = _pieces(draw(st.sampled_from(_SHIPPED)), fine=draw(st.integers(0, 3)) == 0)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 4]))):
        at = draw(st.integers(0, max(len(pieces) - 1, 0)))
        kind = draw(st.sampled_from(["delete", "duplicate", "insert", "insert", "insert", "rename", "rename", "move"]))
        if kind == "insert" or not pieces:
            pieces.insert(at, draw(st.sampled_from(SNIPPETS)))
        elif kind == "delete":
            del pieces[at : at + draw(st.sampled_from([1, 1, 3, 100]))]
        elif kind == "duplicate":
            pieces[at:at] = pieces[at : at + draw(st.integers(1, 12))]
        elif kind == "move":
            pieces.insert(draw(st.integers(0, len(pieces))), pieces.pop(at))
        else:
            old, new = draw(st.sampled_from(WORDS)), draw(st.sampled_from(WORDS))
            pieces[at] = pieces[at].replace(old, new)
    return "".join(pieces)
