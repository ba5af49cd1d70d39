"""YAML by the 1.2 core rules, with lines."""

import math
from typing import Any

import pytest

from loralab.config.yaml_lines import parse_scalar, parse_yaml

SCALARS: dict[str, Any] = {
    "off": "off",
    "on": "on",
    "yes": "yes",
    "No": "No",
    "y": "y",
    "true": True,
    "False": False,
    "5e-3": 0.005,
    "2.0e-4": 0.0002,
    "1E5": 1e5,
    ".5": 0.5,
    "1.": 1.0,
    "-.inf": -math.inf,
    "010": 10,
    "-7": -7,
    "+3": 3,
    "1_000": "1_000",
    "12:30": "12:30",
    "2020-01-01": "2020-01-01",
    "null": None,
    "~": None,
    "": None,
    "'null'": "null",
    '"5"': "5",
    "1.2.3": "1.2.3",
    "[a, 1, off]": ["a", 1, "off"],
    "{a: 1e1}": {"a": 10.0},
}


@pytest.mark.parametrize(("text", "value"), SCALARS.items())
def test_scalar_in_a_file_and_on_the_command_line(text: str, value: Any) -> None:
    for got in (parse_scalar(text), parse_yaml(f"key: {text}\n", "f").value["key"]):
        assert got == value
        assert type(got) is type(value)


def test_nan_is_a_float() -> None:
    assert math.isnan(parse_scalar(".nan"))


def test_lines_of_every_key() -> None:
    document = parse_yaml("# comment\na:\n  b: 1\n\n  c: {d: 2,\n      e: 3}\nf: 4\n", "f.yaml")
    assert document.value == {"a": {"b": 1, "c": {"d": 2, "e": 3}}, "f": 4}
    assert document.lines == {"a": 2, "a.b": 3, "a.c": 5, "a.c.d": 5, "a.c.e": 6, "f": 7}
    assert document.problems == []


def test_duplicate_keys_name_both_lines() -> None:
    document = parse_yaml("a:\n  b: 1\n  c: 2\n  b: 3\na: 5\n", "f.yaml")
    assert [(p.what, p.where) for p in document.problems] == [
        ("key given twice: 'a.b' (first on line 2)", "f.yaml line 4"),
        ("key given twice: 'a' (first on line 1)", "f.yaml line 5"),
    ]


def test_same_key_in_two_sections_is_no_duplicate() -> None:
    assert parse_yaml("a: {x: 1}\nb: {x: 2}\n", "f").problems == []


@pytest.mark.parametrize(
    ("text", "line"),
    [("a: 1\nb: [1\nc: 2\n", 3), ("a: 1\n\tb: 2\n", 2), ("a: 'x\n", 2), ("a: 1\nb: !!python/name:os.system x\n", 2)],
)
def test_invalid_yaml_names_the_line(text: str, line: int) -> None:
    (problem,) = parse_yaml(text, "f.yaml").problems
    assert problem.what.startswith("not valid YAML: ")
    assert problem.where.startswith(f"f.yaml line {line}, column ")


@pytest.mark.parametrize(("text", "value"), [("", None), ("# nothing\n", None), ("- a\n- b\n", ["a", "b"]), ("x", "x")])
def test_documents_that_are_no_mapping(text: str, value: Any) -> None:
    assert parse_yaml(text, "f").value == value


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        (f"a: 1\nb: !!int {'1' * 5000}\n", "a number of too many digits", 2),
        (f"a: 1\nb: {'1' * 5000}\n", "a number of too many digits", 2),
        ("a:\n  b: [1, !!int x]\n", "not a value of tag:yaml.org,2002:int", 2),
        ("a: !!float x\n", "not a value of tag:yaml.org,2002:float", 1),
        ("a: !!bool x\n", "not a value of tag:yaml.org,2002:bool", 1),
        ("a: !!timestamp x\n", "not a value of tag:yaml.org,2002:timestamp", 1),
        ("a: !!binary é\n", "", 1),
        ("a: 1\nb: &x {c: {d: *x}}\n", "an alias contains itself", 2),
        ("a: 1\nb: &x [1, *x]\n", "recursive", 2),
    ],
)
def test_values_that_no_tag_takes_name_their_line(text: str, what: str, line: int) -> None:
    (problem,) = parse_yaml(text, "f.yaml").problems
    assert what in problem.what
    assert problem.where.startswith(f"f.yaml line {line}, column ")


@pytest.mark.parametrize("text", ["a: 1\nb: " + "[" * 20_000, "a: 1\nb: " + "{a: " * 20_000])
def test_deep_nesting_is_no_alias(text: str) -> None:
    (problem,) = parse_yaml(text, "f.yaml").problems
    assert problem.what == "nested too deeply"
    assert problem.where == "f.yaml line 2"


def test_merge_keys_are_refused_by_name() -> None:
    document = parse_yaml("a: &x {b: 1}\nc:\n  <<: *x\n  d: 2\n", "f.yaml")
    (problem,) = document.problems
    assert (problem.what, problem.where) == ("merge keys (<<) are not supported", "f.yaml line 3")


def test_alias_of_a_mapping_may_be_used_twice() -> None:
    document = parse_yaml("a: &x {b: 1}\nc: *x\nd: {e: *x}\n", "f.yaml")
    assert document.problems == []
    assert document.value == {"a": {"b": 1}, "c": {"b": 1}, "d": {"e": {"b": 1}}}
