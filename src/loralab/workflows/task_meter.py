"""Measuring a task on one split, for one side after the other.

Owns the way from a split to evidence: which rows are answered, by whom, in which way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loralab.config.metric_facts import Way
from loralab.config.schema import EvaluationConfig
from loralab.data.prompts.prompter import Prompter
from loralab.data.tokens.store import TokenStore
from loralab.evaluation.answers import Answered, Evidence
from loralab.evaluation.generate import GenerationSettings, answer_questions, tell_short_rooms
from loralab.evaluation.groups import measure_groups
from loralab.evaluation.metrics.measure import Measurement, compare, measure
from loralab.evaluation.perplexity import SplitLoss
from loralab.evaluation.questions import answerable_rows, questions_of, spread
from loralab.evaluation.score import score_labels
from loralab.evaluation.teacher_forced import force_answers
from loralab.evaluation.volumes import measure_volumes
from loralab.layout.planner import Planner
from loralab.models.supervised import SupervisedPeftModel
from loralab.progress import Reporter
from loralab.training.distributed import ALONE, Processes
from loralab.workflows.groups import Groups
from loralab.workflows.task import Task


@dataclass(frozen=True, slots=True)
class Measured:
    """One side's metrics on a split.

    Attributes:
        parts: what was measured on losses and what on answers, as far as there is any.
        answers: one per question.
        way: how they came about, or None.
        rows: number of rows that were answered.
        left_out: number of rows whose answer was cut, which are not asked.
    """

    parts: tuple[Measurement, ...]
    answers: Sequence[Answered]
    way: Way | None
    rows: int
    left_out: int = 0

    @property
    def scores(self) -> dict[str, list[float]]:
        """A score for each answer by every metric that can tell; higher is better, nan where undefined."""
        return {name: values.tolist() for part in self.parts for name, values in part.per_answer.items()}

    @property
    def values(self) -> dict[str, float]:
        """Every figure that is defined, by name."""
        return {name: value for part in self.parts for name, value in part.values.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return what `evaluation.json` holds of it."""
        found = [part.as_dict() for part in self.parts]
        merged = {key: {k: v for each in found for k, v in each[key].items()} for key in ("metrics", "details")}
        answered: dict[str, Any] = {}
        if self.way is not None:
            answered = {"answered_by": self.way, "answered_rows": self.rows, "left_out": {"truncated": self.left_out}}
        return {**self.values, **answered, **merged}


class TaskMeter:
    """Measures a task on one split, for any number of sides.

    Args:
        task: what is measured.
        model: base with adapter; who answers is the caller's choice (`disable_adapter`).
        split: the rows.
        limit: rows that are answered at most, evenly spread; None answers all.
        prompter: knows stop tokens and decoding.
        evaluation: section of the configuration.
        device: where the model is.
        reporter: told of progress.
        should_stop: asked before every batch.
        processes: those that share the work.
    """

    def __init__(
        self,
        task: Task,
        model: SupervisedPeftModel,
        split: TokenStore,
        *,
        limit: int | None,
        prompter: Prompter,
        evaluation: EvaluationConfig,
        device: torch.device,
        reporter: Reporter,
        should_stop: Callable[[], bool] = lambda: False,
        processes: Processes = ALONE,
    ) -> None:
        self._task = task
        self._model = model
        self._prompter = prompter
        self._evaluation = evaluation
        self._shared: dict[str, Any] = {"reporter": reporter, "should_stop": should_stop, "processes": processes}
        self._device = device
        self._first = processes.first
        whole = answerable_rows(split, "that is measured") if task.of_answers else split
        rows = spread(len(whole), limit)
        self._rows, self._left_out = len(rows), len(split) - len(whole)
        self._questions = questions_of(whole, prompter, rows) if task.of_answers else []
        self._generation = GenerationSettings(max_new_tokens=evaluation.max_new_tokens)
        if task.way == "generate":
            tell_short_rooms(model, self._questions, settings=self._generation, reporter=reporter)
        sized = "perplexity" in task.metrics and self._first
        self._sizes = measure_volumes(split, prompter, reporter=reporter) if sized else None

    def measure(
        self,
        losses: SplitLoss,
        planner: Planner,
        *,
        label: str,
        intervals: bool = True,
        prompter: Prompter | None = None,
    ) -> Measured:
        """Measure the model as it is now.

        Args:
            losses: of the whole split.
            planner: lays out what is not generated.
            label: who answers, for progress.
            intervals: whether intervals are wanted: they cost resampling.
            prompter: another one, to which the same pictures are others; None takes the meter's own.

        Raises:
            Interrupted: the run is to stop.

        Of several processes the first alone has figures; all have the answers.
        """
        resamples = self._evaluation.bootstrap_samples if intervals else 0
        parts, answers = [], self._answer(planner, prompter or self._prompter, label)
        if not self._first:  # a user's function may give each process other scores
            return Measured((), answers, self._task.way, self._rows, self._left_out)
        if self._task.of_losses:
            volumes, words = self._sizes or (None, None)
            evidence = Evidence(units=len(losses.counts), losses=losses, answer_bytes=volumes, answer_words=words)
            parts.append(measure(self._task.of_losses, evidence, resamples=resamples))
        if self._task.of_answers:
            evidence = Evidence(units=self._rows, way=self._task.way, answers=answers)
            parts.append(measure(self._task.of_answers, evidence, resamples=resamples))
        return Measured(tuple(parts), answers, self._task.way, self._rows, self._left_out)

    def _answer(self, planner: Planner, prompter: Prompter, label: str) -> Sequence[Answered]:
        size = self._evaluation.batch_size
        match self._task.way:
            case None:
                return []
            case "generate":
                return answer_questions(
                    self._model,
                    self._questions,
                    prompter=prompter,
                    settings=self._generation,
                    batch_size=size,
                    label=f"answers {label}",
                    **self._shared,
                )
            case "score":
                return score_labels(
                    self._model,
                    self._questions,
                    labels=self._task.labels,
                    planner=planner,
                    batch_size=size,
                    device=self._device,
                    label=f"score labels {label}",
                    **self._shared,
                )
            case "teacher_forced":
                return force_answers(
                    self._model,
                    self._questions,
                    prompter=prompter,
                    planner=planner,
                    batch_size=size,
                    device=self._device,
                    label=f"teacher-forced answers {label}",
                    **self._shared,
                )


def compare_groups(groups: Groups, adapter: Measured, base: Measured, *, split: str, resamples: int) -> dict[str, Any]:
    """Return what `evaluation.json` holds of the groups of rows, or nothing where no answers were measured.

    Args:
        groups: of the task.
        adapter: the adapter's metrics.
        base: the base's, of the same rows.
        split: name of the split.
        resamples: bootstrap resamples.
    """
    mine, theirs = (next((part for part in each.parts if part.evidence.answers), None) for each in (adapter, base))
    if mine is None or theirs is None:
        return {}
    names = groups.names(split, [answer.question for answer in adapter.answers])
    values = measure_groups(mine.metrics, mine.evidence, theirs.evidence, names, resamples=resamples)
    return {"by": groups.by, "reason": groups.reason, "values": values}


def compare_sides(adapter: Measured, base: Measured, *, resamples: int) -> dict[str, Any]:
    """Return the paired difference of every figure, adapter - base.

    Args:
        adapter: the adapter's metrics.
        base: the base's, of the same rows.
        resamples: bootstrap resamples.
    """
    return {
        name: difference
        for mine, theirs in zip(adapter.parts, base.parts, strict=True)
        for name, difference in compare(mine, theirs, resamples=resamples).items()
    }
