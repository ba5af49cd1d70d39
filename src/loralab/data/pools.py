"""Which sources make which split, and what kind of rows each holds.

Owns how the names in the data section become sources with format, columns and weight. Does not
own what a name leads to (`sources.py`) nor how rows are divided (`splits.py`).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from loralab.config.paths import local_path
from loralab.config.schema import DataConfig, DataSource
from loralab.data.formats.table import FORMATS, resolve_format
from loralab.data.reading.sources import Source, resolve_sources
from loralab.data.tokens.pipeline import RowTokenizer
from loralab.errors import DataError


@dataclass(frozen=True, slots=True)
class Member:
    """One source of a pool.

    Attributes:
        source: where its rows come from.
        format: name of the rows' format.
        format_reason: why that one.
        columns: column of the source for each field of the format.
        weight: passes over its rows in one epoch of training.
    """

    source: Source
    format: str
    format_reason: str
    columns: Mapping[str, str]
    weight: float = 1.0


@dataclass(slots=True)
class Pool:
    """Sources that are tokenized together, and the splits that come of them.

    Attributes:
        members: the sources, in order.
        parts: names of the splits.
        workers: what tokenizes each member's rows; set once the template is chosen.
    """

    members: list[Member]
    parts: tuple[str, ...]
    workers: list[RowTokenizer] = field(default_factory=list)

    @property
    def sources(self) -> list[Source]:
        """The sources of all members."""
        return [member.source for member in self.members]

    @property
    def label(self) -> str:
        """The splits, as text."""
        return " + ".join(self.parts)


def resolve_pools(data: DataConfig, split: str | None, *, fixed: Collection[str] = ()) -> list[Pool]:
    """Find the sources of every split and the format of each.

    A split that is an amount of rows of `data.train` is a part of that pool.

    Args:
        data: the data section.
        split: named split of `data.train` to read, where it has splits.
        fixed: keys of the section that somebody else than the rows' owner has set, and that rows may not know.

    Raises:
        DataError: a name leads nowhere, a source is in two splits, or no format fits.
    """
    amounts = tuple(name for name in ("validation", "test") if isinstance(getattr(data, name), (int, float)))
    pools = [Pool(_members(data.train, data, "data.train", split), parts=("train", *amounts))]
    for name, spec in (("validation", data.validation), ("test", data.test)):
        key = f"data.{name}"
        if isinstance(spec, str) and is_split_name(spec):
            pools.append(Pool(_members(data.train, data, key, spec), parts=(name,)))
        elif isinstance(spec, (str, list)):
            pools.append(Pool(_members(spec, data, key, None), parts=(name,)))
    _refuse_shared(pools)
    for pool in pools:
        for member in pool.members:
            _check_settings(data, member.format, fixed)
    return pools


def is_split_name(spec: str) -> bool:
    """Return whether a setting of validation or test data names a split of the training data."""
    path = local_path(spec)
    return path is not None and not path.exists() and not any(mark in spec for mark in "/\\.*?[#~")


def _members(names: str | list[str | DataSource], data: DataConfig, key: str, split: str | None) -> list[Member]:
    where = f"key {key}"
    entries = [names] if isinstance(names, str) else names
    plain = [name for name in entries if isinstance(name, str)]
    if len(plain) == len(entries):  # all names at once: every mistake in one message
        return [_member(source, DataSource(path=source.name), data) for source in _resolve(names, where, split)]
    members = [
        _member(source, DataSource(path=entry) if isinstance(entry, str) else entry, data)
        for entry in entries
        for source in _resolve(entry if isinstance(entry, str) else entry.path, where, split)
    ]
    _refuse_twice(members, where)
    return members


def _resolve(names: str | list[str | DataSource], where: str, split: str | None) -> list[Source]:
    spec = names if isinstance(names, str) else [name for name in names if isinstance(name, str)]
    return resolve_sources(spec, where=where, split=split)


def _refuse_twice(members: Sequence[Member], where: str) -> None:
    seen: dict[str, str] = {}
    for member in members:
        if member.source.fingerprint in seen:
            raise DataError(
                f"{seen[member.source.fingerprint]!r} is given more than once",
                where=where,
                fix="name each source once; to see its rows more often, give it a weight of 2",
            )
        seen[member.source.fingerprint] = member.source.name


def _member(source: Source, section: DataSource, data: DataConfig) -> Member:
    columns = dict(section.columns if section.columns is not None else data.columns)
    source = source.by_number(list(columns.values()))
    first = next(iter(source.rows()))
    name, reason = resolve_format(section.format or data.format, columns, first=first.fields, where=source.name)
    return Member(source, name, reason, columns, section.weight)


def _refuse_shared(pools: Sequence[Pool]) -> None:
    """Refuse a source that is in two splits, under whatever names."""
    seen: dict[str, tuple[str, str]] = {}
    for pool in pools:
        here = {source.fingerprint: (source.name, pool.parts[0]) for source in pool.sources}
        for fingerprint in here.keys() & seen.keys():
            (name, part), (other, first) = here[fingerprint], seen[fingerprint]
            same = f"{name!r} holds the rows of {other!r}" if name != other else f"{name!r} is named twice"
            raise DataError(
                f"{same}: what is measured on {part} rows that are also {first} rows says nothing",
                where=f"keys data.{first}, data.{part}",
                fix="name other rows, or a share of data.train, such as 0.1",
            )
        seen |= here


def _check_settings(data: DataConfig, name: str, fixed: Collection[str]) -> None:
    for key, harmless in FORMATS[name].meaningless.items():
        value = getattr(data, key)
        if key not in fixed and data.chosen(key) and value not in harmless:
            raise DataError(
                f"data.{key} has no meaning for format {name}, got {value!r}",
                where="section data",
                fix="remove it, or set data.format",
            )


def prompted_format(pools: Sequence[Pool]) -> str:
    """Return the format that decides which template `auto` takes: the first one whose rows are prompted.

    Raises:
        DataError: two formats would take different templates.
    """
    names = list(dict.fromkeys(member.format for pool in pools for member in pool.members))
    prompted = [name for name in names if FORMATS[name].template is not None]
    if not prompted:
        return next((name for name in names if FORMATS[name].own_template_first), names[0])
    first, wanted = prompted[0], _wanted_template(prompted[0])
    other = next((name for name in prompted if _wanted_template(name) != wanted), None)
    if other is not None:
        raise DataError(
            f"rows of the formats {first} and {other} would be prompted with different templates",
            where="key data.template",
            fix="set data.template, for example to tokenizer or chatml",
        )
    return first


def _wanted_template(name: str) -> tuple[str | None, bool]:
    form = FORMATS[name]
    return form.template, form.own_template_first


def describe_formats(pools: Sequence[Pool]) -> dict[str, str]:
    """Return the formats of all sources and the reason for each, for the data report."""
    reasons = {member.format: member.format_reason for pool in pools for member in pool.members}
    if len(reasons) == 1:
        return {"value": next(iter(reasons)), "reason": next(iter(reasons.values()))}
    return {
        "value": ", ".join(reasons),
        "reason": "; ".join(f"{name}: {reason}" for name, reason in reasons.items()),
    }


BuildWorker = Callable[[Member], RowTokenizer]


def equip(pools: Sequence[Pool], build: BuildWorker) -> None:
    """Give every member of every pool what tokenizes its rows."""
    for pool in pools:
        pool.workers = [build(member) for member in pool.members]
