"""Rows that an adapter was trained on: whether a run's data is what it was, and how many of other rows it has seen.

Owns both questions of `eval`; they are answered from the run's own data, tokenized as in the run.
"""

from pathlib import Path

import numpy as np

from loralab.data.dataset import PreparedData, prepare_data
from loralab.data.proofs.survey import hash_split
from loralab.data.tokens.store import TokenStore
from loralab.errors import DataError, LoralabError
from loralab.progress import ProgressOnly, Reporter
from loralab.run import read_json
from loralab.workflows.session import Session, Target, load_adapter_tokenizer


def check_same_data(target: Target, prepared: PreparedData) -> None:
    """Check that the run's own data is still what the run saw; its splits would be others.

    Args:
        target: the adapter, of a run or alone.
        prepared: the run's data as it is now.

    Raises:
        DataError: it is not.
    """
    if target.folder is None or not target.folder.data.is_file():
        return
    before = {source["name"]: source["sha256"] for source in read_json(target.folder.data).get("sources", [])}
    now = {source["name"]: source["sha256"] for source in prepared.report["sources"]}
    changed = [
        name
        for name, sha in now.items()
        if Path(name).name in {Path(b).name for b in before} and sha not in before.values()
    ]
    if changed:
        raise DataError(
            f"the data has changed since the run: {', '.join(changed)}",
            where=str(target.folder.path),
            fix="restore it, or evaluate on it by name with --data (rows may have been trained on)",
        )


def warn_of_seen_rows(session: Session, split: TokenStore, reporter: Reporter, *, max_length: int) -> None:
    """Say how many rows are equal, token by token, to rows that a run was trained on, as far as that can be told.

    Args:
        session: the open adapter; of an adapter without its run nothing is known.
        split: the rows that it is measured on.
        reporter: told of it.
        max_length: of an example, in tokens, as of the split.
    """
    folder = session.target.folder
    if folder is None:
        return
    tokenizer = load_adapter_tokenizer(session.target, session.config)
    try:
        own = prepare_data(
            session.config.data.model_copy(update={"max_length": max_length}),
            tokenizer,
            reporter=ProgressOnly(reporter, "rows of the run"),  # long where the run's cache is gone
            template=session.template,
            pictures=session.prompter.pictures,
        )
        check_same_data(session.target, own)
    except LoralabError as error:  # the data may be gone or have changed since; the adapter can still be measured
        what = error.problems[0].what
        reporter.say(f"not known: whether {folder.path} was trained on some of these rows ({what})")
        return
    seen, rows = (hash_split(each, stop_ids=own.prompter.stop.ids).rows for each in (own.splits["train"], split))
    count = int(np.isin(rows, seen).sum())
    if count:
        reporter.say(f"warning: {count} of {len(rows)} rows are among the rows that {folder.path} was trained on")
