"""The data of a run: sources to tokenized splits, through a cache keyed by content.

Owns the order of the steps, the cache key and the data report (`data.json`).
"""

import errno
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from loralab.config.paths import local_path
from loralab.config.schema import DataConfig
from loralab.data.formats import FORMATS, resolve_format
from loralab.data.identity import cache_key, data_identity, identity_sha256
from loralab.data.pipeline import RowTokenizer, tokenize_rows
from loralab.data.prompter import Prompter, apply_stop_setting, choose_bos_prefix
from loralab.data.sources import Row, Source, resolve_sources
from loralab.data.splits import Indices, split_units
from loralab.data.store import TokenStore, read_store_report, write_store
from loralab.data.templates import Template, resolve_template
from loralab.data.tokenize import TokenizeSettings, Unit
from loralab.errors import DataError, StorageError
from loralab.progress import Reporter

logger = logging.getLogger(__name__)

# How many dropped rows are listed by number; their count is always whole.
LISTED_ROWS = 1000
_PERCENTILES = (0, 50, 90, 99, 100)


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Tokenized splits and what is known of them.

    Attributes:
        splits: "train", and "validation" and "test" where there are any.
        prompter: the tokenizer with its template and stop tokens.
        template: the chosen template.
        report: the content of `data.json`.
        identity: what decides on the tokens and their order, and their hashes, by readable name.
    """

    splits: dict[str, TokenStore]
    prompter: Prompter
    template: Template
    report: dict[str, Any]
    identity: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the identity."""
        return identity_sha256(self.identity)


@dataclass(slots=True)
class _Pool:
    """Sources that are tokenized together and the splits that come of them."""

    sources: list[Source]
    format: str = ""
    format_reason: str = ""
    parts: tuple[str, ...] = field(default_factory=tuple)


def prepare_data(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reporter: Reporter,
    template: str | None = None,
    split: str | None = None,
) -> PreparedData:
    """Read, tokenize and split the data.

    Args:
        data: the data section.
        tokenizer: of the base model; it gets the chosen template and stop token.
        reporter: told of progress and choices.
        template: text of a template that must be used (an adapter's own), or None to choose.
        split: named split of `data.train` to read, where it has splits.

    Raises:
        DataError: anything that is wrong with the data.
    """
    pools = _resolve_pools(data, split)
    for pool in pools:
        pool.format, pool.format_reason = _detect(pool, data)
        _check_format_settings(data, pool.format)
    apply_stop_setting(tokenizer, data.stop_tokens)
    chosen = _choose_template(data, pools[0].format, tokenizer, template)
    tokenizer.chat_template = chosen.text
    prompter = Prompter(tokenizer, data.stop_tokens)
    settings = TokenizeSettings(data.train_on, data.max_length, data.truncation, data.long_text)
    splits: dict[str, TokenStore] = {}
    reports: dict[str, Any] = {}
    workers = []
    for pool in pools:
        worker = RowTokenizer(prompter, pool.format, dict(data.columns), settings, data.on_bad_row)
        store, stored = _load_or_tokenize(pool, worker, data, reporter)
        for name, units in _parts(pool, data, store, stored).items():
            splits[name] = _part(store, units)
            reports[name] = _report_part(splits[name], units, stored, pool)
            _check_dropped(name, reports[name], data)
            reporter.say(_describe_part(name, reports[name]))
        workers.append(worker)
    sources = [source for pool in pools for source in pool.sources]
    return PreparedData(
        splits=splits,
        prompter=prompter,
        template=chosen,
        report={
            "format": {"value": pools[0].format, "reason": pools[0].format_reason},
            "template": {"name": chosen.name, "text": chosen.text, "reason": chosen.reason},
            "stop_tokens": {
                "ids": list(prompter.stop.ids),
                "texts": list(prompter.stop.texts),
                "reason": prompter.stop.reason,
            },
            "sources": [{"name": source.name, "sha256": source.fingerprint} for source in sources],
            "split": {"method": data.split_method, "seed": data.split_seed},
            "splits": reports,
        },
        identity=data_identity(data, sources=sources, workers=workers, splits=splits),
    )


