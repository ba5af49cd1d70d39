"""Prompt templates: Jinja texts by name, the choice among them, and making a chosen one ready.

Owns the names and needs of the shipped templates (their texts are in `chat_templates/`), and what
is done to a template before its first use. A template's whole text goes into the adapter's
tokenizer, so that every other tool prompts the adapter as it was trained.
"""

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

from loralab.config.findings import Finding
from loralab.config.paths import local_path
from loralab.config.schema import Config
from loralab.data.example import Message
from loralab.data.prompts.template_text import (
    FROZEN_DAY,
    freeze_date,
    freeze_values,
    parse_template,
    put_in_front,
    without_layout,
)
from loralab.errors import DataError
from loralab.lookup import suggest

# One of these goes before a named template where the tokenizer starts every text with its bos
# token, so that the chat template alone gives the ids that the base model was trained to see
# first. SentencePiece-like tokenizers need the blank that they put before plain text themselves.
BOS_PREFIXES = {"": "{{- bos_token -}}", " ": "{{- bos_token + ' ' -}}"}

TOKENIZERS_OWN = "tokenizer"

# Text of a template, messages, whether to add the generation prompt -> the rendering.
# Raises DataError where the template refuses.
RenderProbe: TypeAlias = Callable[[str, Sequence[Message], bool], str]

