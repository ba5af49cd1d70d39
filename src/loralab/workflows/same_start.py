"""Whether all processes of a run train the same: settings, code, data and model.

Owns what is compared, and the words in which a difference is refused. Machines that differ would wait for each other in
different places, or add gradients of different runs.
"""

import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

from loralab.config.schema import Config
from loralab.errors import ConfigError
from loralab.training.distributed import Processes
from loralab.workflows.resume import contract_changes, resume_contract
from loralab.workflows.steps import Run

# Before either value of what differs.
_WORDS = (" is ", ", there ")
# Other versions of these may compute something else, or speak to each other differently.
_CODE = ("loralab", "torch", "transformers", "peft", "accelerate")


def check_same_settings(config: Config, processes: Processes) -> None:
    """Check that all processes were started with one configuration and have the same code.

    Args:
        config: of this process.
        processes: those that share the run.

    Raises:
        ConfigError: one differs; in all processes alike.
    """
    settings = {
        f"{section}.{key}": value
        for section, values in config.model_dump(mode="json").items()
        for key, value in values.items()
    }
    code = {f"version of {name}": importlib.metadata.version(name) for name in _CODE}
    _compare(
        {**settings, **code},
        processes,
        changes_of=_differences,
        fix="give all machines the same configuration and the same versions",
    )


def agree_on_contract(run: Run) -> dict[str, Any]:
    """Return what a resume of a run must find unchanged, once all its processes have found the same.

    Args:
        run: before its first step.

    Raises:
        ConfigError: one has other data, another model or made other choices; in all processes alike.
    """
    contract = resume_contract(run.config, data=run.data, choices=run.choices, device=run.device, model=run.base_facts)
    contract["processes"] = run.processes.count
    check_same_contract(contract, run.processes)
    return contract


def check_same_contract(contract: Mapping[str, Any], processes: Processes) -> None:
    """Check that all processes found the same data and model, and made the same choices.

    Args:
        contract: what a resume of this process would have to find unchanged.
        processes: those that share the run.

    Raises:
        ConfigError: one differs; in all processes alike.
    """
    _compare(
        contract,
        processes,
        changes_of=lambda first, other: contract_changes(first, other, words=_WORDS),
        fix="give all machines the same files, and GPUs of one kind",
    )


def _compare(
    own: Mapping[str, Any],
    processes: Processes,
    *,
    changes_of: Callable[[Mapping[str, Any], Mapping[str, Any]], list[str]],
    fix: str,
) -> None:
    first, *others = processes.gather(own)
    for rank, other in enumerate(others, start=1):
        changes = changes_of(first, other)
        if changes:
            raise ConfigError(
                f"process {rank} would train something else than process 0: {'; '.join(changes)}",
                where=f"process {rank} of {processes.count}",
                fix=fix,
            )


def _differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}{_WORDS[0]}{first.get(key)!r}{_WORDS[1]}{other.get(key)!r}"
        for key in {**first, **other}
        if first.get(key) != other.get(key)
    ]
