"""What to change where a run does not fit into memory: the cheapest change first, each with its peak.

Owns the list of changes and their order. Each is predicted as the run itself is, on its fullest step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loralab.config.checks import check_config
from loralab.config.schema import Config
from loralab.data.example import Branch, TokenizedExample
from loralab.layout.planner import Planner
from loralab.training.distributed import ALONE, Processes
from loralab.workflows.step_layout import sketch_blueprint
from loralab.workflows.step_memory import StepMeter, needed_bytes, predict_memory

_SMALLEST_BUDGET = 256
_SMALLEST_LENGTH = 128
_SMALLEST_RANK = 4


@dataclass(frozen=True, slots=True)
class Situation:
    """The run that does not fit.

    Attributes:
        config: the configuration, tokens by id, `gradient_checkpointing` chosen.
        examples: rows of the fullest step.
        planner: how it is laid out.
        device: where the run computes.
        dtype: compute type.
        data_bytes: what tokenizer and rows take.
        processes: those that share the run.
    """

    config: Config
    examples: Sequence[TokenizedExample]
    planner: Planner
    device: torch.device
    dtype: torch.dtype
    data_bytes: int
    processes: Processes = ALONE


@dataclass(frozen=True, slots=True)
class Change:
    """One setting that takes less memory.

    Attributes:
        key: the setting.
        value: its new value.
        costs: what that costs.
    """

    key: str
    value: Any
    costs: str


def advise(situation: Situation, *, free: int) -> list[dict[str, Any]]:
    """Return changes, each on top of those before it, up to the first that fits.

    Args:
        situation: the run.
        free: bytes that are free.

    Returns:
        `set`, `needed_bytes`, `fits` and `costs` of each.
    """
    config = situation.config
    found: list[dict[str, Any]] = []
    for propose in CHANGES:
        for change in propose(config, situation):
            section, field = change.key.split(".")
            part = getattr(config, section).model_copy(update={field: change.value})
            tried = config.model_copy(update={section: part})
            needed = None if check_config(tried) else _needed(tried, situation)
            if needed is None:
                continue
            config = tried
            fits = needed <= free
            found.append(
                {"set": f"{change.key}={change.value}", "needed_bytes": needed, "fits": fits, "costs": change.costs}
            )
            if fits:
                return found
    return found


def _needed(config: Config, situation: Situation) -> int | None:
    blueprint = sketch_blueprint(config, config.lora, dtype=situation.dtype, device=situation.device)
    if isinstance(blueprint, str):
        return None
    budget = config.training.token_budget
    planner = situation.planner.with_budget(budget) if isinstance(budget, int) else situation.planner
    examples = [_cut(example, config.data.max_length) for example in situation.examples]
    largest = max(planner(examples).micro_batches, key=lambda batch: batch.input_ids.numel())
    meter = StepMeter(blueprint, planner.layout)
    memory = predict_memory(
        config, meter, batch=largest, data_bytes=situation.data_bytes, processes=situation.processes
    )
    return needed_bytes(memory)


def _cut(example: TokenizedExample, length: int) -> TokenizedExample:
    """Cut the answers of a row, and prompts that leave no room for one."""
    branches = []
    for branch in example.branches:
        prompt = branch.prompt_ids[: length - 1]
        branches.append(Branch(prompt, branch.answer_ids[: max(length - len(prompt), 1)]))
    return TokenizedExample(example.row, example.source, tuple(branches))


def _smaller_budget(config: Config, situation: Situation) -> Iterator[Change]:
    budget = min(situation.planner.token_budget, sum(_tokens(situation)))
    longest = max(_tokens(situation), default=0)
    while budget // 2 >= max(_SMALLEST_BUDGET, longest):  # a row is never cut
        budget = 1 << ((budget // 2).bit_length() - 1)
        yield Change("training.token_budget", budget, "nothing but a little speed: losses and gradients are the same")


def _tokens(situation: Situation) -> list[int]:
    return [len(b.prompt_ids) + len(b.answer_ids) - 1 for e in situation.examples for b in e.branches]


def _recompute(config: Config, _: Situation) -> Iterator[Change]:
    if config.training.gradient_checkpointing is not True:
        yield Change("training.gradient_checkpointing", True, "about a third more time; same losses and gradients")


def _quantize(config: Config, situation: Situation) -> Iterator[Change]:
    if config.model.quantization == "none" and situation.device.type in ("cpu", "cuda"):
        yield Change("model.quantization", "nf4", "a base that is changed by rounding, and time to dequantize it")


def _smaller_adapter(config: Config, _: Situation) -> Iterator[Change]:
    if config.lora.target_modules == "auto":
        yield Change("lora.target_modules", "attention", "an adapter in fewer layers")
    if config.lora.r > _SMALLEST_RANK:
        yield Change("lora.r", max(config.lora.r // 2, _SMALLEST_RANK), "an adapter of lower rank")


def _shorter_rows(config: Config, situation: Situation) -> Iterator[Change]:
    length = min(config.data.max_length, max(_tokens(situation), default=0) + 1)
    while length // 2 >= _SMALLEST_LENGTH:
        length //= 2
        yield Change("data.max_length", length, "the ends of longer rows are not seen")


Propose = Callable[[Config, Situation], Iterator[Change]]
# The cheapest first.
CHANGES: tuple[Propose, ...] = (_smaller_budget, _recompute, _quantize, _smaller_adapter, _shorter_rows)
