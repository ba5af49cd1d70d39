"""The `eval` command: adapters against their base, on a run's own split or on other data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from loralab.config.metric_checks import asked_metrics
from loralab.config.metric_facts import is_outside
from loralab.config.paths import local_path
from loralab.config.schema import Config, DataConfig
from loralab.data.dataset import PreparedData, prepare_data
from loralab.data.tokens.store import TokenStore
from loralab.errors import ConfigError, DataError
from loralab.models.load import check_length, max_positions
from loralab.progress import Reporter
from loralab.run import read_json, write_json
from loralab.workflows.predictions import write_lines, write_predictions
from loralab.workflows.session import Session, Target, load_adapter_tokenizer, open_session
from loralab.workflows.split_evaluation import SplitEvaluation, evaluate_split, resolve_split
from loralab.workflows.step_layout import resolve_planner
from loralab.workflows.task_metrics import resolve_task

# What overrides can change here; `data` is what rows become, wherever they come from.
_READ = (
    "model",
    "data",
    "training.layout",
    "training.token_budget",
    "evaluation.batch_size",
    "evaluation.bootstrap_samples",
    "evaluation.metrics",
    "evaluation.answer_by",
    "evaluation.labels",
    "evaluation.max_new_tokens",
)
_OWN_ROWS = ("data.train", "data.validation", "data.test", "data.split_method", "data.split_seed")


class Found(NamedTuple):
    """What an adapter is measured on.

    Attributes:
        name: of the split.
        split: its rows.
        max_length: of an example, in tokens.
        data: that the split is a part of.
    """

    name: str
    split: TokenStore
    max_length: int
    data: PreparedData


def evaluate(
    path: Path,
    *,
    overrides: Sequence[str] = (),
    base_model: str | None = None,
    data: str | None = None,
    data_split: str | None = None,
    predictions: Path | None = None,
    reporter: Reporter,
) -> dict[str, Any]:
    """Evaluate an adapter: on its run's own split, or on other data.

    Args:
        path: run folder or adapter folder; the adapter need not come from loralab.
        overrides: `section.key=value` on top of the run's configuration.
        base_model: base to use instead of the recorded one.
        data: file, folder or Hub id to evaluate on.
        data_split: name of the split of `data`; of a plain file, which has none, all rows count.
        predictions: file that gets every prompt with both sides' answers, one JSON object a line.
        reporter: told of progress.

    Returns:
        The content of `evaluation.json`.

    Raises:
        UserError: adapter, base or data cannot be used.
    """
    return evaluate_adapters(
        [path],
        overrides=overrides,
        base_model=base_model,
        data=data,
        data_split=data_split,
        predictions=predictions,
        reporter=reporter,
    )[0]


def evaluate_adapters(
    paths: Sequence[Path],
    *,
    overrides: Sequence[str] = (),
    base_model: str | None = None,
    data: str | None = None,
    data_split: str | None = None,
    predictions: Path | None = None,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Evaluate several adapters on the same data, each against its base; arguments as in `evaluate`.

    Returns:
        The content of `evaluation.json` for each, in order.

    Raises:
        UserError: as `evaluate`; or rows that several adapters could not share.
    """
    if len(paths) > 1 and data is None:
        raise ConfigError(
            f"{len(paths)} adapters, and no data that all of them are measured on",
            where="option --data",
            fix="name it with --data FILE: each run's own split has other rows",
        )
    if predictions is not None and (predictions.is_dir() or not predictions.absolute().parent.is_dir()):
        raise ConfigError(
            f"not a file that can be written: {str(predictions)!r}",
            where="option --predictions",
            fix="name a file in a folder that is there",
        )
    contents, lines = [], []
    for path in paths:
        result = _evaluate_one(
            path, overrides=overrides, base_model=base_model, data=data, data_split=data_split, reporter=reporter
        )
        contents.append(result.content)
        if predictions is not None:
            lines += [{"run": str(path), **row} for row in result.predictions()]
    if predictions is not None:
        if not lines:
            raise ConfigError(
                "no predictions: no metric that is measured needs answers",
                where="option --predictions",
                fix="name one, for example evaluation.metrics=[exact_match]",
            )
        write_lines(predictions, lines)
        reporter.say(f"{len(lines)} predictions: {predictions}")
    return contents


