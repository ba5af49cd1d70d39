"""The model card: `adapter/README.md`, which people read where the adapter is shared.

Owns what is said to strangers: no local path leaves the machine, and every value is escaped for
the YAML front matter, a Markdown table or running text.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from loralab.config.lora_checks import FACTS
from loralab.reports.facts import Facts, dig, dig_table, load_facts
from loralab.reports.group_sections import describe_groups
from loralab.reports.metric_sections import describe_metrics
from loralab.reports.paths import is_absolute, path_name
from loralab.reports.preference_section import describe_preference
from loralab.reports.provenance import describe_data
from loralab.reports.sections import describe_overview, describe_scores
from loralab.reports.usage import ADAPTER_PLACE, describe_usage, reads_pictures
from loralab.reports.verdict import assess
from loralab.reports.wording import format_value
from loralab.run import Json, RunFolder, write_text

TEMPLATE = "model_card.md.jinja"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
ABSOLUTE_PATH = re.compile(r"(?<![\w/.:<>])(?:file:/{2})?(?:~?/|[A-Za-z]:[\\/]|\\\\)[^\s'\"`|<>,;:()\[\]{}]+")
MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]<>#|~$])")
HYPERPARAMETERS = {
    "lora": (
        "variant", "r", "alpha", "dropout", "target_modules", "layers_to_transform", "rank_pattern", "alpha_pattern",
        "modules_to_save", "trainable_token_indices", "loraplus_lr_ratio", "eva_rho", "eva_rows",
    ),
    "training": (
        "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
        "learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps", "weight_decay", "max_grad_norm", "optim",
        "seed",
    ),
    "data": ("max_length", "truncation", "train_on", "split_method", "split_seed"),
    "model": ("precision", "quantization", "base_dropout"),
}  # fmt: skip


class Markdown(str):
    """Text that is Markdown already and is not escaped again."""

    __slots__ = ()


def write_model_card(folder: RunFolder) -> Path:
    """Write the model card of a run's adapter; what the run folder lacks, the card says.

    Raises:
        RunFolderError: a file of the run is there but broken.
    """
    path = folder.adapter / "README.md"
    write_text(path, render_model_card(folder))
    return path


def render_model_card(folder: RunFolder) -> str:
    """Return the text of the card, front matter and all, as far as the run folder knows by now.

    Raises:
        RunFolderError: a file of the run is there but broken.
    """
    facts = load_facts(folder)
    hub_id = find_hub_id(facts)
    front_matter = yaml.safe_dump(_front_matter(facts, hub_id), sort_keys=False, allow_unicode=True)
    body = _environment().get_template(TEMPLATE).render(_card_context(facts, hub_id))
    return f"---\n{front_matter}---\n\n{body}".encode("utf-8", "replace").decode("utf-8")


def find_hub_id(facts: Facts) -> str | None:
    """Return the base model's Hub id, or None for a folder.

    The configuration of a run names folders by their absolute paths; only folders are hashed as a whole.
    """
    name = facts.base_model or ""
    names = (name, str(dig(facts.config, "model", "name") or ""))
    is_folder = any(map(is_absolute, names)) or bool(dig(facts.record, "model", "sha256"))
    return name if HUB_ID.fullmatch(name) and not is_folder else None


def _front_matter(facts: Facts, hub_id: str | None) -> Json:
    base = {"base_model": hub_id, "base_model_relation": "adapter"} if hub_id else {}
    task = "image-text-to-text" if reads_pictures(facts) else "text-generation"
    front = {**base, "library_name": "peft", "pipeline_tag": task, "tags": ["lora", "loralab"]}
    licence, data = base_licence(facts), _hub_data(facts)
    front |= licence
    front |= {"language": languages} if (languages := dig(facts.record, "model", "languages")) else {}
    front |= {"datasets": data} if data else {}
    results = _model_index(facts, task, data)
    return front | ({"model-index": results} if results else {})


def base_licence(facts: Facts) -> Json:
    """Return what the base model's card said of its licence when the run began; empty where it is not known."""
    licence = dig(facts.record, "model", "licence")
    if isinstance(licence, str):  # a record of older runs
        return {"license": licence}
    return licence if isinstance(licence, dict) else {}


def licence_name(fields: Mapping[str, Any]) -> str | None:
    """Return what a licence is called; where the Hub knows it only as "other", by its own name."""
    licence = fields.get("license")
    if licence == "other":
        licence = fields.get("license_name") or licence
    return ", ".join(licence) if isinstance(licence, list) else licence


def _hub_data(facts: Facts) -> list[str]:
    pins = dig(facts.record, "revisions", "data") or []
    return list(dict.fromkeys(str(pin["name"]) for pin in pins))