_PROBE = (Message("user", "red"), Message("assistant", "green"), Message("user", "blue"), Message("assistant", "grey"))
_PROBES = (_PROBE, (Message("system", "black"), *_PROBE))
_LEFT_OUT = "blanks and line breaks between its tags only lay it out for reading and are left out, because with them"
_WRITTEN_INDENTATION = re.compile(r"^[ \t]{2,}", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Template:
    """A chosen template.

    Attributes:
        name: its name in `TEMPLATES`, "tokenizer", or the path of a file.
        text: the whole Jinja text.
        reason: why it was chosen, and what was done to it.
    """

    name: str
    text: str
    reason: str


@dataclass(frozen=True, slots=True)
class Shipped:
    """What a shipped template asks of a tokenizer.

    Attributes:
        tokens: texts that must be tokens of their own, in the order in which a prompt has them.
        writes_bos: whether the template writes the bos token itself, as its published form does.
    """

    tokens: tuple[str, ...] = ()
    writes_bos: bool = False


def resolve_template(
    setting: str, *, own: str | None, fallback: str | None, own_first: bool, bos_prefix: str
) -> Template:
    """Choose the template; `prepare_template` makes it ready for use.

    Args:
        setting: `data.template`.
        own: the tokenizer's own chat template, if it has one.
        fallback: the format's template for `auto`; None for rows that no template renders.
        own_first: whether `auto` prefers `own` to `fallback`.
        bos_prefix: Jinja text that writes the bos token, or "" where there is none to write.

    Raises:
        DataError: `tokenizer` without a template, or a file that cannot be read.
    """
    if setting == "auto":
        if own and own_first:
            return Template(TOKENIZERS_OWN, own, "the tokenizer has a chat template of its own")
        name = fallback or "none"
        why = "rows of this format are used as they stand" if name == "none" else "the tokenizer has no chat template"
        return Template(name, _shipped_text(name, bos_prefix), why)
    if setting == TOKENIZERS_OWN:
        if own:
            return Template(setting, own, "set in data.template")
        raise DataError(
            "the tokenizer has no chat template of its own",
            where="key data.template",
            fix=f"choose one: {', '.join(TEMPLATES)}, or the path of a Jinja file",
        )
    if setting in TEMPLATES:
        return Template(setting, _shipped_text(setting, bos_prefix), "set in data.template")
    return Template(setting, _read_template(Path(setting).expanduser()), "file set in data.template")


def _shipped_text(name: str, bos_prefix: str) -> str:
    shipped = SHIPPED[name]
    if shipped.writes_bos:
        return TEMPLATES[name]
    # A special token takes no blank before it: only plain text begins with one.
    prefix = BOS_PREFIXES[""] if bos_prefix and shipped.tokens else bos_prefix
    return prefix + TEMPLATES[name]


def _read_template(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read the template file {str(path)!r}: {error}", where="key data.template", fix="give a UTF-8 file"
        ) from None
    if not text.strip():
        raise DataError(f"empty template file {str(path)!r}", where="key data.template", fix="give a Jinja template")
    return text


def prepare_template(
    template: Template, *, vocabulary: Container[str], kwargs: Mapping[str, Any], render: RenderProbe
) -> Template:
    """Return the template as it is used from here on: complete in itself and the same on every day.

    Variables of `data.template_kwargs` and today's date become part of the text, and blanks that
    only lay a file out for reading go.

    Args:
        template: as `resolve_template` chose it.
        vocabulary: the tokenizer's tokens, added ones included.
        kwargs: `data.template_kwargs`.
        render: renders a small conversation with a template's text under the run's tokenizer.

    Raises:
        DataError: no valid Jinja, a token that the tokenizer lacks, a variable that the template
            does not read, a date that cannot be fixed.
    """
    where = _place(template.name)
    tree = parse_template(template.text, where=where)
    _check_tokens(template.name, vocabulary)
    values, date = freeze_values(tree, kwargs), freeze_date(tree, where=where)
    notes = [template.reason]
    if values:
        notes.append(f"{', '.join(kwargs)} fixed by data.template_kwargs")
    if date:
        day = f"{FROZEN_DAY:%d %b %Y}"
        notes.append(f"where it asks for today's date it gets {day}: another day would be another prompt")
    text, note = _choose_layout(template, values + date, render)
    return replace(template, text=text, reason="; ".join(notes + ([note] if note else [])))


def _place(name: str) -> str:
    if name == TOKENIZERS_OWN:
        return "the tokenizer's chat template"
    return f"template {name}" if name in TEMPLATES else f"template file {name}"


def _check_tokens(name: str, vocabulary: Container[str]) -> None:
    absent = [token for token in SHIPPED[name].tokens if token not in vocabulary] if name in SHIPPED else []
    if absent:
        raise DataError(
            f"template {name} needs {', '.join(map(repr, absent))}, which this tokenizer does not have as tokens",
            where="key data.template",
            fix=f"choose one that fits this tokenizer: {', '.join(usable_templates(vocabulary))}, or a Jinja file",
        )


def usable_templates(vocabulary: Container[str]) -> list[str]:
    """Return the names of the shipped templates whose tokens are all in `vocabulary`."""
    return [name for name, shipped in SHIPPED.items() if all(token in vocabulary for token in shipped.tokens)]


def _choose_layout(template: Template, front: str, render: RenderProbe) -> tuple[str, str]:
    """Return the text to use, and why where it is not the template's own.

    A shipped template writes no layout. A tokenizer's own was used as it stands to train the model,
    so it is changed only where it could not be used at all.
    """
    whole = put_in_front(front, template.text)
    squeezed = None if template.name in TEMPLATES else without_layout(template.text)
    if squeezed is None:
        return whole, ""
    bare = put_in_front(front, squeezed)
    before, after = _renderings(whole, render), _renderings(bare, render)
    if not after.texts or not after.extends:
        return whole, ""
    if before.texts and not before.extends:
        return bare, f"{_LEFT_OUT} it does not extend its own prompt"
    if template.name != TOKENIZERS_OWN and before.indents and not after.indents:
        return bare, f"{_LEFT_OUT} it writes its own indentation into prompts"
    return whole, ""


@dataclass(frozen=True, slots=True)
class _Renderings:
    """How a template renders the probes that it does not refuse."""

    texts: tuple[str, ...]
    extends: bool
    indents: bool


def _renderings(text: str, render: RenderProbe) -> _Renderings:
    texts: list[str] = []
    extends = True
    for probe in _PROBES:
        try:
            for turn in (len(probe) - 3, len(probe) - 1):
                prompt, whole = render(text, probe[:turn], True), render(text, probe[: turn + 1], False)
                extends = extends and whole.startswith(prompt)
                texts.append(whole)
        except DataError:  # a role that the template has no place for: another probe may do
            continue
    return _Renderings(tuple(texts), extends, any(map(_WRITTEN_INDENTATION.search, texts)))


def check_template_name(config: Config) -> list[Finding]:
    """Return a finding for a `data.template` that is no name and no file."""
    name = config.data.template
    if name in ("auto", TOKENIZERS_OWN) or name in TEMPLATES:
        return []
    path = local_path(name)
    if path is None or path.is_file():  # what is no path at all is a finding of its own
        return []
    if "/" in name or name.endswith((".jinja", ".j2")):
        return [Finding("data.template", f"no such template file: {name!r}", "give the path of a Jinja file")]
    known = ["auto", TOKENIZERS_OWN, *TEMPLATES]
    return [Finding("data.template", f"no such template: {name!r}", suggest(name, known))]


def _load(name: str) -> str:
    return (resources.files("loralab") / "data" / "prompts" / "chat_templates" / f"{name}.jinja").read_text(
        encoding="utf-8"
    )


# Name: what it needs. The text is chat_templates/NAME.jinja.
SHIPPED: dict[str, Shipped] = {
    "alpaca": Shipped(),
    "none": Shipped(),
    "chatml": Shipped(("<|im_start|>", "<|im_end|>")),
    "gemma": Shipped(("<start_of_turn>", "<end_of_turn>"), writes_bos=True),
    "llama3": Shipped(("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), writes_bos=True),
    "mistral": Shipped(writes_bos=True),
    "phi3": Shipped(("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "qwen": Shipped(("<|im_start|>", "<|im_end|>")),
    "vicuna": Shipped(),
    "zephyr": Shipped(),
}
TEMPLATES: dict[str, str] = {name: _load(name) for name in SHIPPED}
