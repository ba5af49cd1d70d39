"""Base against adapter on a split: losses in pairs, and answers side by side.

Owns what `evaluation.json` and `samples.json` hold, and the `eval` command.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loralab.config.paths import local_path
from loralab.config.schema import Config, DataConfig, EvaluationConfig
from loralab.data.dataset import PreparedData, prepare_data
from loralab.data.prompts.prompter import Prompter
from loralab.data.tokens.store import TokenStore
from loralab.errors import DataError
from loralab.evaluation.generate import GenerationSettings, generate_answers
from loralab.evaluation.perplexity import SplitLoss, compare_losses, measure_loss
from loralab.layout.planner import Planner
from loralab.lookup import suggest
from loralab.models.load import check_length, max_positions
from loralab.models.precision import Resolved
from loralab.models.supervised import SupervisedPeftModel
from loralab.progress import Reporter
from loralab.run import read_json, write_json
from loralab.training.distributed import ALONE, Processes
from loralab.workflows.session import Session, Target, load_adapter_tokenizer, open_session
from loralab.workflows.step_layout import resolve_planner

# What overrides can change here; `data` is what rows become, wherever they come from.
_READ = (
    "model",
    "data",
    "training.layout",
    "training.token_budget",
    "evaluation.batch_size",
    "evaluation.bootstrap_samples",
)
_OWN_ROWS = ("data.train", "data.validation", "data.test", "data.split_method", "data.split_seed")
# Text rows have no prompt of their own: their samples continue this many tokens.
_TEXT_PROMPT_TOKENS = 32


def resolve_split(setting: str, splits: Mapping[str, TokenStore]) -> str | None:
    """Return the split of the final evaluation: the one set, else test, else validation, else None.

    Raises:
        DataError: the split that was set does not exist.
    """
    if setting != "auto":
        if setting in splits:
            return setting
        raise DataError(f"no such split: {setting!r}", where="key evaluation.split", fix=suggest(setting, splits))
    return next((name for name in ("test", "validation") if name in splits), None)


def resolve_evaluation(config: Config) -> dict[str, Resolved[Any]]:
    """Choose when the validation loss is measured while training."""
    if config.data.validation is None:
        return {"evaluation_strategy": Resolved("no", "data.validation is null")}
    return {"evaluation_strategy": Resolved(config.evaluation.strategy, "set in evaluation.strategy or by default")}


def evaluate_split(
    model: SupervisedPeftModel,
    split: TokenStore,
    *,
    planner: Planner,
    name: str,
    evaluation: EvaluationConfig,
    max_length: int,
    device: torch.device,
    reporter: Reporter,
    should_stop: Callable[[], bool] = lambda: False,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """Measure adapter and base on the same examples and compare them in pairs.

    Returns:
        The content of `evaluation.json`.

    Raises:
        Interrupted: `should_stop` answered yes before a batch.
    """
    shared = {"split": name, "batch_size": evaluation.batch_size, "max_length": max_length}

    def measure(label: str) -> SplitLoss:
        return measure_loss(
            model,
            split,
            planner=planner,
            batch_size=evaluation.batch_size,
            device=device,
            reporter=reporter,
            label=label,
            should_stop=should_stop,
            processes=processes,
        )

    adapter = measure("evaluate adapter")
    with model.disable_adapter():
        base = measure("evaluate base")
    difference = compare_losses(adapter, base, resamples=evaluation.bootstrap_samples)
    reporter.say(
        f"{name}: loss {base.loss:.4f} -> {adapter.loss:.4f}, "
        f"perplexity {base.perplexity:.2f} -> {adapter.perplexity:.2f}"
    )
    return {**adapter.as_dict(), **shared, "base": {**base.as_dict(), **shared}, "difference": difference}


def answer_samples(
    model: SupervisedPeftModel,
    split: TokenStore,
    *,
    prompter: Prompter,
    evaluation: EvaluationConfig,
    reporter: Reporter,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Let base and adapter answer the first prompts of a split.

    Returns:
        For each prompt `prompt`, `reference`, both outputs and whether each ended by a stop token.

    Raises:
        Interrupted: `should_stop` answered yes before a batch.
    """
    pairs = [_prompt_and_reference(split, index) for index in range(min(evaluation.num_samples, len(split)))]
    prompts = [prompt for prompt, _ in pairs]
    settings = GenerationSettings(max_new_tokens=evaluation.max_new_tokens)

    def answer(label: str) -> list[Any]:
        return generate_answers(
            model,
            prompts,
            prompter=prompter,
            settings=settings,
            batch_size=evaluation.batch_size,
            reporter=reporter,
            label=label,
            should_stop=should_stop,
        )

    adapter = answer("answer with adapter")
    with model.disable_adapter():
        base = answer("answer without")
    return [
        {
            "prompt": prompter.decode(prompt),
            "reference": prompter.decode(reference),
            "base_output": b.text,
            "adapter_output": a.text,
            "base_stopped": b.stopped,
            "adapter_stopped": a.stopped,
        }
        for (prompt, reference), a, b in zip(pairs, adapter, base, strict=True)
    ]


