"""Rules that span fields and sections.

Owns every rule that needs no file, no library and no hardware; what needs those is checked
where they are met (`data`, `models`), before anything is written.
"""

from collections.abc import Callable
from dataclasses import dataclass

from loralab.config.schema import Config
from loralab.lookup import suggest

EARLY_STOPPING_METRICS = ("loss", "eval_loss", "perplexity")

# Each entry: why it may be passed through. Everything else either has a key of its own or
# would break what the engine fixes (batching, saving, loss).
TRAINER_ARGS = {
    "adam_beta1": "decay of AdamW's first moment",
    "adam_beta2": "decay of AdamW's second moment",
    "adam_epsilon": "AdamW's denominator term",
    "lr_scheduler_kwargs": "extra arguments of the schedule, such as num_cycles",
}

# TrainingArguments that have a key of their own here.
OWN_KEYS = {
    "bf16": "model.precision",
    "fp16": "model.precision",
    "use_cpu": "model.device",
    "output_dir": "output.dir",
    "eval_strategy": "evaluation.strategy",
    "eval_steps": "evaluation.steps",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "metric_for_best_model": "training.early_stopping.metric",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """A broken rule.

    Attributes:
        key: dotted key that the user should look at.
        what: what is wrong, with the value that was got.
        fix: what to do about it.
    """

    key: str
    what: str
    fix: str


def check_config(config: Config) -> list[Finding]:
    """Return every broken rule of a configuration whose fields are valid one by one."""
    return [finding for rule in RULES for finding in rule(config)]


def _check_splits(config: Config) -> list[Finding]:
    findings = []
    for key, value in (("data.validation", config.data.validation), ("data.test", config.data.test)):
        if isinstance(value, float) and not 0.0 < value < 1.0:
            fix = "give a fraction above 0 and below 1, a whole number of rows, a file, or the name of a split"
            findings.append(Finding(key, f"not a usable fraction: {value!r}", fix))
        elif isinstance(value, int) and value < 1:
            findings.append(Finding(key, f"not a usable number of rows: {value}", "give at least 1, or null for none"))
    return findings


def _check_precision(config: Config) -> list[Finding]:
    if config.model.precision == "float16" and config.model.device == "cpu":
        return [
            Finding(
                "model.precision",
                "float16 does not train on a CPU (its range needs loss scaling, which only CUDA has)",
                "set model.precision: bfloat16 (same size, wider range) or float32",
            )
        ]
    return []


def _check_warmup(config: Config) -> list[Finding]:
    training = config.training
    if training.lr_scheduler_type == "constant" and (training.warmup_ratio > 0 or training.warmup_steps > 0):
        what = "warm-up with lr_scheduler_type constant, which has none"
        return [Finding("training.lr_scheduler_type", what, "set it to constant_with_warmup")]
    if training.warmup_ratio > 0 and training.warmup_steps > 0:
        what = f"warm-up given twice: warmup_ratio {training.warmup_ratio} and warmup_steps {training.warmup_steps}"
        return [Finding("training.warmup_steps", what, "keep one of them")]
    return []


def _check_validation_needs(config: Config) -> list[Finding]:
    if config.data.validation is not None and config.evaluation.strategy != "no":
        return []
    training, findings = config.training, []
    has = "evaluation.strategy is no" if config.data.validation is not None else "data.validation is null"
    fix = "set data.validation (for example 0.1) and evaluation.strategy: epoch"
    if training.load_best_model_at_end:
        findings.append(Finding("training.load_best_model_at_end", f"there is no evaluation to choose by: {has}", fix))
    early_stopping = training.early_stopping
    if early_stopping is not None and early_stopping.metric != "loss":
        findings.append(
            Finding("training.early_stopping.metric", f"{early_stopping.metric!r} is never measured: {has}", fix)
        )
    if config.evaluation.strategy == "steps" and config.data.validation is None:
        findings.append(Finding("evaluation.strategy", "steps, but data.validation is null", fix))
    return findings


def _check_best(config: Config) -> list[Finding]:
    early_stopping = config.training.early_stopping
    if not config.training.load_best_model_at_end or early_stopping is None or early_stopping.metric != "loss":
        return []
    what = "early_stopping.metric is loss, but load_best_model_at_end chooses by an evaluation"
    return [Finding("training.early_stopping.metric", what, "set it to eval_loss")]


def _check_early_stopping_metric(config: Config) -> list[Finding]:
    early_stopping = config.training.early_stopping
    if early_stopping is None or early_stopping.metric in EARLY_STOPPING_METRICS:
        return []
    return [
        Finding(
            "training.early_stopping.metric",
            f"no such metric: {early_stopping.metric!r}",
            suggest(early_stopping.metric, EARLY_STOPPING_METRICS),
        )
    ]


def _check_trainer_args(config: Config) -> list[Finding]:
    findings = []
    for name, value in config.advanced.trainer_args.items():
        key = f"advanced.trainer_args.{name}"
        if name in TRAINER_ARGS:
            wanted = (dict,) if name == "lr_scheduler_kwargs" else (int, float)
            if not isinstance(value, wanted) or isinstance(value, bool):
                kind = "a mapping" if name == "lr_scheduler_kwargs" else "a number"
                findings.append(Finding(key, f"{name} got {value!r}", f"give {kind}: {TRAINER_ARGS[name]}"))
            continue
        own = OWN_KEYS.get(name) or next(
            (
                f"{section}.{name}"
                for section in ("training", "evaluation")
                if name in getattr(config, section).__class__.model_fields
            ),
            None,
        )
        fix = f"use {own}" if own else suggest(name, TRAINER_ARGS)
        findings.append(Finding(key, f"not passed through: {name!r}", fix))
    return findings


def _check_text(config: Config) -> list[Finding]:
    data, findings = config.data, []
    if data.format != "text":
        if data.format != "auto" and data.chosen("long_text"):
            what = f"long_text has no meaning for format {data.format!r}"
            findings.append(Finding("data.long_text", what, "remove it, or set data.truncation"))
        return findings
    if data.template != "auto":
        what = f"template {data.template!r} with format text: text is not prompted"
        findings.append(Finding("data.template", what, "remove it, or use another format"))
    if data.chosen("train_on") and data.train_on != "all":
        what = f"train_on {data.train_on!r} with format text: every token of text carries loss"
        findings.append(Finding("data.train_on", what, "remove it"))
    if data.chosen("truncation"):
        findings.append(
            Finding("data.truncation", "truncation with format text", "use data.long_text: split or truncate")
        )
    return findings


Rule = Callable[[Config], list[Finding]]
RULES: tuple[Rule, ...] = (
    _check_splits,
    _check_precision,
    _check_warmup,
    _check_validation_needs,
    _check_early_stopping_metric,
    _check_best,
    _check_trainer_args,
    _check_text,
)
