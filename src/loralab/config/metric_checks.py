"""Rules over what is measured: metrics, ways of answering, and what decides on the best adapter.

Owns what can be told of metrics without data or model. Whether the data can answer a metric is checked when it is read
(`workflows/task_metrics.py`).
"""

from collections.abc import Sequence

from loralab.config.findings import Finding
from loralab.config.metric_facts import ALWAYS, FACTS, better_of, figure_name, is_outside, owner_of
from loralab.config.schema import Config, EvaluationConfig, TrainingConfig
from loralab.lookup import suggest


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


def check_names(config: Config) -> list[Finding]:
    """Find metrics that do not exist or stand twice."""
    findings, names = [], asked_metrics(config.evaluation)
    for place, name in enumerate(names):
        if name in names[:place]:
            findings.append(Finding("evaluation.metrics", f"{name!r} is named twice", "name it once"))
        elif is_outside(name):
            module, _, function = name.partition(":")
            if not all(part.isidentifier() for part in [*module.split("."), function]):
                what = f"not a function's name: {name!r}"
                findings.append(Finding("evaluation.metrics", what, "write package.module:function"))
        elif name not in FACTS:
            fix = suggest(owner_of(figure_name(name)) or name, FACTS)
            findings.append(Finding("evaluation.metrics", f"no such metric: {name!r}", fix))
    return findings


def check_ways(config: Config) -> list[Finding]:
    """Find settings of answering that no metric reads, and metrics that the way of answering cannot serve."""
    evaluation, findings = config.evaluation, []
    if check_names(config):
        return []  # told already
    way, names = evaluation.answer_by, answering_metrics(evaluation)
    if evaluation.metrics != "auto" and not names:
        read = [key for key in ("answer_by", "labels", "metric_rows") if evaluation.chosen(key)]
        what = "no metric in evaluation.metrics needs answers"
        findings += [Finding(f"evaluation.{key}", f"{key} has no effect: {what}", "remove it") for key in read]
        return findings
    for name in names:
        needs = "answers" if is_outside(name) else FACTS[name].needs
        if needs == "generated" and (way in ("score", "teacher_forced") or (way == "auto" and evaluation.labels)):
            what = f"{name!r} needs generated answers, but they come by {'score' if way == 'auto' else way}"
            findings.append(Finding("evaluation.metrics", what, "set evaluation.answer_by: generate"))
        if needs == "scores" and (way in ("generate", "teacher_forced") or (way == "auto" and not evaluation.labels)):
            what = f"{name!r} needs closed labels that are scored"
            fix = "set evaluation.answer_by: score, and evaluation.labels to choose the labels"
            findings.append(Finding("evaluation.metrics", what, fix))
    return findings + _check_labels(evaluation)


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
