"""The data of a run: sources to tokenized splits, through a cache keyed by content.

Owns the order of the steps and the data report (`data.json`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from transformers import PreTrainedTokenizerBase

from loralab.config.paths import local_path
from loralab.config.schema import DataConfig
from loralab.data.bad_rows import explain_bad_rows
from loralab.data.formats.table import FORMATS
from loralab.data.images.files import ImageFolder
from loralab.data.images.processor import PictureProcessor
from loralab.data.pools import Member, Pool, describe_formats, equip, prompted_format, resolve_pools
from loralab.data.prepared import check_prepared, open_prepared
from loralab.data.prompts.prompter import (
    Prompter,
    apply_stop_setting,
    choose_bos_prefix,
    no_sight,
    own_template,
    render_with,
)
from loralab.data.prompts.templates import Template, prepare_template, resolve_template
from loralab.data.reading.sources import Source
from loralab.data.split_report import check_dropped, describe_split, report_split
from loralab.data.splits import Indices, split_groups, split_units
from loralab.data.tokens.cache import cache_folder, load_or_tokenize
from loralab.data.tokens.identity import data_identity, identity_sha256
from loralab.data.tokens.pipeline import RowTokenizer
from loralab.data.tokens.store import TokenStore
from loralab.data.tokens.tokenize import TokenizeSettings
from loralab.progress import Reporter

__all__ = ["PreparedData", "prepare_data"]

# What an adapter's contract says of prompts; rows that are not prompted, such as text, do not mind.
_OF_PROMPTS = ("template", "template_kwargs", "system")


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Tokenized splits and what is known of them.

    Attributes:
        splits: "train", and "validation" and "test" where there are any.
        prompter: the tokenizer with its template, stop tokens and system prompt.
        template: the chosen template.
        report: the content of `data.json`.
        identity: what decides on the tokens and their order, and their hashes, by readable name.
        pools: the sources behind the splits.
        shares: positions of each source's rows in the training split and passes over them in one epoch,
            or None where there is one pass over all.
    """

    splits: dict[str, TokenStore]
    prompter: Prompter
    template: Template
    report: dict[str, Any]
    identity: dict[str, str]
    pools: list[Pool] = field(default_factory=list)
    shares: list[tuple[Indices, float]] | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the identity."""
        return identity_sha256(self.identity)


def prepare_data(
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reporter: Reporter,
    template: str | None = None,
    split: str | None = None,
    pictures: PictureProcessor | None = None,
) -> PreparedData:
    """Read, tokenize and split the data.

    Args:
        data: the data section.
        tokenizer: of the base model; it gets the chosen template and stop token.
        reporter: told of progress and choices.
        template: text of a template that must be used (an adapter's own), or None to choose.
        split: named split of `data.train` to read, where it has splits.
        pictures: what the model's processor makes of pictures, or None where it reads none.

    Raises:
        DataError: anything that is wrong with the data.
        MaskError: what would carry loss is not the answer.
    """
    pools = resolve_pools(data, split, fixed=_OF_PROMPTS if template is not None else ())
    if pictures is not None and tokenizer.chat_template is None:  # some models keep it with their processor alone
        tokenizer.chat_template = pictures.processor.chat_template
    if pictures is None and any(member.format == "vqa" for pool in pools for member in pool.members):
        raise no_sight()  # before a template is looked for, which such a model may not have
    prompter, chosen = _build_prompter(data, pools, tokenizer, template)
    prompter.pictures = pictures
    settings = TokenizeSettings(data.train_on, data.max_length, data.truncation, data.long_text, data.system)

    def build_worker(member: Member) -> RowTokenizer:
        folder = image_folder(data, member.source)
        return RowTokenizer(prompter, member.format, dict(member.columns), settings, data.on_bad_row, folder)

    equip(pools, build_worker)
    splits: dict[str, TokenStore] = {}
    reports: dict[str, Any] = {}
    for pool in pools:
        store, stored = load_or_tokenize(
            pool.sources, pool.workers, data=data, label=f"tokenize {pool.label}", reporter=reporter
        )
        for name, units in _parts(pool, data, store, stored).items():
            splits[name] = store.select(np.flatnonzero(np.isin(store.units, units)).astype(np.int64))
            reports[name] = report_split(splits[name], units, stored, sources=pool.sources)
            for line in explain_bad_rows(reports[name], sources=pool.sources, workers=pool.workers):
                reporter.say(f"{name}: {line}")
            check_dropped(name, reports[name], data)
            reporter.say(describe_split(name, reports[name]))
        if "train" in pool.parts and prompter.system_prompt is None:
            prompter.system_prompt = _common_system(stored)
    sources = [source for pool in pools for source in pool.sources]
    workers = [worker for pool in pools for worker in pool.workers]
    identity = data_identity(data, sources=sources, workers=workers, splits=splits)
    shares = _shares(splits["train"], pools[0])
    if shares is not None:
        identity["weights"] = ", ".join(str(member.weight) for member in pools[0].members)
    return PreparedData(
        splits=splits,
        prompter=prompter,
        template=chosen,
        report=_report(data, pools, prompter, chosen, reports),
        identity=identity,
        pools=pools,
        shares=shares,
    )


def image_folder(data: DataConfig, source: Source) -> ImageFolder:
    """Return where the pictures that a source's rows name lie.

    Args:
        data: the data section.
        source: of the rows; the paths in a local file start from its folder.
    """
    file = local_path(source.name.partition("#")[0])
    root = Path.cwd()
    if data.image.folder is not None:
        root = Path(data.image.folder).expanduser()
    elif file is not None and file.exists():
        root = file if file.is_dir() else file.parent
    return ImageFolder(root.resolve(), data.image.allow_outside, cache_folder(data).parent / "pictures")


def _build_prompter(
    data: DataConfig, pools: Sequence[Pool], tokenizer: PreTrainedTokenizerBase, required: str | None
) -> tuple[Prompter, Template]:
    if required is not None:
        check_prepared(pools, required)
    elif (prepared := open_prepared(data, pools, tokenizer)) is not None:
        return prepared, Template("prepared", str(tokenizer.chat_template), "the prepared folder's own")
    apply_stop_setting(tokenizer, data.stop_tokens)
    chosen = _choose_template(data, pools, tokenizer, required)
    tokenizer.chat_template = chosen.text
    return Prompter(tokenizer, data.stop_tokens, system_prompt=data.system), chosen


def _choose_template(
    data: DataConfig, pools: Sequence[Pool], tokenizer: PreTrainedTokenizerBase, required: str | None
) -> Template:
    if required is not None:
        return Template("adapter", required, "the adapter's own")
    form = FORMATS[prompted_format(pools) if data.template == "auto" else pools[0].members[0].format]
    chosen = resolve_template(
        data.template,
        own=own_template(tokenizer),
        fallback=form.template,
        own_first=form.own_template_first,
        bos_prefix=choose_bos_prefix(tokenizer),
    )
    return prepare_template(
        chosen, vocabulary=tokenizer.get_vocab(), kwargs=data.template_kwargs, render=render_with(tokenizer)
    )


def _common_system(stored: dict[str, Any]) -> str | None:
    """Return the system message that every training row has, or None."""
    systems = stored["systems"]
    return next(iter(systems)) if len(systems) == 1 and not stored["systems_without"] else None


def _shares(train: TokenStore, pool: Pool) -> list[tuple[Indices, float]] | None:
    if all(member.weight == 1.0 for member in pool.members):
        return None
    owner = train.origins[:, 0]
    return [
        (np.flatnonzero(owner == index).astype(np.int64), member.weight) for index, member in enumerate(pool.members)
    ]


def _report(
    data: DataConfig, pools: Sequence[Pool], prompter: Prompter, template: Template, splits: dict[str, Any]
) -> dict[str, Any]:
    return {
        "format": describe_formats(pools),
        "template": {"name": template.name, "text": template.text, "reason": template.reason},
        "system_prompt": prompter.system_prompt,
        "stop_tokens": {
            "ids": list(prompter.stop.ids),
            "texts": list(prompter.stop.texts),
            "reason": prompter.stop.reason,
        },
        "sources": [
            {
                "name": member.source.name,
                "sha256": member.source.fingerprint,
                "format": member.format,
                "weight": member.weight,
            }
            for pool in pools
            for member in pool.members
        ],
        "split": {"method": data.split_method, "seed": data.split_seed},
        "splits": splits,
    }


def _parts(pool: Pool, data: DataConfig, store: TokenStore, stored: dict[str, Any]) -> dict[str, Indices]:
    total = int(stored["units"])
    if "train" not in pool.parts:
        return {pool.parts[0]: np.arange(total, dtype=np.int64)}
    owners = _owners(store, stored)
    if store.has_images:
        return split_groups(_picture_owners(store, owners), data)
    rows = int(owners.max()) + 1 if total else 0
    if rows in (1, total):  # one document: its windows are all that can be divided
        return split_units(total, data)
    # All windows of a document go to one part, or it would stand in training and validation.
    return {name: np.flatnonzero(np.isin(owners, chosen)) for name, chosen in split_units(rows, data).items()}


def _picture_owners(store: TokenStore, owners: Indices) -> Indices:
    """Return for each unit the number of the group of rows that have pictures in common with it.

    Args:
        store: the kept units.
        owners: number of the source row of each unit, kept or not: units of one row stay together too.
    """
    examples, pictures = store.image_places()
    rows, first_picture = owners[store.units[examples]], int(owners.max()) + 1
    size = first_picture + int(pictures.max(initial=-1)) + 1
    links = coo_array((np.ones(len(rows), dtype=bool), (rows, pictures + first_picture)), shape=(size, size))
    groups = connected_components(links, directed=False)[1][owners]
    found: Indices = np.unique(groups, return_inverse=True)[1].astype(np.int64)
    return found


def _owners(store: TokenStore, stored: dict[str, Any]) -> Indices:
    """Return for each unit the number of its source row, counted over all sources."""
    pairs = np.zeros((int(stored["units"]), 2), dtype=np.int64)
    pairs[store.units] = store.origins
    for unit, source, row, _ in stored["dropped"]:
        pairs[unit] = source, row
    # One number a row: telling pairs apart takes sixty times as long.
    keys = pairs[:, 0] * (int(pairs[:, 1].max(initial=0)) + 1) + pairs[:, 1]
    numbers: Indices = np.unique(keys, return_inverse=True)[1].astype(np.int64)
    return numbers