def stop_shares(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the share of each side's answers that ended by a stop token and not by the length limit, 0 to 1."""
    return {
        side: sum(bool(s[f"{side}_stopped"]) for s in samples) / max(len(samples), 1) for side in ("base", "adapter")
    }


def _prompt_and_reference(split: TokenStore, index: int) -> tuple[list[int], list[int]]:
    branch = split[index].branches[0]
    prompt, answer = branch.prompt_ids.tolist(), branch.answer_ids.tolist()
    if len(prompt) > 1:
        return prompt, answer
    whole = prompt + answer
    cut = min(_TEXT_PROMPT_TOKENS, max(len(whole) // 2, 1))
    return whole[:cut], whole[cut:]


def evaluate(
    path: Path,
    *,
    overrides: Sequence[str] = (),
    base_model: str | None = None,
    data: str | None = None,
    data_split: str | None = None,
    reporter: Reporter,
) -> dict[str, Any]:
    """Evaluate an adapter: on its run's own split, or on other data.

    Args:
        path: run folder or adapter folder; the adapter need not come from loralab.
        overrides: `section.key=value` on top of the run's configuration.
        base_model: base to use instead of the recorded one.
        data: file, folder or Hub id to evaluate on.
        data_split: name of the split of `data`; of a plain file, which has none, all rows count.
        reporter: told of progress.

    Returns:
        The content of `evaluation.json`.

    Raises:
        UserError: adapter, base or data cannot be used.
    """
    reads = [*_READ, *(() if data is not None else ("evaluation.split",))]
    session = open_session(
        path,
        overrides=overrides,
        base_model=base_model,
        reporter=reporter,
        reads=reads,
        ignores=() if data is None else _OWN_ROWS,
    )
    name, split, max_length = _find_split(session, data, data_split, reporter)
    planner, choices = resolve_planner(session.model, session.config, max_length=max_length, device=session.device)
    budget = read_json(session.target.folder.record).get("token_budget", {}) if session.target.folder else {}
    if "value" in budget and not any(text.startswith("training.token_budget=") for text in overrides):
        planner = planner.with_budget(int(budget["value"]))  # the run's own cuts: the last bits are the same
    layout = choices["layout"]
    reporter.say(f"layout {layout.value} ({layout.reason})")
    result = evaluate_split(
        session.model,
        split,
        planner=planner,
        name=name,
        evaluation=session.config.evaluation,
        max_length=max_length,
        device=session.device,
        reporter=reporter,
    )
    folder = session.target.folder
    split_chosen = any(text.startswith("evaluation.split=") for text in overrides)
    # `evaluation.json` is what the run itself measured; other settings do not replace it.
    if folder is not None and data is None and base_model is None and (split_chosen or not overrides):
        write_json(folder.path / f"evaluation-{name}.json" if split_chosen else folder.evaluation, result)
    return result


def _find_split(
    session: Session, data: str | None, data_split: str | None, reporter: Reporter
) -> tuple[str, TokenStore, int]:
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
        return name, prepared.splits["train"], section.max_length
    prepared = prepare_data(section, tokenizer, reporter=reporter, template=template)
    chosen = resolve_split(wanted, prepared.splits)
    if chosen is None:
        raise DataError(
            "the run has no validation or test split",
            where=str(session.target.adapter),
            fix="name data with --data FILE, or evaluate the training rows with --split train",
        )
    _check_same_data(session.target, prepared)
    return chosen, prepared.splits[chosen], section.max_length


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
