"""Row formats: each is one function from a row to an `Example` and one line in `FORMATS`.

Owns column names and format detection. Knows no tokenizer and no template text.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from loralab.config.checks import Finding
from loralab.config.schema import Config
from loralab.data.example import Conversation, Document, Example, Message, Tokens
from loralab.errors import DataError
from loralab.lookup import suggest

Fields = Mapping[str, Any]

# Between instruction and input in an Alpaca user turn; the alpaca template looks for it.
ALPACA_INPUT_MARK = "\n\n### Input:\n"
_LARGEST_ID = 2**31  # tokens are stored as int32


class RowError(Exception):
    """A row that its format cannot use; the message says which field and what it held."""


@dataclass(frozen=True, slots=True)
class Format:
    """A row format.

    Attributes:
        build: makes an `Example` of a row whose columns have the format's own names.
        required: fields that must be there.
        optional: fields that may be there.
        template: template that `data.template: auto` takes when the tokenizer has none;
            None where the rows are no conversations.
        own_template_first: whether a tokenizer's own template goes before `template`.
        meaningless: keys of the data section that rows of this format do not know, each with the
            value besides the default that does no harm.
    """

    build: Callable[[Fields], Example]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    template: str | None = None
    own_template_first: bool = True
    meaningless: Mapping[str, str] = field(default_factory=lambda: {"long_text": ""})


def text_field(row: Fields, name: str, *, default: str | None = None) -> str:
    """Return a string field.

    Raises:
        RowError: it is missing (and has no default) or not a string.
    """
    value = row.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, str):
        return value
    if name not in row:
        raise RowError(f"missing field {name!r}; the row has: {_list(row)}")
    raise RowError(f"field {name!r} is {type(value).__name__}, not a string: {_short(value)}")


def build_alpaca(row: Fields) -> Example:
    """Build a conversation from `instruction`, optional `input`, and `output`.

    Source: Taori et al. 2023, Stanford Alpaca, data format.
    """
    instruction, context = text_field(row, "instruction"), text_field(row, "input", default="")
    question = f"{instruction}{ALPACA_INPUT_MARK}{context}" if context else instruction
    return Conversation((Message("user", question), Message("assistant", text_field(row, "output"))))


def build_prompt_completion(row: Fields) -> Example:
    """Build a conversation of two turns from `prompt` and `completion`, used as they stand."""
    return Conversation(
        (Message("user", text_field(row, "prompt")), Message("assistant", text_field(row, "completion")))
    )


def build_text(row: Fields) -> Example:
    """Build a document from `text`."""
    return Document(text_field(row, "text"))


def build_tokenized(row: Fields) -> Example:
    """Build tokens from `input_ids`, optional `attention_mask`, and `labels`.

    Positions that the attention mask leaves out are padding and go, whatever their token is.
    """
    ids, labels = _integers(row, "input_ids"), _integers(row, "labels")
    mask = _integers(row, "attention_mask") if row.get("attention_mask") is not None else [1] * len(ids)
    if not len(ids) == len(labels) == len(mask):
        raise RowError(f"lengths differ: input_ids {len(ids)}, labels {len(labels)}, attention_mask {len(mask)}")
    strange = next((i for i in ids if not 0 <= i < _LARGEST_ID), None)
    if strange is not None:
        raise RowError(f"field 'input_ids' holds {_short(strange)}, which is no token id")
    kept = [(i, label) for i, label, keep in zip(ids, labels, mask, strict=True) if keep]
    wrong = next((p for p, (i, label) in enumerate(kept) if label not in (-100, i)), None)
    if wrong is not None:
        token, label = kept[wrong]
        raise RowError(f"label {label} at position {wrong} is neither -100 nor that position's token {token}")
    return Tokens(tuple(i for i, _ in kept), tuple(label for _, label in kept))


def _integers(row: Fields, name: str) -> list[int]:
    value = row.get(name)
    if value is None:
        raise RowError(f"missing field {name!r}; the row has: {_list(row)}")
    # A boolean is an int to Python, and no token id.
    if not isinstance(value, (list, tuple)) or not all(type(i) is int for i in value):
        raise RowError(f"field {name!r} is not a list of whole numbers: {_short(value)}")
    return list(value)


def _list(names: Collection[str]) -> str:
    shown = [" ".join(str(name).split())[:60] for name in list(names)[:20]]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return (", ".join(shown) or "nothing") + more


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def rename_columns(row: Fields, columns: Mapping[str, str], *, required: Collection[str]) -> Fields:
    """Return the row under the format's field names; `columns` maps field to column.

    Raises:
        RowError: the column of a required field is missing.
    """
    if not columns:
        return row
    renamed = dict(row)
    for name, column in columns.items():
        if column not in row and name not in required:
            continue
        if column not in row:
            raise RowError(f"missing column {column!r} (for {name!r}); the row has: {_list(row)}")
        renamed[name] = row[column]
    return renamed


def resolve_format(
    setting: str, columns: Mapping[str, str], *, present: Collection[str], where: str
) -> tuple[str, str]:
    """Return the name of the rows' format and the reason.

    Args:
        setting: `data.format`.
        columns: `data.columns`.
        present: columns of the first row.
        where: name of the source, for messages.

    Raises:
        DataError: no format, or not the chosen one, fits these columns.
    """
    names = {*present, *columns}
    if setting != "auto":
        missing = [field for field in FORMATS[setting].required if field not in names]
        if missing:
            raise DataError(
                f"format {setting} needs {', '.join(missing)}; the columns present are: {_list(present)}",
                where=where,
                fix=f"map them: data.columns: {{{missing[0]}: YOUR_COLUMN}}, or choose another data.format",
            )
        return setting, "set in data.format"
    for name, form in FORMATS.items():
        if all(field in names for field in form.required):
            return name, f"the columns {', '.join(form.required)} are present"
    needs = "; ".join(f"{name}: {', '.join(form.required)}" for name, form in FORMATS.items())
    raise DataError(
        f"no format fits these columns: {_list(present)}",
        where=where,
        fix=f"map yours with data.columns: {{field: column}} (fields: {needs}; a CSV file needs a header line)",
    )


def check_format_names(config: Config) -> list[Finding]:
    """Return findings for an unknown `data.format` or unknown fields in `data.columns`."""
    data = config.data
    if data.format != "auto" and data.format not in FORMATS:
        return [Finding("data.format", f"no such format: {data.format!r}", suggest(data.format, FORMATS))]
    forms = FORMATS.values() if data.format == "auto" else [FORMATS[data.format]]
    fields = list(dict.fromkeys(field for form in forms for field in form.required + form.optional))
    return [
        Finding("data.columns", f"no such field: {field!r}", suggest(field, fields))
        for field in data.columns
        if field not in fields
    ]


# In the order of detection: the most particular first.
FORMATS: dict[str, Format] = {
    "tokenized": Format(
        build_tokenized,
        ("input_ids", "labels"),
        ("attention_mask",),
        meaningless={"template": "auto", "train_on": "response", "long_text": "split"},
    ),
    "alpaca": Format(build_alpaca, ("instruction", "output"), ("input",), template="alpaca"),
    "prompt_completion": Format(
        build_prompt_completion, ("prompt", "completion"), template="none", own_template_first=False
    ),
    "text": Format(build_text, ("text",), meaningless={"template": "auto", "train_on": "all", "truncation": "right"}),
}
