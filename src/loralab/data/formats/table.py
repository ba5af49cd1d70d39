"""Row formats: each is one function from a row to an `Example` and one line in `FORMATS`.

Owns the table, column mapping and format detection. Knows no tokenizer and no template text.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from loralab.config.findings import Finding
from loralab.config.schema import Config
from loralab.data.example import Example
from loralab.data.formats.chat import (
    build_conversational_prompt_completion,
    build_messages,
    build_sharegpt,
    first_message,
)
from loralab.data.formats.fields import Fields, RowError, list_names, show
from loralab.data.formats.pairs import (
    build_alpaca,
    build_prompt_completion,
    build_question_answer,
    build_yes_no,
    yes_no_word,
)
from loralab.data.formats.untemplated import build_segments, build_text, build_tokenized
from loralab.data.formats.vqa import PICTURE_ALIASES, PICTURE_FIELD, build_vqa
from loralab.errors import DataError
from loralab.lookup import nearest_name, suggest

Seen = tuple[bool, str]
_CHAT_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat", "turns")
_SYSTEM = {"system": ("system_prompt",)}
_TOOLS = {"tools": ("functions",)}
_IMAGES = {"images": ("image",)}
_LONGEST_NAME = 80  # characters; a longer column name is a row that was taken for a header


def _any_value(_: Fields) -> Seen:
    return True, ""


@dataclass(frozen=True, slots=True)
class Format:
    """A row format.

    Attributes:
        build: makes an `Example` of a row whose columns have the format's own names.
        required: fields that must be there.
        optional: fields that may be there.
        aliases: other columns that a field is taken from where there is none of its own name.
        recognise: whether the values of the first row, whose required fields are there, show this
            format, and what was seen.
        template: template that `data.template: auto` takes when the tokenizer has none;
            None where no template renders the rows.
        own_template_first: whether a tokenizer's own template goes before `template`; of tokens and
            segments made elsewhere, it is the likeliest one.
        meaningless: keys of the data section that rows of this format do not know, each with the
            values that do no harm besides the default.
    """

    build: Callable[[Fields], Example]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    recognise: Callable[[Fields], Seen] = _any_value
    template: str | None = None
    own_template_first: bool = True
    meaningless: Mapping[str, Collection[object]] = field(default_factory=lambda: {"long_text": ()})

    @property
    def fields(self) -> tuple[str, ...]:
        """Every name that `data.columns` may map."""
        names = (*self.required, *self.optional, *(other for others in self.aliases.values() for other in others))
        return tuple(dict.fromkeys(names))


def build_example(name: str, row: Fields, columns: Mapping[str, str]) -> Example:
    """Return what a row means.

    Args:
        name: of the format.
        row: value of each column.
        columns: column for each field that has another name in the data.

    Raises:
        RowError: the row does not fit the format.
    """
    form = FORMATS[name]
    return form.build(_named_fields(form, rename_columns(row, columns, required=form.required)))


def rename_columns(row: Fields, columns: Mapping[str, str], *, required: Collection[str]) -> Fields:
    """Return the row under the format's field names; `columns` maps field to column.

    A column that is mapped is no optional field of its own name too: its text would stand in the row twice.

    Raises:
        RowError: the column of a required field is missing.
    """
    if not columns:
        return row
    taken = set(columns.values()) - set(required)
    renamed = {name: value for name, value in row.items() if name not in taken and name not in columns}
    for name, column in columns.items():
        if column in row:
            renamed[name] = row[column]
        elif name in required:
            raise RowError(f"missing column {column!r} (for {name!r}); the row has: {list_names(row)}")
    return renamed


def _named_fields(form: Format, row: Fields) -> Fields:
    """Return the row with fields that have only an alias under their own names too."""
    under_alias = {}
    for name, others in form.aliases.items():
        if name not in row and not row.keys().isdisjoint(others):
            under_alias[name] = row[next(column for column in others if column in row)]
    return {**row, **under_alias} if under_alias else row


def _column(form: Format, name: str, row: Collection[str]) -> str | None:
    return next((column for column in (name, *form.aliases.get(name, ())) if column in row), None)


def resolve_format(setting: str, columns: Mapping[str, str], *, first: Fields, where: str) -> tuple[str, str]:
    """Return the name of the rows' format and the reason.

    Args:
        setting: `data.format`.
        columns: `data.columns`.
        first: the first row: value of each column.
        where: name of the source, for messages.

    Raises:
        DataError: no format, or not the chosen one, fits this row.
    """
    _refuse_missing_columns(columns, first, where)
    if setting == "auto":
        return _detect(columns, first, where)
    form = FORMATS[setting]
    row = rename_columns(first, columns, required=form.required)
    missing = [name for name in form.required if _column(form, name, row) is None]
    if missing:
        raise DataError(
            f"format {setting} needs {', '.join(missing)}; the columns present are: {list_names(first)}",
            where=where,
            fix=f"map them: data.columns: {{{missing[0]}: YOUR_COLUMN}}, or choose another data.format",
        )
    return setting, "set in data.format"


def _detect(columns: Mapping[str, str], first: Fields, where: str) -> tuple[str, str]:
    doubts = []
    for name, form in FORMATS.items():
        row = rename_columns(first, columns, required=form.required)
        found = [_column(form, needed, row) for needed in form.required]
        if None in found or not set(columns) <= set(form.fields):
            continue
        fits, seen = form.recognise(_named_fields(form, row))
        present = _describe_columns(form, [column for column in found if column is not None])
        if fits:
            return name, f"{present}, and {seen}" if seen else present
        doubts.append(f"not {name}: {present}, but {seen}")
    raise _no_format(first, doubts, where)


def _describe_columns(form: Format, found: list[str]) -> str:
    named = [c if c == name else f"{c} (for {name})" for name, c in zip(form.required, found, strict=True)]
    return f"the columns {', '.join(named)} are present" if len(named) > 1 else f"the column {named[0]} is present"


def _refuse_missing_columns(columns: Mapping[str, str], first: Fields, where: str) -> None:
    # Also of an optional field: a name that is mistyped would leave its text out of every row.
    for name, column in columns.items():
        if column not in first:
            near = nearest_name(column, first)
            hint = f"did you mean {near!r}? " if near else ""
            raise DataError(
                f"data.columns maps {name} to {column!r}, which the first row does not have; "
                f"its columns are: {list_names(first)}",
                where=where,
                fix=f"{hint}name a column that the rows have (null in the first row will do)",
            )


def _no_format(first: Fields, doubts: list[str], where: str) -> DataError:
    needs = "; ".join(f"{name}: {', '.join(form.required)}" for name, form in FORMATS.items())
    reasons = f" ({'; '.join(doubts)})" if doubts else ""
    fix = f"map yours with data.columns: {{field: column}} (fields: {needs}; a CSV file needs a header line)"
    value = next((name for name in first if len(name) > _LONGEST_NAME or "\n" in name), None)
    if value is not None:
        fix = (
            f"write a header line, such as prompt,completion, above {show(value)}, which is no column's name, or map "
            'columns by number: data.columns: {prompt: "1", completion: "2"}'
        )
    return DataError(f"no format fits these columns: {list_names(first)}{reasons}", where=where, fix=fix)


def check_format_names(config: Config) -> list[Finding]:
    """Return findings for unknown formats, or unknown fields in column mappings, of the data section or a source."""
    data = config.data
    findings = [Finding(f"data.{key}", what, fix) for key, what, fix in _strange_names(data.format, data.columns)]
    for key, value in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        for source in value if isinstance(value, list) else ():
            if isinstance(source, str) or (source.format is None and source.columns is None):
                continue
            columns = data.columns if source.columns is None else source.columns
            strange = _strange_names(source.format or data.format, columns)
            findings += [Finding(f"data.{key}", f"source {source.path!r}: {what}", fix) for _, what, fix in strange]
    return findings


def _strange_names(name: str, columns: Collection[str]) -> list[tuple[str, str, str]]:
    """Return key, mistake and fix of an unknown format or of unknown fields."""
    if name != "auto" and name not in FORMATS:
        return [("format", f"no such format: {name!r}", suggest(name, FORMATS))]
    forms = FORMATS.values() if name == "auto" else [FORMATS[name]]
    fields = list(dict.fromkeys(known for form in forms for known in form.fields))
    return [
        ("columns", f"no such field: {mapped!r}", suggest(mapped, fields)) for mapped in columns if mapped not in fields
    ]


def _recognise_messages(row: Fields) -> Seen:
    message, seen = first_message(row["messages"])
    return message is not None and "role" in message, seen


def _recognise_sharegpt(row: Fields) -> Seen:
    message, seen = first_message(row["conversations"])
    return message is not None and "from" in message, seen


def _recognise_sides(row: Fields) -> Seen:
    sides = {name: row[name] for name in ("prompt", "completion")}
    listed = [name for name, value in sides.items() if isinstance(value, (list, tuple, Mapping))]
    return bool(listed), f"messages stand in {' and '.join(listed) or 'neither'}"


def _recognise_yes_no(row: Fields) -> Seen:
    return yes_no_word(row["answer"]) is not None, f"the first answer is {show(row['answer'])}"


# Their template renders none of these rows; it says how the adapter is prompted.
_NO_TURNS: dict[str, Collection[object]] = {
    "system": (None,),
    "train_on": ("response",),
    "truncation": ("right", "drop", "error"),
    "long_text": ("split",),
}
# In the order of detection: the most particular first.
FORMATS: dict[str, Format] = {
    "tokenized": Format(build_tokenized, ("input_ids", "labels"), ("attention_mask",), meaningless=_NO_TURNS),
    "segments": Format(build_segments, ("segments",), meaningless=_NO_TURNS),
    "messages": Format(
        build_messages,
        ("messages",),
        ("system", "tools", "images"),
        aliases={"messages": _CHAT_COLUMNS, **_SYSTEM, **_TOOLS, **_IMAGES},
        recognise=_recognise_messages,
        template="alpaca",
    ),
    "sharegpt": Format(
        build_sharegpt,
        ("conversations",),
        ("system", "tools", "images"),
        aliases={"conversations": _CHAT_COLUMNS, **_SYSTEM, **_TOOLS, **_IMAGES},
        recognise=_recognise_sharegpt,
        template="alpaca",
    ),
    "alpaca": Format(
        build_alpaca,
        ("instruction", "output"),
        ("input", "history", "system"),
        aliases={"output": ("response",), "input": ("context",), **_SYSTEM},
        template="alpaca",
    ),
    "conversational_prompt_completion": Format(
        build_conversational_prompt_completion,
        ("prompt", "completion"),
        ("system", "tools", "images"),
        aliases={**_SYSTEM, **_TOOLS, **_IMAGES},
        recognise=_recognise_sides,
        template="alpaca",
    ),
    "prompt_completion": Format(
        build_prompt_completion,
        ("prompt", "completion"),
        ("system",),
        aliases=_SYSTEM,
        template="none",
        own_template_first=False,
    ),
    "vqa": Format(
        build_vqa,
        (PICTURE_FIELD, "question", "answer"),
        ("context", "system"),
        aliases={
            PICTURE_FIELD: PICTURE_ALIASES,
            "answer": ("multiple_choice_answer", "answers", "response"),
            "context": ("passage",),
            **_SYSTEM,
        },
        template="chatml",
    ),
    "yes_no": Format(
        build_yes_no,
        ("question", "answer"),
        ("passage", "system"),
        aliases={"passage": ("context",), **_SYSTEM},
        recognise=_recognise_yes_no,
        template="alpaca",
    ),
    "question_answer": Format(
        build_question_answer,
        ("question", "answer"),
        ("context", "system"),
        aliases={"answer": ("response",), "context": ("passage",), **_SYSTEM},
        template="alpaca",
    ),
    "text": Format(
        build_text,
        ("text",),
        own_template_first=False,
        meaningless={
            "template": ("auto",),
            "template_kwargs": ({},),
            "system": (None,),
            "train_on": ("response", "all"),
            "truncation": ("right",),
        },
    ),
}
