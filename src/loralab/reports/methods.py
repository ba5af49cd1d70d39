"""The methods paragraph of a run, with its true numbers, and BibTeX of what was used.

Owns what a paper would say. Nothing is said that the run's files do not hold.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from loralab.config.lora_checks import FACTS as VARIANT_FACTS
from loralab.config.metric_facts import FACTS as METRIC_FACTS
from loralab.config.metric_facts import owner_of
from loralab.reports.citations import ENTRIES, cite_loralab
from loralab.reports.curves import watched_figure
from loralab.reports.facts import (
    Facts,
    dig,
    dig_list,
    dig_number,
    dig_table,
    early_end,
    load_facts,
    own_parameters,
)
from loralab.reports.paths import is_absolute, path_name
from loralab.reports.wording import (
    format_bytes,
    format_count,
    format_interval,
    format_loss,
    format_measured,
    format_number,
    format_seconds,
    format_share,
    format_value,
)
from loralab.run import RunFolder

VARIANTS = {
    "lora": "LoRA",
    "rslora": "rank-stabilized LoRA (rsLoRA)",
    "dora": "DoRA",
    "lora_plus": "LoRA+",
    "pissa": "LoRA begun by PiSSA",
    "olora": "LoRA begun by OLoRA",
    "eva": "LoRA begun by EVA",
    "loftq": "LoRA begun by LoftQ",
    "vera": "VeRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "ia3": "IA3",
}
VARIANT_CITATIONS = {
    "lora": ("lora",),
    "vera": ("vera",),
    "loha": ("loha", "lycoris"),
    "lokr": ("lycoris",),
    "ia3": ("ia3",),
}
OPTIMIZERS = {
    "adamw_torch": ("AdamW", ("adamw",)),
    "adamw_torch_fused": ("AdamW", ("adamw",)),
    "sgd": ("SGD", ()),
    "adafactor": ("Adafactor", ("adafactor",)),
    "adamw_8bit": ("AdamW with 8-bit moments", ("adamw", "adamw_8bit")),
    "adamw_bnb_8bit": ("AdamW with 8-bit moments", ("adamw", "adamw_8bit")),
    "paged_adamw_8bit": ("paged AdamW with 8-bit moments", ("adamw", "adamw_8bit", "qlora")),
    "paged_adamw_32bit": ("paged AdamW", ("adamw", "qlora")),
}
METRIC_CITATIONS = {
    "calibration": ("calibration", "brier"),
    "rouge": ("rouge",),
    "bleu": ("bleu", "sacrebleu"),
    "chrf": ("chrf", "sacrebleu"),
}
ANSWERS = {
    "generate": "Answers were generated without sampling",
    "score": "Answers were the most likely of the closed labels, scored and not generated",
    "teacher_forced": "Answers were the most likely token behind each of the reference's own tokens (teacher forcing, "
    "which flatters)",
}
# Of the adapter's settings, those that are told where they are set.
OTHER_KEYS = (
    "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "loraplus_lr_ratio", "eva_rho",
)  # fmt: skip
LIBRARIES = ("torch", "transformers", "peft")


@dataclass(frozen=True, slots=True)
class Methods:
    """Texts for a paper.

    Attributes:
        text: a paragraph.
        bibtex: entries, an empty line between two.
    """

    text: str
    bibtex: str


def describe_methods(folder: RunFolder) -> Methods:
    """Return the methods paragraph of a run and BibTeX of what it used.

    Raises:
        RunFolderError: a file of the run is there but broken.
    """
    facts = load_facts(folder)
    sentences = [*_base(facts), *_data(facts), *_training(facts), *_machine(facts), *_evaluation(facts)]
    text = " ".join(sentences).replace("\u00a0", " ").replace("\u2019", "'")
    entries = [ENTRIES[name] for name in dict.fromkeys(_cited(facts))]
    return Methods(text, "\n\n".join([*entries, cite_loralab(str(facts.record.get("loralab_version") or ""))]))


def _listed(parts: list[str]) -> str:
    known = [part for part in parts if part]
    return f" ({', '.join(known)})" if known else ""


def _counted(value: float | None, what: str) -> str:
    """Return `12 rows`, `1 row`; empty where the number is not known."""
    if value is None:
        return ""
    return f"{format_count(value)} {what}{'' if value == 1 else 's'}"


def _base(facts: Facts) -> Iterator[str]:
    model, lora = dig_table(facts.record, "model"), dig_table(facts.config, "lora")
    name = facts.base_model
    if name is None:
        return
    revision, sha256 = model.get("revision"), model.get("sha256")
    about = [
        f"revision {revision}" if revision else "",
        f"SHA-256 {str(sha256)[:16]}" if sha256 else "",
        str(model.get("architecture") or ""),
        _counted(own_parameters(facts), "parameter"),
    ]
    variant = str(lora.get("variant") or "")
    adapter = VARIANTS.get(variant, variant or "an adapter")
    trained = dig_number(model, "trainable_parameters")
    share = format_share(trained, dig_number(model, "parameters"))
    yield (
        f"We fine-tuned {path_name(name) if sha256 or is_absolute(name) else name}{_listed(about)} with "
        f"{adapter}{_listed(_adapter_settings(facts, variant))}"
        + (f"; {_counted(trained, 'parameter')}{f' ({share} of all)' if share else ''} were trained" if trained else "")
        + "."
    )
    quantization = dig(facts.config, "model", "quantization")
    if quantization and quantization != "none":
        double = quantization in ("nf4", "fp4") and dig(facts.config, "model", "double_quantization") is True
        yield (
            f"The weights of the frozen linear layers were held in {quantization}"
            f"{' with double quantization' if double else ''}."
        )


def _adapter_settings(facts: Facts, variant: str) -> list[str]:
    lora, keys = (
        dig_table(facts.config, "lora"),
        VARIANT_FACTS[variant].keys if variant in VARIANT_FACTS else frozenset(),
    )
    rank, alpha, dropout = (dig_number(lora, key) if key in keys else None for key in ("r", "alpha", "dropout"))
    targets = dig(facts.record, "resolved", "target_modules", "value")
    layers = lora.get("layers_to_transform")
    return [
        f"rank {format_number(rank)}" if rank is not None else "",
        f"alpha {format_number(alpha)}" if alpha is not None else "",
        f"dropout {format_number(dropout)}" if dropout is not None else "",
        f"on {targets}" if targets else "",
        f"in layers {', '.join(map(str, layers))}" if isinstance(layers, list) else "",
        *(f"{key} {format_value(lora[key])}" for key in OTHER_KEYS if key in keys and lora.get(key)),
    ]


def _data(facts: Facts) -> Iterator[str]:
    splits = dig_table(facts.data, "splits")
    rows = _counted(dig_number(splits, "train", "rows_kept"), "row")
    if not rows:
        return
    tokens, supervised = (dig_number(splits, "train", key) for key in ("total_tokens", "supervised_tokens"))
    files = _file_names(facts, "train")
    # Without a configuration all that is known are the files of all splits.
    files = files or [path_name(str(dig(source, "name") or source)) for source in dig_list(facts.data, "sources")]
    counts = _listed(
        [_counted(tokens, "token"), f"{format_count(supervised)} of them supervised" if supervised else ""]
    )
    others = [
        f"{_counted(dig_number(splits, name, 'rows_kept'), 'row')}{_of(_file_names(facts, name))} for {name}"
        for name in splits
        if name != "train" and dig_number(splits, name, "rows_kept") is not None
    ]
    yield (f"The training data were {rows}{counts}{_of(files)}{', with ' + ' and '.join(others) if others else ''}.")
    template = dig(facts.data, "template", "name")
    length = dig_number(facts.config, "data", "max_length")
    form = [
        f"prompts were rendered by the template {path_name(str(template))}" if template else "",
        f"examples have at most {format_count(length)} tokens" if length is not None else "",
    ]
    if any(form):
        told = " and ".join(part for part in form if part)
        yield f"{told[:1].upper()}{told[1:]}."


def _file_names(facts: Facts, split: str) -> list[str]:
    """Return the files that a split was read from; none where it is a part of the training data."""
    entries = [dig(entry, "path") or entry for entry in dig_list(facts.config, "data", split)]
    return [path_name(entry) for entry in entries if isinstance(entry, str) and entry]


def _of(files: list[str]) -> str:
    return f" of {', '.join(files)}" if files else ""


def _training(facts: Facts) -> Iterator[str]:
    training = dig_table(facts.config, "training")
    steps, epochs = dig_number(facts.record, "steps"), dig_number(facts.record, "epochs")
    if steps is None:
        return
    rows, micro = (dig_number(training, key) for key in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    processes = dig_number(facts.record, "processes") or 1
    batch = ""
    if rows is not None and micro is not None:
        by = [
            f"{format_count(rows)} per device",
            _counted(micro, "accumulation step") if micro > 1 else "",
            f"{format_count(processes)} processes" if processes > 1 else "",
        ]
        inner = " x ".join(part for part in by if part)
        batch = f" of {_counted(rows * micro * processes, 'row')}" + (f" ({inner})" if any(by[1:]) else "")
    about = f" ({format_number(epochs)} epochs)" if epochs is not None else ""
    yield f"Training took {_counted(steps, 'optimizer step')}{batch}{about}{_optimizer(facts)}."
    yield from _ending(facts)


def _optimizer(facts: Facts) -> str:
    training = dig_table(facts.config, "training")
    optim, schedule = training.get("optim"), training.get("lr_scheduler_type")
    rate, ratio, warmup, decay, norm = (
        dig_number(training, key)
        for key in ("learning_rate", "warmup_ratio", "warmup_steps", "weight_decay", "max_grad_norm")
    )
    precision = dig(facts.record, "resolved", "precision", "value")
    seed = dig_number(facts.record, "seeds", "training")
    parts = [
        f"with {OPTIMIZERS.get(str(optim), (str(optim), ()))[0]}" if optim else "",
        f"a peak learning rate of {format_number(rate)}" if rate is not None else "",
        f"a {str(schedule).replace('_', ' ')} schedule" if schedule else "",
        f"warm-up over {format_number(100 * ratio)} % of the steps" if ratio else "",
        f"warm-up over {_counted(warmup, 'step')}" if warmup else "",
        f"weight decay {format_number(decay)}" if decay is not None else "",
        f"gradients clipped to norm {format_number(norm)}" if norm else "",
        f"seed {seed:.0f}" if seed is not None else "",
        f"in {precision}" if precision else "",
    ]
    return "".join(f", {part}" if place else f" {part}" for place, part in enumerate(filter(None, parts)))


def _ending(facts: Facts) -> Iterator[str]:
    status, why = facts.record.get("status"), early_end(facts)
    if status and status != "completed":
        yield f"The run did not complete: its status is {status}{f' ({why})' if why else ''}."
    elif why:
        yield f"It ended before its last step ({why})."
    watched = watched_figure(facts)
    if dig(facts.config, "training", "load_best_model_at_end") is True and watched:
        yield f"The adapter of the best evaluation by {watched} was kept."


def _machine(facts: Facts) -> Iterator[str]:
    hardware = dig_table(facts.record, "hardware")
    device = hardware.get("gpu") or hardware.get("processor") or hardware.get("device")
    seconds = format_seconds(dig_number(facts.record, "train_seconds"))
    peak = dig_number(facts.record, "peak_memory_bytes")
    versions = dig_table(facts.record, "versions")
    own = facts.record.get("loralab_version")
    if device:
        took = f" for {seconds}" if dig_number(facts.record, "train_seconds") is not None else ""
        most = f", with at most {format_bytes(peak)} of memory" if peak is not None else ""
        yield f"It ran on {device}{took}{most}."
    named = [f"loralab {own}" if own else "", *(f"{name} {versions[name]}" for name in LIBRARIES if versions.get(name))]
    if any(named):
        yield f"Software: {', '.join(part for part in named if part)}."


def _evaluation(facts: Facts) -> Iterator[str]:
    evaluation = facts.evaluation
    loss, base = dig_number(evaluation, "eval_loss"), dig_number(evaluation, "base", "eval_loss")
    if loss is None:
        return
    rows = _counted(dig_number(evaluation, "num_examples"), "row")
    split = evaluation.get("split")
    tokens = dig_number(evaluation, "supervised_tokens")
    where = f"On the {split} split" if split else "On the evaluated rows"
    counts = _listed([rows, _counted(tokens, "supervised token")])
    told = f"{where}{counts} the loss was {format_loss(loss)} nats per token"
    if base is not None:
        difference = dig_table(evaluation, "difference")
        told += f" with the adapter and {format_loss(base)} without it{_difference(difference)}"
        told += f": {difference['verdict']}" if difference.get("verdict") else ""
    yield f"{told}."
    yield from _figures(facts)


def _difference(difference: dict[str, object], key: str = "eval_loss") -> str:
    value, low, high = (dig_number(difference, each) for each in (key, "low", "high"))
    if value is None:
        return ""
    level = 100 * (dig_number(difference, "level") or 0.95)
    method = difference.get("method")
    inner = [f"difference {format_measured(value, low, high, signed=True)}"]
    interval = format_interval(low, high, signed=True)
    inner += [f"{level:.4g} % interval {interval}"] if interval else []
    inner += [str(method)] if method and key == "eval_loss" else []
    return f" ({', '.join(inner)})"


def _figures(facts: Facts) -> Iterator[str]:
    evaluation = facts.evaluation
    measured, way = dig_table(evaluation, "metrics"), evaluation.get("answered_by")
    if way in ANSWERS:
        answered = _counted(dig_number(evaluation, "answered_rows"), "row")
        limit = dig_number(facts.config, "evaluation", "max_new_tokens") if way == "generate" else None
        most = f"at most {_counted(limit, 'token')} each" if limit is not None else ""
        yield f"{ANSWERS[str(way)]}{_listed([answered, most])}."
    for name in measured:
        owner = owner_of(name)
        value = dig_number(measured, name, "value")
        if value is None or (owner is not None and name not in METRIC_FACTS[owner].headline):
            continue
        told = f"{name} was {_measured(dig_table(measured, name))} with the adapter"
        without = dig_table(evaluation, "base", "metrics", name)
        if dig_number(without, "value") is not None:
            difference = dig_table(evaluation, "differences", name)
            told += f" and {_measured(without)} without it{_difference(difference, 'value')}"
            told += f": {difference['verdict']}" if difference.get("verdict") else ""
        yield f"{told}."


def _measured(figure: dict[str, object]) -> str:
    value, low, high = (dig_number(figure, key) for key in ("value", "low", "high"))
    interval = format_interval(low, high)
    level = 100 * (dig_number(figure, "level") or 0.95)
    return format_measured(value, low, high) + (f" ({level:.4g} % interval {interval})" if interval else "")


def _cited(facts: Facts) -> Iterator[str]:
    variant = format_value(dig(facts.config, "lora", "variant") or "")
    if variant in VARIANTS:
        yield from VARIANT_CITATIONS.get(variant, ("lora", variant))
    quantization = dig(facts.config, "model", "quantization")
    if quantization in ("nf4", "fp4"):
        yield "qlora"
    elif quantization == "int8":
        yield "int8"
    yield from OPTIMIZERS.get(str(dig(facts.config, "training", "optim")), ("", ()))[1]
    yield from (name for name in LIBRARIES if dig(facts.record, "versions", name))
    measured = dig_table(facts.evaluation, "metrics")
    for name in measured:
        yield from METRIC_CITATIONS.get(owner_of(name) or "", ())
    methods = [str(dig(figure, "method")) for figure in (*measured.values(), dig(facts.evaluation, "difference"))]
    if any("bootstrap" in method for method in methods):
        yield "bootstrap"
    if any("Wilson" in method for method in methods):
        yield "wilson"
    if any(dig(each, "mcnemar") for each in dig_table(facts.evaluation, "differences").values()):
        yield "mcnemar"