def _resolve_pools(data: DataConfig, split: str | None) -> list[_Pool]:
    pools = [_Pool(resolve_sources(data.train, where="key data.train", split=split), parts=("train",))]
    for name, spec in (("validation", data.validation), ("test", data.test)):
        if not isinstance(spec, (str, list)):
            continue
        where = f"key data.{name}"
        if isinstance(spec, str) and _is_split_name(spec):
            sources = resolve_sources(data.train, where=where, split=spec)
        else:
            sources = resolve_sources(spec, where=where)
        pools.append(_Pool(sources, parts=(name,)))
    _refuse_shared(pools)
    return pools


def _refuse_shared(pools: Sequence[_Pool]) -> None:
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


def _is_split_name(spec: str) -> bool:
    path = local_path(spec)
    return path is not None and not path.exists() and not any(mark in spec for mark in "/\\.*?[#~")


def _detect(pool: _Pool, data: DataConfig) -> tuple[str, str]:
    found: tuple[str, str] | None = None
    for source in pool.sources:
        first = next(iter(source.rows()))
        name, reason = resolve_format(data.format, data.columns, present=list(first.fields), where=source.name)
        if found is not None and name != found[0]:
            raise DataError(
                f"sources of different formats: {pool.sources[0].name} is {found[0]}, {source.name} is {name}",
                where="key data.train",
                fix="set data.format, or train on sources of one format",
            )
        found = found or (name, reason)
    if found is None:
        raise DataError("no source given", where="key data.train", fix="name at least one file")
    return found


def _check_format_settings(data: DataConfig, name: str) -> None:
    for key, harmless in FORMATS[name].meaningless.items():
        value = getattr(data, key)
        if data.chosen(key) and value != harmless:
            raise DataError(
                f"data.{key} has no meaning for format {name}, got {value!r}",
                where="section data",
                fix="remove it, or set data.format",
            )


def _choose_template(data: DataConfig, name: str, tokenizer: PreTrainedTokenizerBase, required: str | None) -> Template:
    if required is not None:
        return Template("adapter", required, "the adapter's own")
    form, own = FORMATS[name], tokenizer.chat_template
    return resolve_template(
        data.template,
        own=own if isinstance(own, str) else None,
        fallback=form.template,
        own_first=form.own_template_first,
        bos_prefix=choose_bos_prefix(tokenizer),
    )


def _load_or_tokenize(
    pool: _Pool, worker: RowTokenizer, data: DataConfig, reporter: Reporter
) -> tuple[TokenStore, dict[str, Any]]:
    folder = cache_folder(data) / cache_key(pool.sources, worker)
    label = f"tokenize {' + '.join(pool.parts)}"
    try:
        stored = read_store_report(folder)
        if stored is not None:
            reporter.say(f"{label}: cache hit ({folder.name[:12]}: same rows, tokenizer, template and settings)")
            return TokenStore(folder), stored
        report: dict[str, Any] = {"units": 0, "rows": 0, "dropped": []}
        write_store(folder, _units(pool, worker, data, report, reporter, label), report=report)
        reporter.finish(label)
        return TokenStore(folder), report
    except OSError as error:
        raise _cache_error(error, folder) from error


def _cache_error(error: OSError, folder: Path) -> StorageError:
    reason = error.strerror or str(error)
    if isinstance(error, PermissionError) and folder.exists():
        what, where = "cannot read tokenized data that another user wrote", str(folder)
        fix = "have its owner run `chmod -R a+rX` on it, or set data.cache_dir to a folder of your own"
    else:
        what, where = "cannot write tokenized data", str(folder.parent)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free space there, or set data.cache_dir" if full else "set data.cache_dir to a folder that you may write"
    return StorageError(f"{what}: {reason}", where=where, fix=fix)


def _units(
    pool: _Pool, worker: RowTokenizer, data: DataConfig, report: dict[str, Any], reporter: Reporter, label: str
) -> Iterator[tuple[int, int, Unit]]:
    for index, source in enumerate(pool.sources):
        rows: Iterator[Row] = source.rows()
        for row, units in tokenize_rows(rows, worker, workers=data.num_workers):
            for unit in units:
                if unit.dropped is not None:
                    report["dropped"].append([report["units"], index, row, unit.dropped])
                report["units"] += 1
                yield index, row, unit
            report["rows"] += 1
            if report["rows"] % 256 == 0:
                reporter.progress(label, report["rows"], None)


