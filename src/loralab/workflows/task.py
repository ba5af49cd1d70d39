"""What is measured besides the loss: which metrics, how answers come about, and whether the data can answer them.

Owns the choices, which are made before training. What a metric computes is `evaluation/metrics/`'s; measuring is
`task_meter.py`'s.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from loralab.config.metric_checks import ANSWER_KEYS, answering_way, asked_metrics, watched_metric
from loralab.config.metric_facts import ALWAYS, FACTS, YES_NO_CLASSES, Better, Way, is_outside, owner_of
from loralab.config.schema import Config, EvaluationConfig
from loralab.data.dataset import PreparedData
from loralab.data.tokens.store import TokenStore
from loralab.errors import ConfigError, DataError
from loralab.evaluation.answers import Answered, Evidence, Question
from loralab.evaluation.metrics.metric import Metric
from loralab.evaluation.metrics.table import resolve_metrics
from loralab.evaluation.questions import answerable_rows, longest_prompt, questions_of, references_of, spread
from loralab.evaluation.score import LabelIds, check_room, label_ids
from loralab.models.precision import Resolved
from loralab.models.supervised import SupervisedPeftModel
from loralab.workflows.groups import Groups, resolve_groups

# Of more different answers than this, scoring each is no closed question.
_MOST_LABELS = 20
# So many rows of a split show how its answers are written.
_SHOWN_ANSWERS = 200


@dataclass(frozen=True, slots=True)
class Task:
    """What is measured besides the loss, and how.

    Attributes:
        metrics: by name.
        way: how answers come about, or None where no metric needs any.
        labels: token ids by label, for `score`.
        longest_prompt: tokens of the longest prompt that is measured.
        groups: groups of rows that metrics of answers are measured on too, or None.
    """

    metrics: Mapping[str, Metric] = field(default_factory=dict)
    way: Way | None = None
    labels: LabelIds = field(default_factory=dict)
    longest_prompt: int = 0
    groups: Groups | None = None

    def check_room(self, model: SupervisedPeftModel) -> None:
        """Check that the model has positions for every prompt with the longest label behind it.

        Raises:
            ModelError: it has not: told before training, not at the first evaluation.
        """
        check_room(model, self.longest_prompt, self.labels, where="key evaluation.labels")

    @property
    def of_losses(self) -> dict[str, Metric]:
        """The metrics that are measured on losses alone."""
        return {name: metric for name, metric in self.metrics.items() if metric.needs == "losses"}

    @property
    def of_answers(self) -> dict[str, Metric]:
        """The metrics that are measured on answers."""
        return {name: metric for name, metric in self.metrics.items() if metric.needs != "losses"}

    @property
    def headline(self) -> list[str]:
        """The figures that a line of progress shows."""
        return [
            figure
            for name, metric in self.metrics.items()
            for figure in (metric.better if is_outside(name) else FACTS[name].headline)
            if figure not in ("perplexity", "token_accuracy", "token_entropy")
        ]

    def better(self, figure: str) -> Better | None:
        """Return which direction of one of its figures is better, or None where neither is."""
        return next((metric.better[figure] for metric in self.metrics.values() if figure in metric.better), None)


def resolve_task(
    config: Config, data: PreparedData, *, splits: Mapping[str, TokenStore]
) -> tuple[Task, dict[str, Resolved[Any]]]:
    """Choose metrics, way of answering and labels, and check that the data can answer them.

    Args:
        config: the configuration.
        data: its data.
        splits: those that are measured.

    Returns:
        The task, and the choices with their reasons; none where there is nothing to measure.

    Raises:
        ConfigError: a function of the user's own cannot be used.
        DataError: the data cannot answer a metric; what is missing is named.
    """
    names, reason = _resolve_names(config, data)
    metrics = resolve_metrics(names)
    task = Task(metrics)
    if not task.of_answers:
        _check_no_answer_settings(config.evaluation)
    if not metrics:
        return task, {}
    choices: dict[str, Resolved[Any]] = {"metrics": Resolved(", ".join(names), reason)}
    if not task.of_answers or not splits:
        return task, choices
    rows = {name: answerable_rows(split, name) for name, split in splits.items()}
    way, why = answering_way(config.evaluation, names)
    choices["answer_by"] = Resolved(way, why)
    choices |= _left_out(splits, rows)
    unread = way != "score" and all(
        metric.check is None and metric.try_out is None for metric in task.of_answers.values()
    )
    asked = [[] if unread else [*references_of(each, data.prompter)] for each in rows.values()]
    labels: LabelIds = {}
    if way == "score":
        chosen = _resolve_labels(config.evaluation, [question for each in asked for question in each], names)
        looked_at = (questions_of(each, data.prompter, spread(len(each), _SHOWN_ANSWERS)) for each in rows.values())
        ids = label_ids(chosen.value, data.prompter, [question for each in looked_at for question in each])
        labels = ids.value
        strange = _check_known(ids.value.texts.values(), [question.reference for each in asked for question in each])
        choices["labels"] = Resolved(", ".join(map(repr, labels)), f"{chosen.reason}; {ids.reason}{strange}")
    groups = None
    if config.evaluation.group_by is not None:
        grouped = resolve_groups(config.evaluation.group_by, data, splits)
        choices["group_by"] = Resolved(grouped.value.by, grouped.reason)
        groups = grouped.value
    task = Task(metrics, way, labels, max(map(longest_prompt, rows.values())), groups)
    for each in asked:
        _check_answerable(task, each)
    return task, choices


def _resolve_names(config: Config, data: PreparedData) -> tuple[list[str], str]:
    if config.evaluation.metrics != "auto":
        return list(asked_metrics(config.evaluation)), "set in evaluation.metrics"
    names, reasons = [], []
    if data.report["format"]["value"] == "yes_no":
        names, reasons = ["yes_no"], ["rows are answered by yes or no"]
    watched = watched_metric(config.training)
    owner = owner_of(watched)
    if owner is not None and watched not in ALWAYS and owner not in names:
        names.append(owner)
        reasons.append(f"training watches {watched}")
    return names, "; ".join(reasons)


def _left_out(splits: Mapping[str, TokenStore], rows: Mapping[str, TokenStore]) -> dict[str, Resolved[Any]]:
    """Return which rows are answered, where some are not: a cut answer is no truth to be measured against."""
    cut = {name: len(split) - len(rows[name]) for name, split in splits.items()}
    if not any(cut.values()):
        return {}
    shares = [f"{name} {len(rows[name])} of {len(split)}" for name, split in splits.items() if cut[name]]
    why = "rows whose answer was cut at data.max_length are left out of all but the losses: raise it to have them in"
    return {"answered_rows": Resolved(", ".join(shares), why)}


def _check_no_answer_settings(evaluation: EvaluationConfig) -> None:
    """Check that no setting of answers is set where none are asked for.

    Raises:
        ConfigError: one is; it would have no effect.
    """
    unread = [key for key in ANSWER_KEYS if evaluation.chosen(key)]
    if unread:
        raise ConfigError(
            f"{unread[0]} has no effect: no metric that is measured needs answers",
            where=f"key evaluation.{unread[0]}",
            fix="name metrics in evaluation.metrics, or remove it",
        )


def _resolve_labels(
    evaluation: EvaluationConfig, questions: Sequence[Question], names: Sequence[str]
) -> Resolved[list[str]]:
    if evaluation.labels is not None:
        return Resolved(list(evaluation.labels), "set in evaluation.labels")
    found = list(dict.fromkeys(question.reference.strip() for question in questions))
    if len(found) < 2 and "yes_no" in names:
        both = sorted({*found, *YES_NO_CLASSES[:2]})
        return Resolved(both, f"yes and no; all rows that are measured are answered by {found[0]!r}")
    if len(found) < 2:
        raise DataError(
            f"the data has one answer, {found[0]!r}: there is nothing to choose from",
            where=f"key evaluation.metrics ({', '.join(names)})",
            fix="name the closed answers in evaluation.labels, or set evaluation.answer_by: generate",
        )
    if len(found) > _MOST_LABELS:
        raise DataError(
            f"the data has {len(found)} different answers, too many to score each (at most {_MOST_LABELS})",
            where=f"key evaluation.metrics ({', '.join(names)})",
            fix="name the closed answers in evaluation.labels, or set evaluation.answer_by: generate",
        )
    return Resolved(sorted(found), "the answers that the data has")


def _check_known(texts: Iterable[str], references: Sequence[str]) -> str:
    """Return what is said of references that are none of the labels.

    Raises:
        DataError: none of them is one.
    """
    known = {text.strip().casefold() for text in texts}
    others = [reference.strip() for reference in references if reference.strip().casefold() not in known]
    if len(others) < len(references) or not references:
        return f"; {len(others)} of {len(references)} answers of the data are none of them" if others else ""
    shown = ", ".join(repr(each) for each in list(dict.fromkeys(others))[:3])
    raise DataError(
        f"none of the labels {sorted(known)} is an answer of the data, which are {shown}, ..",
        where="key evaluation.labels",
        fix="name the answers as the data has them, or remove evaluation.labels",
    )


def _check_answerable(task: Task, questions: Sequence[Question]) -> None:
    """Check the data against every metric, with its own references as the answers."""
    scores = dict.fromkeys(task.labels, 0.0) if task.way == "score" else None
    stopped = True if task.way == "generate" else None
    evidence = Evidence(
        units=max((question.unit for question in questions), default=-1) + 1,
        way=task.way,
        answers=[
            Answered(question, question.reference, stopped=stopped, label_scores=scores) for question in questions
        ],
    )
    for metric in task.of_answers.values():
        for check in (metric.check, metric.try_out):
            if check is not None:
                check(evidence)