def _model_index(facts: Facts, task: str, data: list[str]) -> list[Json]:
    """Return the figures in the form that the Hub's leaderboards read; they need data of the Hub."""
    evaluation, split = facts.evaluation, facts.evaluation.get("split")
    if not data or "eval_loss" not in evaluation:
        return []
    figures = [("loss", "Loss, nats per token", evaluation["eval_loss"])]
    for name, figure in dig_table(evaluation, "metrics").items():
        low, high = dig(figure, "low"), dig(figure, "high")
        around = f" ({low:.4g} to {high:.4g})" if isinstance(low, float) and isinstance(high, float) else ""
        figures.append((name, f"{name}{around}", dig(figure, "value")))
    metrics = [{"type": kind, "name": shown, "value": value} for kind, shown, value in figures if value is not None]
    dataset = {"type": data[0], "name": data[0], **({"split": str(split)} if split else {})}
    result = {"task": {"type": task}, "dataset": dataset, "metrics": metrics}
    return [{"name": path_name(facts.name), "results": [result]}]


def _card_context(facts: Facts, hub_id: str | None) -> dict[str, Any]:
    base = hub_id or path_name(facts.base_model or "base model")
    data = _without_paths(describe_data(facts), keep=("text", "stop_rows"))
    return {
        "name": path_name(facts.name),
        "base": base,
        "on_hub": hub_id is not None,
        "licence": licence_name(base_licence(facts)),
        "revision": dig(facts.record, "model", "revision") if hub_id else None,
        "base_sha256": dig(facts.record, "model", "sha256"),
        "overview": [(name, base if name == "Base model" else value) for name, value in describe_overview(facts)],
        "status": str(facts.record.get("status") or "unknown"),
        "verdict": assess(facts),
        "scores": _without_paths(describe_scores(facts)),
        "metrics": _without_paths(describe_metrics(facts)),
        "data": data,
        "hyperparameters": _without_paths(list(_hyperparameters(facts))),
        "reads_pictures": reads_pictures(facts),
        "groups": _without_paths(describe_groups(facts)),
        "preference": describe_preference(facts),
        "usage": describe_usage(
            facts,
            base=base if hub_id else f"path/to/{base}",
            revision=dig(facts.record, "model", "revision") if hub_id else None,
            run=ADAPTER_PLACE,
            adapter=ADAPTER_PLACE,
            names_base=hub_id is None,
        ),
        "versions": _versions(facts),
        "adapter_sha256": facts.record.get("adapter_sha256"),
    }


def _versions(facts: Facts) -> list[tuple[str, str]]:
    own = facts.record.get("loralab_version")
    versions = {**({"loralab": own} if own else {}), **dig_table(facts.record, "versions")}
    return [(name, str(value)) for name, value in versions.items()]


def _hyperparameters(facts: Facts) -> Iterator[tuple[str, str]]:
    """Yield the settings that shape the adapter, with what "auto" became; of the adapter's, those that act."""
    variant = FACTS.get(str(dig(facts.config, "lora", "variant")), FACTS["lora"])
    for section, fields in HYPERPARAMETERS.items():
        for field in fields:
            if section == "lora" and field != "variant" and field not in variant.keys:
                continue
            value = dig(facts.config, section, field)
            if value == "auto":
                value = dig(facts.record, "resolved", field, "value") or value
            if value is not None:
                yield f"{section}.{field}", format_value(value)


def _without_paths(value: Any, *, keep: tuple[str, ...] = ()) -> Any:
    """Return `value` with every absolute path in its texts cut to its last part, but under the keys `keep`."""
    if isinstance(value, str):
        return (
            path_name(value) if is_absolute(value) else ABSOLUTE_PATH.sub(lambda match: path_name(match.group()), value)
        )
    if isinstance(value, dict):
        return {key: child if key in keep else _without_paths(child, keep=keep) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(child, keep=keep) for child in value]
    return value


def escape_markdown(value: Any) -> str:
    """Return a value as text that Markdown shows literally, in one line; `Markdown` stays as it is."""
    if isinstance(value, Markdown):
        return value
    line = " ".join(str(value).split()).replace("&", "&amp;")
    return MARKDOWN_SPECIAL.sub(r"\\\1", line)


def code(value: Any) -> Markdown:
    """Return a value as inline code, outside tables."""
    text = " ".join(str(value).split()) or " "
    fence = "`" * (_longest_run(text) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return Markdown(f"{fence}{pad}{text}{pad}{fence}")


def code_cell(value: Any) -> Markdown:
    """Return a value as inline code in a table, where a bar ends the cell even inside code."""
    return Markdown(code(value).replace("|", "\\|"))


def code_block(value: Any, language: str = "") -> Markdown:
    """Return a value as a fenced block that the value cannot close."""
    fence = "`" * max(3, _longest_run(str(value)) + 1)
    return Markdown(f"{fence}{language}\n{str(value).rstrip()}\n{fence}")


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("loralab", "reports"),
        undefined=StrictUndefined,
        # No HTML: `finalize` escapes every value that the template writes for Markdown.
        autoescape=False,  # noqa: S701
        finalize=escape_markdown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(code=code, code_cell=code_cell, code_block=code_block)
    return environment
