"""Rules that span fields and sections.

Owns every rule that needs no file, no library and no hardware; what needs those is checked
where they are met (`data`, `models`), before anything is written.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping

from loralab.config import distributed_checks, lora_checks, metric_checks, output_checks, tracker_checks
from loralab.config.findings import Finding
from loralab.config.other_names import OTHER_NAMES
from loralab.config.schema import Config, DataSource
from loralab.lookup import suggest

# Each entry: why it may be passed through. Everything else either has a key of its own or
# would break what the engine fixes (batching, saving, loss).
TRAINER_ARGS = {
    "adam_beta1": "decay of AdamW's first moment",
    "adam_beta2": "decay of AdamW's second moment",
    "adam_epsilon": "AdamW's denominator term",
    "lr_scheduler_kwargs": "extra arguments of the schedule, such as num_cycles",
}

# What an AdamW term may be; other optimizers have none of them.
ADAM_TERMS = {
    "adam_beta1": (0.0, 1.0, "a number from 0 to below 1"),
    "adam_beta2": (0.0, 1.0, "a number from 0 to below 1"),
    "adam_epsilon": (math.ulp(0.0), math.inf, "a number above 0"),
}

# Optimizers whose moments a GPU may page out, and the same ones without.
UNPAGED = {"paged_adamw_8bit": "adamw_8bit", "paged_adamw_32bit": "adamw_torch"}

# What `lr_scheduler_kwargs` may hold for each schedule; the others take nothing.
SCHEDULE_TERMS: dict[str, dict[str, tuple[float, float, str]]] = {
    "cosine": {"num_cycles": (math.ulp(0.0), math.inf, "a number above 0")},
    "polynomial": {
        "lr_end": (0.0, math.inf, "a learning rate, 0 or more"),
        "power": (math.ulp(0.0), math.inf, "a number above 0"),
    },
    "inverse_sqrt": {"timescale": (math.ulp(0.0), math.inf, "a number of steps above 0")},
}
_POLYNOMIAL_END = 1e-7  # where transformers' polynomial schedule ends by default


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
        elif isinstance(value, str) and _is_number(value):
            what = f"{value!r} is text, because it stands in quotes or has a % sign"
            fix = "write a plain number, such as 0.1 for a tenth of the rows or 100 for a hundred rows"
            findings.append(Finding(key, what, fix))
    return findings


def _is_number(text: str) -> bool:
    try:
        float(text.strip().removesuffix("%"))
    except ValueError:
        return False
    return True


def _check_same_rows(config: Config) -> list[Finding]:
    findings = []
    seen = dict.fromkeys(source_names(config.data.train), "data.train")
    for key, value in (("data.validation", config.data.validation), ("data.test", config.data.test)):
        shared = [name for name in source_names(value) if name in seen]
        if shared:
            what = f"{shared[0]!r} is in {seen[shared[0]]} too: what was measured there would say nothing"
            findings.append(Finding(key, what, "name other rows, or a share of data.train, such as 0.1"))
        seen |= dict.fromkeys(source_names(value), key)
    return findings


def source_names(value: object) -> list[str]:
    """Return the files, globs and ids that a setting names: one, a list, or the paths of sources in a list."""
    each = value if isinstance(value, list) else [value]
    return [name for item in each if isinstance(name := item.path if isinstance(item, DataSource) else item, str)]


def _check_weights(config: Config) -> list[Finding]:
    """Find weights of sources that are never drawn from."""
    return [
        Finding(key, f"weight {source.weight} of {source.path!r}: only training rows are drawn by weight", "remove it")
        for key, value in (("data.validation", config.data.validation), ("data.test", config.data.test))
        for source in (value if isinstance(value, list) else ())
        if isinstance(source, DataSource) and source.chosen("weight")
    ]


def _check_train_on(config: Config) -> list[Finding]:
    roles = config.data.train_on
    if isinstance(roles, str):
        return []
    if not roles:
        return [Finding("data.train_on", "train_on names no role: []", "list roles, or set it to response")]
    twice = [role for role, times in Counter(roles).items() if times > 1]
    return [Finding("data.train_on", f"train_on names {twice[0]!r} twice", "name it once")] if twice else []


def _check_effect(config: Config) -> list[Finding]:
    """Find settings that another one leaves without effect."""
    data, training, evaluation, findings = config.data, config.training, config.evaluation, []
    if training.chosen("save_steps") and training.save_strategy != "steps":
        what = (
            f"save_steps {training.save_steps} with save_strategy {training.save_strategy}, which does not count steps"
        )
        findings.append(Finding("training.save_steps", what, "remove it, or set training.save_strategy: steps"))
    if evaluation.chosen("steps") and evaluation.strategy != "steps":
        what = f"steps {evaluation.steps} with strategy {evaluation.strategy}, which does not count steps"
        findings.append(Finding("evaluation.steps", what, "remove it, or set evaluation.strategy: steps"))
    drawn = any(isinstance(amount, (int, float)) for amount in (data.validation, data.test))
    if data.chosen("split_seed") and (data.split_method == "first" or not drawn):
        why = "split_method first, which draws nothing" if drawn else "no fraction or number of rows to draw"
        fix = "remove it, or set data.split_method: random" if drawn else "remove it, or set data.validation: 0.1"
        findings.append(Finding("data.split_seed", f"split_seed {data.split_seed} with {why}", fix))
    if data.chosen("split_method") and not drawn:
        what = f"split_method {data.split_method} with no fraction or number of rows to take"
        findings.append(Finding("data.split_method", what, "remove it, or set data.validation: 0.1"))
    return findings


def _check_precision(config: Config) -> list[Finding]:
    if config.model.precision == "float16" and config.model.device in ("cpu", "mps"):
        device = "a CPU" if config.model.device == "cpu" else config.model.device
        return [
            Finding(
                "model.precision",
                f"float16 does not train on {device} (its range needs loss scaling, which is offered on CUDA alone)",
                "set model.precision: bfloat16 (same size, wider range) or float32",
            )
        ]
    return []


def _check_quantization(config: Config) -> list[Finding]:
    model, findings = config.model, []
    if model.quantization == "int8" and model.chosen("double_quantization"):
        what = "double_quantization false with quantization int8, whose scales are never quantized"
        findings.append(Finding("model.double_quantization", what, "remove it, or set model.quantization: nf4"))
    if model.quantization != "none" and model.device == "mps":
        what = f"quantization {model.quantization} on mps: it is offered on cuda and cpu"
        findings.append(Finding("model.quantization", what, "set model.quantization: none, or model.device: cpu"))
    return findings


def _check_optimizer(config: Config) -> list[Finding]:
    optim = config.training.optim
    if not optim.startswith("paged_") or config.model.device not in ("cpu", "mps"):
        return []
    what = f"{optim} on {config.model.device}: only the memory of a CUDA device is paged"
    return [Finding("training.optim", what, f"set training.optim: {UNPAGED[optim]}")]


def _check_warmup(config: Config) -> list[Finding]:
    training = config.training
    if training.lr_scheduler_type == "constant" and (training.warmup_ratio > 0 or training.warmup_steps > 0):
        what = "warm-up with lr_scheduler_type constant, which has none"
        return [Finding("training.lr_scheduler_type", what, "set it to constant_with_warmup")]
    if training.warmup_ratio > 0 and training.warmup_steps > 0:
        what = f"warm-up given twice: warmup_ratio {training.warmup_ratio} and warmup_steps {training.warmup_steps}"
        return [Finding("training.warmup_steps", what, "keep one of them")]
    last = training.max_steps
    if last is not None and training.warmup_steps >= last and training.lr_scheduler_type == "polynomial":
        # transformers divides by the steps between the two.
        what = f"warm-up of {training.warmup_steps} steps in a run of {last}: nothing is left for the schedule"
        return [Finding("training.warmup_steps", what, f"set it below {last}, or raise training.max_steps")]
    return []


def _check_validation_needs(config: Config) -> list[Finding]:
    if config.data.validation is not None and config.evaluation.strategy != "no":
        return []
    training, findings = config.training, []
    has = "evaluation.strategy is no" if config.data.validation is not None else "data.validation is null"
    fix = "set data.validation (for example 0.1) and evaluation.strategy: epoch"
    if training.load_best_model_at_end:
        findings.append(Finding("training.load_best_model_at_end", f"there is no evaluation to choose by: {has}", fix))
    watched = metric_checks.watched_metric(training)
    if training.early_stopping is not None and watched != "loss":
        findings.append(Finding(metric_checks.watched_key(training), f"{watched!r} is never measured: {has}", fix))
    if config.evaluation.strategy == "steps" and config.data.validation is None:
        findings.append(Finding("evaluation.strategy", "steps, but data.validation is null", fix))
    return findings


def _check_trainer_args(config: Config) -> list[Finding]:
    findings = []
    for name, value in config.advanced.trainer_args.items():
        key = f"advanced.trainer_args.{name}"
        if name in ADAM_TERMS:
            findings += _check_adam_term(config.training.optim, name, value)
        elif name == "lr_scheduler_kwargs":
            findings += _check_schedule_terms(config, value)
        else:
            own = OTHER_NAMES.get(name) or next(
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


def _check_adam_term(optim: str, name: str, value: object) -> list[Finding]:
    key = f"advanced.trainer_args.{name}"
    if "adamw" not in optim:
        fix = "remove it, or set training.optim: adamw_torch"
        return [Finding(key, f"{name} with optim {optim}, which has no such term", fix)]
    return _check_term(key, value, ADAM_TERMS[name])


def _check_term(key: str, value: object, limits: tuple[float, float, str]) -> list[Finding]:
    low, high, wanted = limits
    # Written so that NaN is refused too.
    if isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value < high:
        return []
    return [Finding(key, f"{key.rpartition('.')[2]} got {value!r}", f"give {wanted}")]


def _check_schedule_terms(config: Config, terms: object) -> list[Finding]:
    key, schedule = "advanced.trainer_args.lr_scheduler_kwargs", config.training.lr_scheduler_type
    if not isinstance(terms, Mapping):
        return [
            Finding(key, f"lr_scheduler_kwargs got {terms!r}", f"give a mapping: {TRAINER_ARGS[key.split('.')[2]]}")
        ]
    findings, known = [], SCHEDULE_TERMS.get(schedule, {})
    for name, value in terms.items():
        if name in known:
            findings += _check_term(f"{key}.{name}", value, known[name])
            continue
        fix = suggest(str(name), known) if known else "remove it, or set another training.lr_scheduler_type"
        findings.append(Finding(f"{key}.{name}", f"the schedule {schedule} takes no {name!r}", fix))
    return findings


def _check_polynomial_end(config: Config) -> list[Finding]:
    training, terms = config.training, config.advanced.trainer_args.get("lr_scheduler_kwargs")
    if training.lr_scheduler_type != "polynomial":
        return []
    end = terms.get("lr_end", _POLYNOMIAL_END) if isinstance(terms, Mapping) else _POLYNOMIAL_END
    if not isinstance(end, (int, float)) or end < training.learning_rate:
        return []
    key = "advanced.trainer_args.lr_scheduler_kwargs.lr_end"
    what = f"the schedule would rise, from learning_rate {training.learning_rate} to lr_end {end}"
    return [Finding(key, what, f"set lr_end below {training.learning_rate}, or raise training.learning_rate")]


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


def _check_layout(config: Config) -> list[Finding]:
    layout, attention = config.training.layout, config.model.attn_implementation
    if layout in ("auto", "padded") or attention == "auto":
        return []
    what = f"layout {layout!r} with attn_implementation {attention!r}, which cannot compute it"
    return [Finding("training.layout", what, "set model.attn_implementation: auto")]


Rule = Callable[[Config], list[Finding]]
RULES: tuple[Rule, ...] = (
    _check_splits,
    _check_same_rows,
    _check_weights,
    _check_train_on,
    _check_effect,
    _check_precision,
    _check_quantization,
    _check_optimizer,
    _check_warmup,
    _check_validation_needs,
    _check_trainer_args,
    _check_polynomial_end,
    _check_text,
    _check_layout,
    *distributed_checks.RULES,
    *lora_checks.RULES,
    *metric_checks.RULES,
    tracker_checks.check_tracker_names,
    *output_checks.RULES,
)
