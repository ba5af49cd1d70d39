"""The part of Go's text/template that prompts of Ollama need: read, and evaluated.

Owns its grammar here: text, printing, `if` with `else if`, `range`, variables, the functions `eq`, `ne`, `and`, `or`
and `not`, and the trimming marks. Whatever lies outside is refused, never guessed. What values a template
gets is `ollama_prompt.py`'s.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from loralab.errors import TemplateError

_ACTION = re.compile(r"""\{\{(-\s)?((?:"(?:\\.|[^"\\])*"|`[^`]*`|[^"`}]|\}(?!\}))*?)(\s-)?\}\}""", re.DOTALL)
_WORD = re.compile(r"""\s*("(?:\\.|[^"\\])*"|`[^`]*`|:=|[()=]|-?\d+|[$.][\w.]*|\w+)""")
_BLANKS = " \t\r\n"


@dataclass(slots=True)
class _Block:
    """A list of nodes with the branch that it belongs to."""

    kind: str
    condition: Sequence[Any] = ()
    nodes: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Text:
    text: str


@dataclass(frozen=True, slots=True)
class _Print:
    value: Any


@dataclass(frozen=True, slots=True)
class _Set:
    name: str
    value: Any
    declares: bool


@dataclass(frozen=True, slots=True)
class _If:
    branches: list[_Block]


@dataclass(frozen=True, slots=True)
class _Range:
    body: _Block


_Scopes: TypeAlias = list[dict[str, Any]]


def quote_text(text: str) -> str:
    """Return text as it stands in a template, with what would be read as an action, or end a Modelfile's text, quoted.

    Args:
        text: to be written as it is.
    """
    return re.sub(r'\{\{+|\{$|"""', lambda found: f"{{{{ {json.dumps(found[0])} }}}}", text)


class GoTemplate:
    """A template, ready to be evaluated.

    Args:
        text: of the template.

    Raises:
        TemplateError: it uses something that this module does not know.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._nodes = _parse(text)
        self.fields = set(re.findall(r"\.([A-Z]\w*)", " ".join(found[2] for found in _ACTION.finditer(text))))

    def render(self, values: Mapping[str, Any]) -> str:
        """Return what the template makes of `values`.

        Raises:
            TemplateError: it asks for a value that is not there.
        """
        written: list[str] = []
        _run(self._nodes, values, [{"$": values}], written)
        return "".join(written)


def _parse(text: str) -> list[Any]:
    blocks = [_Block("root")]
    for kind, piece in _pieces(text):
        if kind == "text":
            if piece:
                blocks[-1].nodes.append(_Text(piece))
            continue
        words = _words(piece)
        if words and words[0] in ("if", "range"):
            blocks.append(_Block(words[0], words[1:]))
        elif words == ["else"] or words[:2] == ["else", "if"]:
            _open_else(blocks, words)
        elif words == ["end"]:
            _close(blocks)
        elif words:
            blocks[-1].nodes.append(_statement(words))
    if len(blocks) > 1:
        raise _unknown("an open block without its end")
    return blocks[0].nodes


def _open_else(blocks: list[_Block], words: Sequence[str]) -> None:
    if blocks[-1].kind not in ("if", "else if"):
        raise _unknown("else without if")
    blocks.append(_Block("else if" if len(words) > 1 else "else", words[2:]))


def _close(blocks: list[_Block]) -> None:
    if blocks[-1].kind == "range":
        body = blocks.pop()
        blocks[-1].nodes.append(_Range(body))
        return
    branches: list[_Block] = []
    while blocks[-1].kind in ("else", "else if"):
        branches.insert(0, blocks.pop())
    if blocks[-1].kind != "if":
        raise _unknown("end without a block")
    branches.insert(0, blocks.pop())
    blocks[-1].nodes.append(_If(branches))


def _pieces(text: str) -> list[tuple[str, str]]:
    """Return texts and actions in order, with blanks gone where an action trims them."""
    pieces: list[tuple[str, str]] = []
    at, trims = 0, False
    for found in _ACTION.finditer(text):
        before = text[at : found.start()]
        before = before.lstrip(_BLANKS) if trims else before
        pieces.append(("text", before.rstrip(_BLANKS) if found[1] else before))
        pieces.append(("action", found[2].strip()))
        at, trims = found.end(), bool(found[3])
    rest = text[at:].lstrip(_BLANKS) if trims else text[at:]
    pieces.append(("text", rest))
    if any("{{" in piece for kind, piece in pieces if kind == "text"):
        raise _unknown("an action that is not closed")
    return pieces


def _words(action: str) -> list[str]:
    words, at = [], 0
    while at < len(action.rstrip()):
        found = _WORD.match(action, at)
        if found is None:
            raise _unknown(f"the action {action!r}")
        words.append(found[1])
        at = found.end()
    return words


def _statement(words: Sequence[str]) -> Any:
    if len(words) > 2 and words[0].startswith("$") and words[1] in (":=", "="):
        return _Set(words[0], list(words[2:]), words[1] == ":=")
    return _Print(list(words))


def _run(nodes: Sequence[Any], dot: Any, scopes: _Scopes, written: list[str]) -> None:
    for node in nodes:
        if isinstance(node, _Text):
            written.append(node.text)
        elif isinstance(node, _Print):
            written.append(_printed(_evaluate(node.value, dot, scopes)))
        elif isinstance(node, _Set):
            _set(node, dot, scopes)
        elif isinstance(node, _If):
            chosen = next((b for b in node.branches if b.kind == "else" or _evaluate(b.condition, dot, scopes)), None)
            if chosen is not None:
                _run(chosen.nodes, dot, [*scopes, {}], written)
        else:
            for each in _evaluate(node.body.condition, dot, scopes):
                _run(node.body.nodes, each, [*scopes, {}], written)


def _set(node: _Set, dot: Any, scopes: _Scopes) -> None:
    value = _evaluate(node.value, dot, scopes)
    home = scopes[-1] if node.declares else next((each for each in reversed(scopes) if node.name in each), None)
    if home is None:
        raise _unknown(f"the variable {node.name}, which is not declared")
    home[node.name] = value


def _printed(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (str, int)):
        return str(value)
    raise _unknown(f"printing of {type(value).__name__}")


def _evaluate(words: Sequence[str], dot: Any, scopes: _Scopes) -> Any:
    values, rest = _arguments(words, dot, scopes)
    if rest:
        raise _unknown("a closing bracket without its opening one")
    name, *arguments = values
    if isinstance(name, _Function):
        return name.call(*arguments)
    if arguments:
        raise _unknown(f"the words {' '.join(words)!r}")
    return name


@dataclass(frozen=True, slots=True)
class _Function:
    call: Callable[..., Any]


def _arguments(words: Sequence[str], dot: Any, scopes: _Scopes) -> tuple[list[Any], Sequence[str]]:
    values: list[Any] = []
    while words:
        word, words = words[0], words[1:]
        if word == ")":
            return values, [word, *words]
        if word == "(":
            inner, words = _arguments(words, dot, scopes)
            if not words:
                raise _unknown("an open bracket")
            words = words[1:]
            head, *others = inner
            values.append(head.call(*others) if isinstance(head, _Function) else head)
        else:
            values.append(_operand(word, dot, scopes))
    if not values:
        raise _unknown("an empty action")
    return values, words


def _operand(word: str, dot: Any, scopes: _Scopes) -> Any:
    if word[0] in '"`':
        return json.loads(word) if word[0] == '"' else word[1:-1]
    if word in ("true", "false") or word.lstrip("-").isdigit():
        return json.loads(word)
    if word.startswith("."):
        return _field(dot, word[1:])
    if word.startswith("$"):
        name, _, path = word.partition(".")
        home = next((each for each in reversed(scopes) if name in each), None)
        if home is None:
            raise _unknown(f"the variable {name}, which is not declared")
        return _field(home[name], path)
    if word in _FUNCTIONS:
        return _Function(_FUNCTIONS[word])
    raise _unknown(f"the word {word!r}")


def _field(value: Any, path: str) -> Any:
    for name in path.split(".") if path else []:
        if not isinstance(value, Mapping) or name not in value:
            raise _unknown(f"the value .{name}")
        value = value[name]
    return value


def _first(values: Sequence[Any], *, wanted: bool) -> Any:
    """Return the first value that is true (or false), else the last, as `or` and `and` do."""
    return next((each for each in values[:-1] if bool(each) is wanted), values[-1])


def _unknown(what: str) -> TemplateError:
    return TemplateError(
        f"a Go template with {what}, which is not evaluated here",
        where="the Modelfile's TEMPLATE",
        fix="write it with if, range, variables, eq, ne, and, or, not",
    )


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": lambda first, *others: any(first == other for other in others),
    "ne": lambda first, second: first != second,
    "and": lambda *values: _first(values, wanted=False),
    "or": lambda *values: _first(values, wanted=True),
    "not": lambda value: not value,
}
