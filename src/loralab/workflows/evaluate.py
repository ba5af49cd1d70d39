"""The `eval` command: adapters against their base, on a run's own split or on other data."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loralab.config.metric_checks import ANSWER_KEYS, answering_metrics, asked_metrics
from loralab.config.metric_facts import is_outside
from loralab.config.paths import local_path
from loralab.config.schema import Config, DataConfig, EvaluationConfig
from loralab.data.dataset import PreparedData, prepare_data
from loralab.data.tokens.store import TokenStore
from loralab.errors import ConfigError, DataError
from loralab.models.load import check_length, max_positions
from loralab.progress import Reporter
from loralab.run import RunFolder, read_json, write_json
from loralab.workflows.blank_pictures import check_blanking
from loralab.workflows.pictures import reading_pictures
from loralab.workflows.predictions import write_lines, write_predictions
from loralab.workflows.seen_rows import check_same_data, warn_of_seen_rows
from loralab.workflows.session import (
    Session,
    find_target,
    load_adapter_tokenizer,
    load_target_config,
    open_session,
)
from loralab.workflows.split_evaluation import SplitEvaluation, evaluate_split, resolve_split
from loralab.workflows.step_layout import resolve_planner
from loralab.workflows.task import Task, resolve_task

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
    "evaluation.group_by",
    "evaluation.max_new_tokens",
)
# Settings of the run's own rows, which other data make meaningless.
OWN_ROWS = ("data.train", "data.validation", "data.test", "data.split_method", "data.split_seed")


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
    blank_images: bool = False,
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
        blank_images: whether the adapter is measured once more with every picture grey.
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
        blank_images=blank_images,
        reporter=reporter,
    )[0]


@dataclass(frozen=True, slots=True)
class _Request:
    """What is asked of each adapter; fields as in `evaluate`."""

    overrides: Sequence[str]
    base_model: str | None
    data: str | None
    data_split: str | None
    predictions: Path | None
    blank_images: bool

    @property
    def split_chosen(self) -> bool:
        """Whether the user has named a split of the run's own data."""
        return any(text.startswith("evaluation.split=") for text in self.overrides)

    @property
    def kept(self) -> bool:
        """Whether the run folder keeps the result: under the split's name, or in the place of the run's own."""
        return self.data is None and self.base_model is None and (self.split_chosen or not self.overrides)


