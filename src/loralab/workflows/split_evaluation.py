"""Base against adapter on one split: losses, task metrics, and answers side by side.

Owns what `evaluation.json`, `predictions.jsonl` and `samples.json` hold; `train` and `eval` share it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loralab.config.schema import Config, EvaluationConfig
from loralab.data.prompts.prompter import Prompter
from loralab.data.tokens.store import TokenStore
from loralab.errors import DataError
from loralab.evaluation.generate import Answer, GenerationSettings, generate_answers
from loralab.evaluation.perplexity import SplitLoss, compare_losses, measure_loss
from loralab.evaluation.teacher_forced import WHY_IT_FLATTERS
from loralab.layout.planner import Planner
from loralab.lookup import suggest
from loralab.models.precision import Resolved
from loralab.models.supervised import SupervisedPeftModel
from loralab.progress import Reporter
from loralab.training.distributed import ALONE, Processes
from loralab.workflows.blank_pictures import describe_blind, without_sight
from loralab.workflows.task import Task
from loralab.workflows.task_meter import Measured, TaskMeter, compare_groups, compare_sides
from loralab.workflows.thumbnails import images_of

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


def measured_splits(config: Config, splits: Mapping[str, TokenStore]) -> dict[str, TokenStore]:
    """Return the splits that a run measures: while training, and at its end.

    Raises:
        DataError: the split that was set does not exist.
    """
    while_training = ["validation"] if "validation" in splits and config.evaluation.strategy != "no" else []
    last = resolve_split(config.evaluation.split, splits)
    return {name: splits[name] for name in dict.fromkeys([*while_training, *([last] if last is not None else [])])}


@dataclass(frozen=True, slots=True)
class SplitEvaluation:
    """Both sides, measured on a split.

    Attributes:
        content: what `evaluation.json` holds.
        adapter: task metrics with the adapter, or None where nothing but the loss is measured.
        base: those without.
    """

    content: dict[str, Any]
    adapter: Measured | None
    base: Measured | None

    def predictions(self) -> Iterator[dict[str, Any]]:
        """Yield a record for each question: prompt, reference, and what both sides made of it."""
        if self.adapter is None or self.base is None:
            return
        scores = [side.scores for side in (self.adapter, self.base)]
        for index, (mine, theirs) in enumerate(zip(self.adapter.answers, self.base.answers, strict=True)):
            question = mine.question
            record: dict[str, Any] = {
                "row": question.row,
                "source": question.source,
                "prompt": question.prompt,
                "reference": question.reference,
                "answered_by": self.adapter.way,
                **images_of(question.images),
            }
            for side, answered, figures in zip(("adapter", "base"), (mine, theirs), scores, strict=True):
                record[side] = {"answer": answered.text} | (
                    {"stopped": answered.stopped, "tokens": len(answered.ids)} if answered.stopped is not None else {}
                )
                if answered.label_scores is not None:
                    record[side]["label_scores"] = dict(answered.label_scores)
                record[side]["scores"] = {name: values[index] for name, values in figures.items()}
            yield record


def evaluate_split(
    model: SupervisedPeftModel,
    split: TokenStore,
    *,
    task: Task,
    prompter: Prompter,
    planner: Planner,
    name: str,
    evaluation: EvaluationConfig,
    max_length: int,
    device: torch.device,
    reporter: Reporter,
    should_stop: Callable[[], bool] = lambda: False,
    processes: Processes = ALONE,
    blank_images: bool = False,
) -> SplitEvaluation:
    """Measure adapter and base on the same examples and compare them in pairs.

    With `blank_images`, the adapter is measured once more, with every picture grey.

    Raises:
        Interrupted: `should_stop` answered yes before a batch.
    """
    shared = {"split": name, "batch_size": evaluation.batch_size, "max_length": max_length}
    meter = TaskMeter(
        task,
        model,
        split,
        limit=None,
        prompter=prompter,
        evaluation=evaluation,
        device=device,
        reporter=reporter,
        should_stop=should_stop,
        processes=processes,
    )

    def measure(who: str, asking: Prompter = prompter, planner: Planner = planner) -> tuple[SplitLoss, Measured | None]:
        losses = measure_loss(
            model,
            split,
            planner=planner,
            batch_size=evaluation.batch_size,
            device=device,
            reporter=reporter,
            label=f"evaluate {who}",
            should_stop=should_stop,
            processes=processes,
        )
        found = meter.measure(losses, planner, label=f"of the {who}", prompter=asking) if task.metrics else None
        return losses, found

    (adapter, with_adapter), (base, without) = measure("adapter"), _without_adapter(model, measure)
    reporter.say(f"{name}: {_describe_losses(base, adapter)}")
    resamples = evaluation.bootstrap_samples
    content = {**adapter.as_dict(), **shared, "base": {**base.as_dict(), **shared}}
    content["difference"] = compare_losses(adapter, base, resamples=resamples)
    if with_adapter is not None and without is not None:
        content["base"] |= without.as_dict()
        content |= _compare_answers(task, with_adapter, without, split=name, resamples=resamples)
        _tell_headline(task, with_adapter, without, content, say=reporter.say)
    if blank_images:
        blind = measure("adapter with grey pictures", *without_sight(prompter, planner))
        content["blank_images"] = describe_blind((adapter, with_adapter), blind, resamples=resamples)
    return SplitEvaluation(content, with_adapter, without)


def _compare_answers(task: Task, adapter: Measured, base: Measured, *, split: str, resamples: int) -> dict[str, Any]:
    """Return what `evaluation.json` holds of the adapter's task metrics, against the base's."""
    content = {**adapter.as_dict(), "differences": compare_sides(adapter, base, resamples=resamples)}
    if task.groups is not None:
        content["groups"] = compare_groups(task.groups, adapter, base, split=split, resamples=resamples)
    if task.way == "teacher_forced":
        content["note"] = WHY_IT_FLATTERS
    return content


def _describe_losses(base: SplitLoss, adapter: SplitLoss) -> str:
    perplexities = f"perplexity {base.perplexity:.2f} -> {adapter.perplexity:.2f}"
    return f"loss {base.loss:.4f} -> {adapter.loss:.4f}, {perplexities}"


def _tell_headline(
    task: Task, adapter: Measured, base: Measured, content: Mapping[str, Any], *, say: Callable[[str], None]
) -> None:
    differences = content["differences"]
    for figure in filter(differences.__contains__, task.headline):
        values = f"{base.values[figure]:.4f} -> {adapter.values[figure]:.4f}"
        say(f"{content['split']}: {figure} {values}: {differences[figure]['verdict']}")


def _without_adapter(
    model: SupervisedPeftModel, measure: Callable[[str], tuple[SplitLoss, Measured | None]]
) -> tuple[SplitLoss, Measured | None]:
    with model.disable_adapter():
        return measure("base")


def answer_samples(
    model: SupervisedPeftModel,
    split: TokenStore,
    *,
    prompter: Prompter,
    evaluation: EvaluationConfig,
    reporter: Reporter,
    should_stop: Callable[[], bool] = lambda: False,
    processes: Processes = ALONE,
) -> list[dict[str, Any]]:
    """Let base and adapter answer the first prompts of a split.

    Returns:
        For each prompt `prompt`, `images` where it has any, `reference`, both outputs and whether each ended by a
        stop token.

    Raises:
        Interrupted: `should_stop` answered yes before a batch.
    """
    count = min(evaluation.num_samples, len(split))
    pairs = [_prompt_and_reference(split, index) for index in range(count)]
    prompts = [prompt for prompt, _ in pairs]
    images = [split[index].branches[0].images for index in range(count)]
    settings = GenerationSettings(max_new_tokens=evaluation.max_new_tokens)

    def answer(label: str) -> list[Answer]:
        return generate_answers(
            model,
            prompts,
            images=images,
            prompter=prompter,
            settings=settings,
            batch_size=evaluation.batch_size,
            reporter=reporter,
            label=label,
            should_stop=should_stop,
            processes=processes,
        )

    adapter = answer("answer with adapter")
    with model.disable_adapter():
        base = answer("answer without")
    return [
        {
            "prompt": prompter.decode(prompter.fold(prompt, shown)),
            **images_of(shown),
            "reference": prompter.decode(reference),
            "base_output": b.text,
            "adapter_output": a.text,
            "base_stopped": b.stopped,
            "adapter_stopped": a.stopped,
        }
        for (prompt, reference), shown, a, b in zip(pairs, images, adapter, base, strict=True)
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
