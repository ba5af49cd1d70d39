"""What a template's text says about itself, and what is written in front of it.

Owns reading a chat template without running it: its mistakes, the variables that it reads, the
date that it asks for, the blanks of its layout, the mark behind an answer. Renders nothing.
"""

import json
import re
from collections.abc import Container, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, UndefinedError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from loralab.errors import DataError, excerpt
from loralab.lookup import suggest

# The day that Llama 3.2's own template names where nobody tells it another.
FROZEN_DAY = datetime(2024, 7, 26)
_CLOCK = "strftime_now"
# What the renderer itself passes or defines, and Jinja's own words: a frozen value would hide them.
_RESERVED = frozenset(
    """
    messages tools documents add_generation_prompt continue_final_message chat_template
    bos_token eos_token unk_token pad_token sep_token cls_token mask_token additional_special_tokens
    raise_exception strftime_now namespace dict range lipsum cycler joiner
    loop self super caller varargs kwargs true false none True False None and or not in is if else
    """.split()  # noqa: SIM905 (a word each)
)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INDENTED = re.compile(r"\n[ \t]{2,}")
_MARK = re.compile(r"<[^<>\s]{1,60}>|\[/?[A-Z][A-Z_]{1,30}\]")
_NO_TOKEN = re.compile(r"'(\w+)_token' is undefined")