def cache_folder(data: DataConfig) -> Path:
    """Return the folder of tokenized data: `data.cache_dir`, else the user's cache folder.

    Raises:
        StorageError: the user has no home folder.
    """
    if data.cache_dir is not None:
        return Path(data.cache_dir).expanduser()
    base = local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if base is None:
        raise StorageError(
            "no home folder to keep tokenized data in",
            where="environment variables HOME, XDG_CACHE_HOME",
            fix="set HOME, or data.cache_dir",
        )
    return base / "loralab" / "tokenized"


def _parts(pool: _Pool, data: DataConfig, store: TokenStore, stored: dict[str, Any]) -> dict[str, Indices]:
    total = int(stored["units"])
    if pool.parts != ("train",):
        return {pool.parts[0]: np.arange(total, dtype=np.int64)}
    owners = _owners(store, stored)
    rows = int(owners.max()) + 1 if total else 0
    if rows in (1, total):  # one document: its windows are all that can be divided
        return split_units(total, data)
    # All windows of a document go to one part, or it would stand in training and validation.
    return {name: np.flatnonzero(np.isin(owners, chosen)) for name, chosen in split_units(rows, data).items()}


def _owners(store: TokenStore, stored: dict[str, Any]) -> Indices:
    """Return for each unit the number of its source row, counted over all sources."""
    pairs = np.zeros((int(stored["units"]), 2), dtype=np.int64)
    pairs[store.units] = store.origins
    for unit, source, row, _ in stored["dropped"]:
        pairs[unit] = source, row
    return np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _part(store: TokenStore, units: Indices) -> TokenStore:
    return store.select(np.flatnonzero(np.isin(store.units, units)).astype(np.int64))


def _report_part(store: TokenStore, units: Indices, stored: dict[str, Any], pool: _Pool) -> dict[str, Any]:
    inside = set(units.tolist())
    dropped = [entry for entry in stored["dropped"] if entry[0] in inside]
    lengths = store.lengths() if len(store) else np.zeros(1, dtype=np.int64)
    return {
        "source_rows": stored["rows"],
        "rows_read": len(units),
        "rows_kept": len(store),
        "dropped": dict(Counter(reason for _, _, _, reason in dropped)),
        "dropped_rows": [
            {"source": pool.sources[index].name, "row": row, "reason": reason}
            for _, index, row, reason in dropped[:LISTED_ROWS]
        ],
        "truncated": store.truncated,
        "empty_answers": store.empty_answers,
        "supervised_tokens": int(store.supervised().sum()) if len(store) else 0,
        "total_tokens": int(lengths.sum()) if len(store) else 0,
        "length_percentiles": {f"p{p}": int(np.percentile(lengths, p)) for p in _PERCENTILES},
    }


def _check_dropped(name: str, report: dict[str, Any], data: DataConfig) -> None:
    read, kept = report["rows_read"], report["rows_kept"]
    share = (read - kept) / read if read else 1.0
    if kept and share <= data.max_dropped_fraction:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items()) or "no rows"
    first: Sequence[Any] = [entry["row"] for entry in report["dropped_rows"][:5]]
    listed = f"; first rows: {', '.join(map(str, first))}" if first else ""
    limit = "" if not kept else f" (at most {data.max_dropped_fraction:.0%} may be, data.max_dropped_fraction)"
    too_long = any("too_long" in reason for reason in report["dropped"])
    fix = f"raise data.max_length (now {data.max_length})" if too_long else "mend these rows"
    raise DataError(
        f"{read - kept} of {read} {name} rows dropped{limit}: {reasons}",
        where=f"split {name}{listed}",
        fix=f"{fix}{', or raise data.max_dropped_fraction' if kept else ''}",
    )


def _describe_part(name: str, report: dict[str, Any]) -> str:
    text = f"{name}: {report['rows_kept']:,} rows, {report['supervised_tokens']:,} supervised tokens"
    if report["dropped"]:
        text += ", dropped " + ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items())
    if report["truncated"]:
        text += f", cut at max_length {report['truncated']} (these do not learn to stop)"
    return text
