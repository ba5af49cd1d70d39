"""YAML with line numbers, read by the 1.2 core rules.

Owns turning YAML text into plain values plus the line of every key. PyYAML reads by YAML 1.1,
where `off` is a boolean and `5e-3` a string; both would surprise here.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from loralab.errors import Problem


class CoreLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalar rules of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own form

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node; a value that its tag cannot have is an error with its line."""
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            reason = "a number of too many digits" if "digits" in str(error) else f"not a value of {node.tag}"
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark) from error


def _add_core_rules() -> None:
    rules = (
        ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
        ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
        ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", "-+0123456789"),
        (
            "tag:yaml.org,2002:float",
            r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
            "-+0123456789.",
        ),
    )
    for tag, pattern, first in rules:
        CoreLoader.add_implicit_resolver(tag, re.compile(pattern), list(first))


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # PyYAML would read 010 as octal


_add_core_rules()
CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)


@dataclass
class LinedYaml:
    """A YAML document.

    Attributes:
        value: the document as plain Python values.
        lines: 1-based line of each key, by dotted path.
        problems: what could not be read; `value` is then incomplete.
    """

    value: Any = None
    lines: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def parse_yaml(text: str, name: str) -> LinedYaml:
    """Parse `text`; `name` is the file's name in messages."""
    document = LinedYaml()
    try:
        loader = CoreLoader(text)
    except yaml.YAMLError as error:
        document.problems.append(Problem(f"not valid YAML: {error}", name, "remove control characters"))
        return document
    try:
        node = loader.get_single_node()
        if node is not None:
            document.value = _plain(loader, node, "", document, name)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name} line {mark.line + 1}, column {mark.column + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error)
        document.problems.append(
            Problem(f"not valid YAML: {problem}", where, "check indentation, colons and quotes on that line")
        )
    except RecursionError:
        line = loader.line + 1
        document.problems.append(
            Problem("nested too deeply", f"{name} line {line}", "close the brackets; no setting has that many levels")
        )
    finally:
        loader.dispose()
    return document


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper that also quotes what YAML 1.2 would not read as a string."""


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    try:
        same = parse_scalar(value) == value
    except yaml.YAMLError:
        same = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if same else '"')


_Dumper.add_representer(str, _represent_text)


def dump_yaml(value: Any) -> str:
    """Return YAML that reads back equal by the 1.1 and the 1.2 rules."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def parse_scalar(text: str) -> Any:
    """Read one value as it would be read in a YAML file.

    Raises:
        yaml.YAMLError: the text is not valid YAML.
        RecursionError: it is nested too deeply.
    """
    return yaml.load(text, CoreLoader)  # noqa: S506 - CoreLoader is a SafeLoader


def _plain(
    loader: CoreLoader, node: yaml.Node, path: str, document: LinedYaml, name: str, *, outer: tuple[yaml.Node, ...] = ()
) -> Any:
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node, deep=True)
    if any(node is each for each in outer):
        raise yaml.constructor.ConstructorError(None, None, "an alias contains itself", node.start_mark)
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(loader.construct_object(key_node, deep=True))
        line = key_node.start_mark.line + 1
        dotted = f"{path}.{key}" if path else key
        if key == "<<":
            what, fix = "merge keys (<<) are not supported", "write the keys out; loralab shows the line of each"
            document.problems.append(Problem(what, f"{name} line {line}", fix))
            continue
        if key in values:
            document.problems.append(
                Problem(
                    f"key given twice: {dotted!r} (first on line {document.lines[dotted]})",
                    f"{name} line {line}",
                    "keep one of them",
                )
            )
        document.lines[dotted] = line
        values[key] = _plain(loader, value_node, dotted, document, name, outer=(*outer, node))
    return values