class _GenerationBlock(Extension):
    """`{% generation %}`, which marks answers in templates made for training."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


# As every renderer of chat templates sets it: a line break behind a block, and blanks before one, are layout.
# Sandboxed, because folding constants computes what a template from elsewhere wrote.
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
)
# Its tokens are the whole text, blanks between tags included.
_VERBATIM = Environment(keep_trailing_newline=True)  # noqa: S701 (prompts are no HTML, and nothing is rendered here)


def parse_template(text: str, *, where: str) -> nodes.Template:
    """Return the syntax tree of a template.

    Args:
        text: the whole Jinja text.
        where: file or key that it comes from.

    Raises:
        DataError: it is no Jinja (with the line), or it needs another file.
    """
    try:
        tree = _ENVIRONMENT.parse(text)
        _ENVIRONMENT.compile(tree)  # folds constants, so that '%d' + ' %b' is one text
        meta.find_undeclared_variables(tree)
    except TemplateSyntaxError as error:
        raise _not_jinja(error, f"{where}, line {error.lineno}") from error
    except Exception as error:  # nested too deep, or a mistake that only Python's compiler finds
        raise _not_jinja(error, where) from error
    other = next(tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)), None)
    if other is not None:
        raise DataError(
            "the template takes in another file, which a tokenizer cannot carry",
            where=f"{where}, line {other.lineno}",
            fix="write the whole template into one file",
        )
    return tree


def _not_jinja(error: Exception, where: str) -> DataError:
    return DataError(f"the template is no valid Jinja: {excerpt(error)}", where=where, fix="mend it there")


def freeze_date(tree: nodes.Template, *, where: str) -> str:
    """Return Jinja text that makes every date of the template one fixed day, or "" where it asks for none.

    Raises:
        DataError: it asks for a date in a form that only rendering would tell.
    """
    if _CLOCK not in meta.find_undeclared_variables(tree):
        return ""
    formats = []
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == _CLOCK:
            given = [*call.args, *(keyword.value for keyword in call.kwargs)]
            if len(given) != 1 or not isinstance(given[0], nodes.Const) or call.dyn_args or call.dyn_kwargs:
                raise _unknown_date(f"{where}, line {call.lineno}")
            formats.append(str(given[0].value))
    asked = [
        test
        for test in tree.find_all(nodes.Test)
        if isinstance(test.node, nodes.Name) and test.node.name == _CLOCK and test.name in ("defined", "undefined")
    ]
    named = [name for name in tree.find_all(nodes.Name) if name.name == _CLOCK]
    if len(named) != len(formats) + len(asked):
        raise _unknown_date(f"{where}, line {named[0].lineno}")
    return _date_macro(dict.fromkeys(formats), where) if formats else ""


def _unknown_date(where: str) -> DataError:
    return DataError(
        f"the template asks {_CLOCK} for today's date without writing the format out, so no day can be fixed for it",
        where=where,
        fix=f"write {_CLOCK}('%d %b %Y') with the format in place, or a date of your own",
    )


def _date_macro(formats: Mapping[str, None], where: str) -> str:
    choices: list[str] = []
    for form in formats:
        try:
            day = FROZEN_DAY.strftime(form)
        except ValueError as error:
            raise DataError(
                f"the template asks for the date as {form!r}: {excerpt(error)}", where=where, fix="mend the format"
            ) from error
        test = "if" if not choices else "elif"
        choices.append(f"{{%- {test} format == {render_literal(form)} -%}}{{{{- {render_literal(day)} -}}}}")
    return f"{{%- macro {_CLOCK}(format) -%}}{''.join(choices)}{{%- endif -%}}{{%- endmacro -%}}"


def freeze_values(tree: nodes.Template, values: Mapping[str, Any]) -> str:
    """Return Jinja text that gives variables of the template fixed values.

    Args:
        tree: of the template that reads them.
        values: JSON values by name.

    Raises:
        DataError: a name that the template does not read, or a value that is no JSON.
    """
    known = sorted(meta.find_undeclared_variables(tree) - _RESERVED)
    settings = []
    for name, value in values.items():
        where = f"key data.template_kwargs.{name}"
        if name in _RESERVED or not _NAME.fullmatch(name):
            fix = f"choose among what the template reads: {', '.join(known) or '(nothing)'}"
            raise DataError(f"not a variable that can be set: {name!r}", where=where, fix=fix)
        if name not in known:
            raise DataError(f"the template reads no variable {name!r}", where=where, fix=suggest(name, known))
        try:
            settings.append(f"{{%- set {name} = {render_literal(value)} -%}}")
        except (TypeError, ValueError) as error:
            fix = "give text, a number, true, false, null, or lists and mappings of these"
            raise DataError(f"{name} cannot be written into the template: {error}", where=where, fix=fix) from error
    return "".join(settings)


def render_literal(value: Any) -> str:
    """Return a JSON value as Jinja writes it.

    Raises:
        TypeError: `value` is of another kind.
        ValueError: a number that is not finite.
    """
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_text_key(key)}: {render_literal(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(render_literal, value)) + "]"
    if isinstance(value, (str, int, float)):
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _text_key(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"the key {key!r} is no text")
    return render_literal(key)


def put_in_front(front: str, text: str) -> str:
    """Return a template that runs `front`, tags that write nothing, and then is exactly `text`."""
    if not front:
        return text
    # Blanks at the start of a template may be meant; of "%}\n" the line break is layout.
    return (front.removesuffix("-%}") + "%}" if text[:1].isspace() else front) + "\n" + text


def without_layout(text: str) -> str | None:
    """Return a template without the blanks between its tags, or None where they may be meant.

    They are layout where nothing but blanks stands between tags and some lines are indented. What
    stands inside tags stays as it is.
    """
    kept, between = [], []
    for kind, piece in _tokens(text):
        if kind == "raw_begin":
            return None
        if kind == "data":
            between.append(piece)
        else:
            kept.append(piece.rstrip() if kind.endswith("_end") else piece)
    if any(piece.strip() for piece in between) or not any(map(_INDENTED.search, between)):
        return None
    return "".join(kept)


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    for _, kind, piece in _VERBATIM.lex(text):
        yield kind, piece


def missing_end(behind: str, vocabulary: Container[str]) -> str | None:
    """Return a mark that ends an answer and is no token, or None.

    Args:
        behind: what the template writes behind the text of an answer.
        vocabulary: the tokenizer's tokens, added ones included.

    Returns:
        The mark, such as "<|im_end|>"; None where `behind` begins with a token, a word, or nothing.
    """
    found = _MARK.match(behind.lstrip())
    if found is None or found[0] in vocabulary:
        return None
    return found[0]


def explain_render_error(error: Exception) -> str:
    """Return what went wrong in a template, in words of the one who chose it."""
    absent = _NO_TOKEN.search(str(error)) if isinstance(error, UndefinedError) else None
    if absent:
        return f"the template needs {_article(absent[1])} {absent[1]} token, which this tokenizer does not have"
    return excerpt(error)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