def evaluate_adapters(
    paths: Sequence[Path],
    *,
    overrides: Sequence[str] = (),
    base_model: str | None = None,
    data: str | None = None,
    data_split: str | None = None,
    predictions: Path | None = None,
    blank_images: bool = False,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Evaluate several adapters on the same data, each against its base; arguments as in `evaluate`.

    Returns:
        The content of `evaluation.json` for each, in order.

    Raises:
        UserError: as `evaluate`; or adapters that would be measured on other rows, or in another way.
    """
    request = _Request(overrides, base_model, data, data_split, predictions, blank_images)
    if len(paths) > 1 and data is None:
        raise ConfigError(
            f"{len(paths)} adapters, and no data that all of them are measured on",
            where="option --data",
            fix="name it with --data FILE: each run's own split has other rows",
        )
    if predictions is not None:
        _check_predictions(predictions, data)
    _check_alike(paths, request)
    contents: list[dict[str, Any]] = []
    lines: list[dict[str, Any]] = []
    before: Task | None = None
    for path in paths:
        result, task = _evaluate_one(path, request, before, reporter)
        before = before or task
        contents.append(result.content)
        lines += [{"run": str(path), **row} for row in result.predictions()] if predictions is not None else []
    if predictions is not None:
        write_lines(predictions, lines)
        reporter.say(f"{len(lines)} predictions: {predictions}")
    return contents


def _check_alike(paths: Sequence[Path], request: _Request) -> None:
    """Check that several adapters are asked for the same metrics in the same way, before any of them is measured.

    Raises:
        ConfigError: they are not.
    """
    first = None
    for path in paths if len(paths) > 1 else ():
        config = load_target_config(find_target(path), request.overrides, request.base_model).config
        asked = config.evaluation.metrics, config.evaluation.answer_by, config.evaluation.labels
        first = first or (path, asked)
        if asked != first[1]:
            shown = [f"{each[0]} by {each[1]}" for each in (asked, first[1])]
            raise ConfigError(
                f"{str(path)!r} asks for metrics {shown[0]}, {str(first[0])!r} for {shown[1]}",
                where="arguments RUN, --adapter",
                fix=f"choose for all of them, for example --metrics {_written(first[1][0])} --answer-by {first[1][1]}",
            )


def _written(metrics: Sequence[str] | str) -> str:
    return metrics if isinstance(metrics, str) else ",".join(metrics)


def _check_predictions(path: Path, data: str | None) -> None:
    """Check that predictions can be written, before hours of work for them.

    Raises:
        ConfigError: they cannot, or would replace the data.
    """
    folder = path.absolute().parent
    source = None if data is None else local_path(data)
    if source is not None and source.exists() and source.resolve() == path.resolve():
        what, fix = f"would replace the data: {str(path)!r}", "name another file"
    elif path.exists() and not path.is_file():
        what, fix = f"not a file: {str(path)!r}", "name a file"
    elif not folder.is_dir() or not os.access(folder, os.W_OK):
        what, fix = f"no folder that can be written to: {str(folder)!r}", "name a file in another folder"
    else:
        return
    raise ConfigError(what, where="option --predictions", fix=fix)


def _evaluate_one(
    path: Path, request: _Request, before: Task | None, reporter: Reporter
) -> tuple[SplitEvaluation, Task]:
    data, overrides = request.data, request.overrides
    session = open_session(
        path,
        overrides=overrides,
        base_model=request.base_model,
        reporter=reporter,
        reads=[*_READ, *(() if data is not None else ("evaluation.split",))],
        ignores=() if data is None else OWN_ROWS,
    )
    found = find_split(session, data, request.data_split, reporter)
    if data is not None:
        warn_of_seen_rows(session, found.split, reporter, max_length=found.max_length)
    if request.blank_images:
        check_blanking(found.split, found.name)
    config = without_foreign_code(session.config, overrides, reporter)
    task, chosen = resolve_task(config, found.data, splits={found.name: found.split})
    _check_task(task, before, path, request)
    task.check_room(session.model)
    planner, choices = resolve_planner(session.model, config, max_length=found.max_length, device=session.device)
    planner = reading_pictures(planner, session.prompter, session.model)
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
        blank_images=request.blank_images,
    )
    # `evaluation.json` is what the run itself measured; what was measured otherwise does not replace it.
    if session.target.folder is not None and request.kept and config is session.config:
        _keep(session.target.folder, found.name, result, split_chosen=request.split_chosen)
    return result, task


def _check_task(task: Task, before: Task | None, path: Path, request: _Request) -> None:
    """Check that an adapter is measured as the ones before it, and that what was asked for acts.

    Raises:
        ConfigError: it is not, or something has no effect.
    """
    if before is not None and (task.way, list(task.metrics)) != (before.way, list(before.metrics)):
        ways = [f"{', '.join(each.metrics) or 'no metric'} by {each.way or 'losses'}" for each in (before, task)]
        raise ConfigError(
            f"{str(path)!r} would be measured otherwise than the adapter before it: {ways[1]}, not {ways[0]}",
            where="arguments RUN, --adapter",
            fix=f"choose for all of them: --metrics {','.join(before.metrics)} --answer-by {before.way}",
        )
    limits = [text for text in request.overrides if text.startswith("evaluation.max_new_tokens=")]
    if limits and task.way != "generate":
        why = "no metric that is measured needs answers" if task.way is None else f"answers come by {task.way}"
        raise ConfigError(
            f"evaluation.max_new_tokens has no effect: {why}",
            where=f"command line: {limits[0]}",
            fix="remove it, or have answers generated: --metrics exact_match --answer-by generate",
        )
    if request.predictions is not None and task.way is None:
        raise ConfigError(
            "no predictions: no metric that is measured needs answers",
            where="option --predictions",
            fix="name one, for example --metrics exact_match",
        )


def _keep(folder: RunFolder, split: str, result: SplitEvaluation, *, split_chosen: bool) -> None:
    """Write a run's own evaluation into its folder."""
    if split_chosen:
        write_json(folder.path / f"evaluation-{split}.json", result.content)
        return
    write_json(folder.evaluation, result.content)
    write_predictions(folder.predictions, result)


def without_foreign_code(config: Config, overrides: Sequence[str], reporter: Reporter) -> Config:
    """Return a run folder's configuration without functions that nobody else has named.

    A run folder may come from someone else: its word is not enough to run code.

    Args:
        config: of the run folder, with overrides.
        overrides: given by the user.
        reporter: told of what is left out.
    """
    named = any(text.partition("=")[0].strip() in ("evaluation", "evaluation.metrics") for text in overrides)
    asked = asked_metrics(config.evaluation)
    foreign = [] if named else [name for name in asked if is_outside(name)]
    if not foreign:
        return config
    fix = f"evaluation.metrics=[{', '.join(asked)}]"
    reporter.say(f"not measured: {', '.join(foreign)}, code that a run folder names is not run; allow it with {fix}")
    left: dict[str, Any] = {"metrics": [name for name in asked if name not in foreign]}
    evaluation = config.evaluation.model_copy(update=left)
    if not answering_metrics(evaluation):  # what was set for their answers has nothing to act on
        unset = {key: EvaluationConfig.model_fields[key].default for key in ANSWER_KEYS}
        evaluation = evaluation.model_copy(update=unset)
    return config.model_copy(update={"evaluation": evaluation})


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
            alone,
            tokenizer,
            reporter=reporter,
            template=template,
            split=None if whole else data_split,
            pictures=session.prompter.pictures,
        )
        name = f"all rows of {data}" if whole else data_split or "train"
        return Found(name, prepared.splits["train"], section.max_length, prepared)
    pictures = session.prompter.pictures
    prepared = prepare_data(section, tokenizer, reporter=reporter, template=template, pictures=pictures)
    chosen = resolve_split(wanted, prepared.splits)
    if chosen is None:
        raise DataError(
            "the run has no validation or test split",
            where=str(session.target.adapter),
            fix="name data with --data FILE, or evaluate the training rows with --split train",
        )
    check_same_data(session.target, prepared)
    return Found(chosen, prepared.splits[chosen], section.max_length, prepared)


def _fit_length(session: Session, reporter: Reporter) -> DataConfig:
    """Return the data section with a default max_length that the model has positions for."""
    section, config = session.config.data, session.model.language_model.config
    limit = max_positions(config)
    if limit is not None and "max_length" not in section.model_fields_set and section.max_length > limit:
        reporter.say(f"max_length: {limit} (all positions that the model has)")
        return section.model_copy(update={"max_length": limit})
    check_length(config, section.max_length)
    return section