def _evaluate_one(
    path: Path,
    *,
    overrides: Sequence[str],
    base_model: str | None,
    data: str | None,
    data_split: str | None,
    reporter: Reporter,
) -> SplitEvaluation:
    reads = [*_READ, *(() if data is not None else ("evaluation.split",))]
    session = open_session(
        path,
        overrides=overrides,
        base_model=base_model,
        reporter=reporter,
        reads=reads,
        ignores=() if data is None else _OWN_ROWS,
    )
    found = find_split(session, data, data_split, reporter)
    config = _without_foreign_code(session, overrides, reporter)
    task, chosen = resolve_task(config, found.data, splits={found.name: found.split})
    task.check_room(session.model)
    planner, choices = resolve_planner(session.model, config, max_length=found.max_length, device=session.device)
    budget = read_json(session.target.folder.record).get("token_budget", {}) if session.target.folder else {}
    if "value" in budget and not any(text.startswith("training.token_budget=") for text in overrides):
        planner = planner.with_budget(int(budget["value"]))  # the run's own cuts: the last bits are the same
    for name, choice in {"layout": choices["layout"], **chosen}.items():
        reporter.say(f"{name}: {choice.value} ({choice.reason})")
    result = evaluate_split(
        session.model,
        found.split,
        task=task,
        prompter=found.data.prompter,
        planner=planner,
        name=found.name,
        evaluation=config.evaluation,
        max_length=found.max_length,
        device=session.device,
        reporter=reporter,
    )
    folder = session.target.folder
    split_chosen = any(text.startswith("evaluation.split=") for text in overrides)
    # `evaluation.json` is what the run itself measured; other settings do not replace it.
    if folder is not None and data is None and base_model is None and (split_chosen or not overrides):
        write_json(folder.path / f"evaluation-{found.name}.json" if split_chosen else folder.evaluation, result.content)
        if not split_chosen:
            write_predictions(folder.predictions, result)
    return result


def _without_foreign_code(session: Session, overrides: Sequence[str], reporter: Reporter) -> Config:
    """Return the configuration without functions that nobody but a run folder has named."""
    config = session.config
    named = any(text.partition("=")[0].strip() in ("evaluation", "evaluation.metrics") for text in overrides)
    foreign = [] if named else [name for name in asked_metrics(config.evaluation) if is_outside(name)]
    if not foreign:
        return config
    fix = f"evaluation.metrics=[{', '.join(asked_metrics(config.evaluation))}]"
    reporter.say(f"not measured: {', '.join(foreign)}, code that a run folder names is not run; allow it with {fix}")
    kept = [name for name in asked_metrics(config.evaluation) if name not in foreign]
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"metrics": kept})})


def find_split(session: Session, data: str | None, data_split: str | None, reporter: Reporter) -> Found:
    """Return what an adapter is measured on.

    Args:
        session: the open adapter.
        data: file, folder or Hub id, or None for the run's own split.
        data_split: name of the split of `data`; of a plain file, which has none, all rows count.
        reporter: told of progress.

    Raises:
        DataError: there is no such data, or the run's own has changed.
    """
    if data is None and session.target.folder is None:
        raise DataError("no data to evaluate on", where=str(session.target.adapter), fix="name some with --data FILE")
    section, wanted = _fit_length(session, reporter), session.config.evaluation.split
    tokenizer, template = load_adapter_tokenizer(session.target, session.config), session.template
    if data is not None:
        # Rows from elsewhere are asked as the adapter was trained: under its system prompt, where they bring none.
        system = session.system_prompt or section.system
        alone = section.model_copy(update={"train": data, "validation": None, "test": None, "system": system})
        file = local_path(data)
        whole = file is not None and file.is_file()
        prepared = prepare_data(
            alone, tokenizer, reporter=reporter, template=template, split=None if whole else data_split
        )
        name = f"all rows of {data}" if whole else data_split or "train"
        return Found(name, prepared.splits["train"], section.max_length, prepared)
    prepared = prepare_data(section, tokenizer, reporter=reporter, template=template)
    chosen = resolve_split(wanted, prepared.splits)
    if chosen is None:
        raise DataError(
            "the run has no validation or test split",
            where=str(session.target.adapter),
            fix="name data with --data FILE, or evaluate the training rows with --split train",
        )
    _check_same_data(session.target, prepared)
    return Found(chosen, prepared.splits[chosen], section.max_length, prepared)


def _check_same_data(target: Target, prepared: PreparedData) -> None:
    """Check that the run's own data is still what the run saw; its splits would be others."""
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


def _fit_length(session: Session, reporter: Reporter) -> DataConfig:
    """Return the data section with a default max_length that the model has positions for."""
    section, config = session.config.data, session.model.language_model.config
    limit = max_positions(config)
    if limit is not None and "max_length" not in section.model_fields_set and section.max_length > limit:
        reporter.say(f"max_length: {limit} (all positions that the model has)")
        return section.model_copy(update={"max_length": limit})
    check_length(config, section.max_length)
    return section
