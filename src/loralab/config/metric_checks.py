"""Rules over what is measured: metrics, ways of answering, and what decides on the best adapter.

Owns what can be told of metrics without data or model. Whether the data can answer a metric is checked when it is read
(`workflows/task.py`).
"""

import json
from collections.abc import Sequence

from loralab.config.findings import Finding
from loralab.config.metric_facts import ALWAYS, FACTS, RESERVED, Way, better_of, figure_name, is_outside, owner_of
from loralab.config.schema import Config, EvaluationConfig
from loralab.config.training_schema import TrainingConfig
from loralab.lookup import suggest

# Settings that act only where a metric needs answers.
ANSWER_KEYS = ("answer_by", "labels", "group_by", "metric_rows")


def watched_metric(training: TrainingConfig) -> str:
    """Return the figure that decides on the best adapter and on an early stop, without `eval_`."""
    early_stopping = training.early_stopping
    named = training.metric_for_best_model or (early_stopping.metric if early_stopping is not None else "eval_loss")
    return figure_name(named)


def watched_key(training: TrainingConfig) -> str:
    """Return the key in section `training` that names the watched figure."""
    chosen = training.metric_for_best_model is not None
    return "training.metric_for_best_model" if chosen else "training.early_stopping.metric"


def asked_metrics(evaluation: EvaluationConfig) -> Sequence[str]:
    """Return the metrics that a configuration names; none where it leaves the choice."""
    return [] if evaluation.metrics == "auto" else evaluation.metrics


def answering_metrics(evaluation: EvaluationConfig) -> list[str]:
    """Return the named metrics that a model must answer prompts for."""
    return [name for name in asked_metrics(evaluation) if is_outside(name) or FACTS[name].needs != "losses"]


def answering_way(evaluation: EvaluationConfig, names: Sequence[str]) -> tuple[Way, str]:
    """Choose how answers come about, and say why.

    Args:
        evaluation: section of the configuration.
        names: metrics that are measured.
    """
    if evaluation.answer_by != "auto":
        return evaluation.answer_by, "set in evaluation.answer_by"
    if evaluation.labels is not None:
        return "score", "evaluation.labels are closed answers"
    asked = [name for name in names if is_outside(name) or FACTS[name].needs != "losses"]
    closed = [name for name in asked if name == "yes_no" or (not is_outside(name) and FACTS[name].needs == "scores")]
    if closed and (closed == asked or closed != ["yes_no"]):
        return "score", f"{', '.join(closed)}: the answers are closed; answer_by: generate has them written"
    return "generate", "an answer that the model writes by itself is what a user would see"


def check_names(config: Config) -> list[Finding]:
    """Find metrics that do not exist or stand twice."""
    findings, names = [], asked_metrics(config.evaluation)
    for place, name in enumerate(names):
        if name in names[:place]:
            findings.append(Finding("evaluation.metrics", f"{name!r} is named twice", "name it once"))
        elif is_outside(name):
            findings += _check_outside(name)
        elif name not in FACTS:
            fix = suggest(owner_of(figure_name(name)) or name, FACTS)
            findings.append(Finding("evaluation.metrics", f"no such metric: {name!r}", fix))
    return findings


def _check_outside(name: str) -> list[Finding]:
    module, _, function = name.partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), function]):
        what = f"not a function's name: {name!r}"
        return [Finding("evaluation.metrics", what, "write package.module:function")]
    if figure_name(function) in RESERVED:
        what = f"{name!r} would give a figure {function!r}, which is another one's name"
        return [Finding("evaluation.metrics", what, "give the function another name")]
    return []


def check_ways(config: Config) -> list[Finding]:
    """Find settings of answering that no metric reads, and metrics that the way of answering cannot serve."""
    evaluation, findings = config.evaluation, []
    if check_names(config):
        return []  # told already
    names = answering_metrics(evaluation)
    if evaluation.metrics != "auto" and not names:
        what = "no metric in evaluation.metrics needs answers"
        return [
            Finding(f"evaluation.{key}", f"{key} has no effect: {what}", _unset(key))
            for key in ANSWER_KEYS
            if evaluation.chosen(key)
        ]
    way, _ = answering_way(evaluation, names)
    for name in names:
        needs = "answers" if is_outside(name) else FACTS[name].needs
        if (needs == "generated" and way != "generate") or (needs == "scores" and way != "score"):
            kind = "generated answers" if needs == "generated" else "closed labels that are scored"
            what = f"{name!r} needs {kind}, but answers come by {way}"
            fix = f"leave {name} out, or set evaluation.answer_by: {'generate' if needs == 'generated' else 'score'}"
            findings.append(Finding("evaluation.metrics", what, fix))
    return findings + _check_labels(evaluation)


