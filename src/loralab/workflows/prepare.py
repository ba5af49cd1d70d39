"""The `prepare` command: the tokens of every split as a folder of the `datasets` library.

Owns how branches become rows of `input_ids`, `attention_mask` and `labels`, and what lies beside
them: the data report, and the prompt contract under which training takes the folder up again.
"""

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from loralab.config.load import LoadedConfig
from loralab.config.schema import DataConfig, DataSource
from loralab.data.dataset import PreparedData, prepare_data
from loralab.data.example import Branch
from loralab.data.prompts.contract import CONTRACT_FILE, build_contract
from loralab.data.tokens.store import TokenStore
from loralab.data.tokens.tokenize import IGNORED
from loralab.errors import ConfigError, RunFolderError, StorageError
from loralab.models.load import load_tokenizer
from loralab.models.trainable_tokens import settle_tokens
from loralab.progress import Reporter
from loralab.run import replace_folder
from loralab.workflows.pictures import open_tokenizers_pictures
from loralab.workflows.pinning import name_commits

DATA_FILE = "data.json"
_FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "attention_mask": datasets.List(datasets.Value("int8")),
        "labels": datasets.List(datasets.Value("int32")),
    }
)


def prepare(loaded: LoadedConfig, output: Path | None, *, overwrite: bool, reporter: Reporter) -> dict[str, Any]:
    """Tokenize the data of a configuration and write it as a folder that `data.train` can name.

    Args:
        loaded: the configuration.
        output: the folder; None makes `prepared/<name of the configuration>`.
        overwrite: replace a folder that an earlier call wrote.
        reporter: told of progress.

    Returns:
        `path`, and for each split `rows`, `tokens` and `supervised_tokens` as written.

    Raises:
        ConfigError: a source has a weight, which no row of tokens can carry.
        RunFolderError: something is in the way.
        UserError: the data cannot be used.
    """
    named = output or Path("prepared") / loaded.name
    folder = named.resolve()  # what a link leads to, not the link, is replaced
    _check_folder(folder, overwrite=overwrite)
    _refuse_weights(loaded.config.data)
    config = name_commits(loaded, reporter).config
    tokenizer = load_tokenizer(config.model)
    settle_tokens(config.lora, tokenizer)  # new tokens stand in the rows
    pictures = open_tokenizers_pictures(config)
    data = prepare_data(config.data, tokenizer, reporter=reporter, pictures=pictures)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            facts = _write(staging, data, reporter)
            staging.chmod(0o755)
            replace_folder(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"cannot write prepared data: {error.strerror or error}",
            where=str(folder),
            fix="free space there, or name another folder with --output",
        ) from error
    return {"path": str(named), "splits": facts}


def _check_folder(folder: Path, *, overwrite: bool) -> None:
    if Path.cwd().is_relative_to(folder):
        raise RunFolderError(
            f"{str(folder)!r} is the folder of this process, and would be replaced under it",
            where="option --output",
            fix="name a folder in it, or call loralab from outside",
        )
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    ours = folder.is_dir() and all((folder / name).is_file() for name in (CONTRACT_FILE, DATA_FILE))
    if ours and overwrite:
        return
    raise RunFolderError(
        f"{str(folder)!r} is not empty",
        where="option --output",
        fix="replace it with --overwrite" if ours else "name another folder: this one holds other files",
    )


def _refuse_weights(data: DataConfig) -> None:
    sections = [source for source in data.train if isinstance(source, DataSource)]
    weighted = next((source for source in sections if source.chosen("weight")), None)
    if weighted is not None:
        raise ConfigError(
            f"weight {weighted.weight} of {weighted.path!r}: a folder of tokens holds each row once",
            where="key data.train",
            fix="prepare each source on its own, and give the folders the weights: {path: FOLDER, weight: ...}",
        )


def _write(staging: Path, data: PreparedData, reporter: Reporter) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    cache = staging / ".cache"
    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # the reporter's lines stand instead
    try:
        parts = datasets.DatasetDict()
        for name, store in data.splits.items():
            parts[name] = datasets.Dataset.from_generator(
                _rows, features=_FEATURES, cache_dir=str(cache), gen_kwargs={"store": store}, split=name
            )
            facts[name] = _describe(name, store, parts[name].num_rows, reporter)
        parts.save_to_disk(str(staging))
        del parts  # it maps files in the cache, which some systems then refuse to remove
    finally:
        if not quiet:
            datasets.enable_progress_bars()
        shutil.rmtree(cache, ignore_errors=True)
    contract = json.dumps(build_contract(data.prompter), indent=2, ensure_ascii=False)
    (staging / CONTRACT_FILE).write_text(contract + "\n", encoding="utf-8")
    report = json.dumps(data.report, indent=2, ensure_ascii=False)
    (staging / DATA_FILE).write_text(report + "\n", encoding="utf-8")
    return facts


def _describe(name: str, store: TokenStore, rows: int, reporter: Reporter) -> dict[str, int]:
    text = f"{name}: {rows:,} rows"
    if rows > len(store):
        text += f" of {len(store):,} conversations, whose earlier turns the template rewrites"
    reporter.say(text)
    return {"rows": rows, "tokens": int(store.lengths().sum()), "supervised_tokens": int(store.supervised().sum())}


def _rows(store: TokenStore) -> Iterator[dict[str, list[int]]]:
    for example in store:
        for chain in _chains(example.branches):
            yield _row(chain)


def _chains(branches: tuple[Branch, ...]) -> Iterator[list[Branch]]:
    """Yield branches in runs of which each continues the one before: these fit into one row."""
    chain = [branches[0]]
    for before, branch in itertools.pairwise(branches):
        path = [*before.prompt_ids.tolist(), *before.answer_ids.tolist()]
        if branch.prompt_ids[: len(path)].tolist() == path:
            chain.append(branch)
        else:
            yield chain
            chain = [branch]
    yield chain


def _row(chain: list[Branch]) -> dict[str, list[int]]:
    last = chain[-1]
    ids = [*last.prompt_ids.tolist(), *last.answer_ids.tolist()]
    labels = [IGNORED] * len(ids)
    for branch in chain:
        start = len(branch.prompt_ids)
        labels[start : start + len(branch.answer_ids)] = branch.answer_ids.tolist()
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