def _unset(key: str) -> str:
    """Say how a setting is taken back, also where a file has it that is not to be changed."""
    default = json.dumps(EvaluationConfig.model_fields[key].get_default(call_default_factory=True))
    return f"remove it; on the command line evaluation.{key}={default} takes it back"


def _check_labels(evaluation: EvaluationConfig) -> list[Finding]:
    labels, way = evaluation.labels, evaluation.answer_by
    if labels is None:
        return []
    if way in ("generate", "teacher_forced"):
        what = f"labels have no effect with answer_by {way}"
        return [Finding("evaluation.labels", what, "remove them, or set evaluation.answer_by: score")]
    if len(labels) < 2:
        return [Finding("evaluation.labels", f"{len(labels)} label: {labels!r}", "name two or more")]
    blank = [label for label in labels if not label.strip()]
    if blank:
        return [Finding("evaluation.labels", f"a label without text: {blank[0]!r}", "remove it")]
    folded = [label.strip().casefold() for label in labels]
    twice = [label for place, label in enumerate(labels) if folded[place] in folded[:place]]
    return [Finding("evaluation.labels", f"label {twice[0]!r} stands twice", "name it once")] if twice else []


def check_watched(config: Config) -> list[Finding]:
    """Find a watched figure that does not exist, is not measured, or has no direction."""
    training, evaluation = config.training, config.evaluation
    stopping = training.early_stopping
    findings = _check_both(training)
    if findings or (stopping is None and training.metric_for_best_model is None):
        return findings
    key, figure = watched_key(training), watched_metric(training)
    outside = {name.partition(":")[2] for name in asked_metrics(evaluation) if is_outside(name)}
    owner = owner_of(figure)
    if figure not in ALWAYS and figure not in outside:
        if owner is None:
            known = dict.fromkeys([*ALWAYS, *(each for facts in FACTS.values() for each in facts.figures), *outside])
            written = training.metric_for_best_model or (stopping.metric if stopping is not None else figure)
            return [Finding(key, f"no such metric: {written!r}", suggest(written, known))]
        measured = owner in ("token_accuracy", "token_entropy") or owner in asked_metrics(evaluation)
        if evaluation.metrics != "auto" and not measured:
            what = f"{figure!r} is not measured: evaluation.metrics has no {owner!r}"
            return [Finding(key, what, f"add {owner} to evaluation.metrics")]
    return _check_direction(training, figure)


def _check_both(training: TrainingConfig) -> list[Finding]:
    stopping, best = training.early_stopping, training.metric_for_best_model
    if best is not None and not training.load_best_model_at_end:
        what = "metric_for_best_model without load_best_model_at_end: no best adapter is kept"
        return [Finding("training.metric_for_best_model", what, "remove it, or set load_best_model_at_end: true")]
    if best is not None and stopping is not None and stopping.chosen("metric"):
        return (
            [
                Finding(
                    "training.metric_for_best_model",
                    f"{best!r}, but early_stopping.metric is {stopping.metric!r}",
                    "watch one metric: remove one of the two",
                )
            ]
            if figure_name(best) != figure_name(stopping.metric)
            else []
        )
    if training.load_best_model_at_end and watched_metric(training) == "loss":
        what = "the watched metric is loss, but load_best_model_at_end chooses by an evaluation"
        return [Finding(watched_key(training), what, "set it to eval_loss")]
    return []


def _check_direction(training: TrainingConfig, figure: str) -> list[Finding]:
    early_stopping = training.early_stopping
    mode, better = (early_stopping.mode if early_stopping is not None else "auto"), better_of(figure)
    if mode == "auto":
        if better is None and owner_of(figure) is not None:
            fix = "set training.early_stopping.mode: min or max" if early_stopping else "watch another metric"
            return [Finding(watched_key(training), f"neither direction of {figure!r} is better", fix)]
        return []
    if better is not None and better != {"min": "lower", "max": "higher"}[mode]:
        what = f"mode {mode}, but a {better} {figure} is better"
        return [Finding("training.early_stopping.mode", what, "remove it")]
    return []


RULES = (check_names, check_ways, check_watched)
