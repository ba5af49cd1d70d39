"""What the files of one run folder say, read leniently.

Owns what a missing file or key means to a report: nothing is known, so nothing is said. Does
not own wording; a file that is there but broken is still an error.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loralab.errors import RunFolderError
from loralab.run import Json, RunFolder, read_json, read_metrics

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Facts:
    """The content of a run folder; a part whose file is missing is empty.

    Attributes:
        folder: where it was read from.
        record: `run.json`.
        config: `config.yaml`, by section.
        data: `data.json`.
        evaluation: `evaluation.json`.
        samples: `samples.json`.
        comparison: `comparison.json`.
        preference: `preference.json`.
        metrics: the lines of `metrics.jsonl`.
    """

    folder: RunFolder
    record: Json
    config: Json
    data: Json
    evaluation: Json
    samples: Json
    comparison: Json
    preference: Json
    metrics: list[Json]

    @property
    def name(self) -> str:
        """The name of the run; the folder's name where the run has none."""
        return str(self.record.get("name") or self.folder.path.resolve().name)

    @property
    def base_model(self) -> str | None:
        """The base model as the run or its configuration names it."""
        name = dig(self.record, "model", "name") or dig(self.config, "model", "name")
        return str(name) if name else None


def load_facts(folder: RunFolder) -> Facts:
    """Read all files of a run that reports are made from.

    Raises:
        RunFolderError: a file is there but broken.
    """
    return Facts(
        folder=folder,
        record=_read(folder.record, read_json),
        config=_read(folder.config, read_yaml),
        data=_read(folder.data, read_json),
        evaluation=_read(folder.evaluation, read_json),
        samples=_read(folder.samples, read_json),
        comparison=_read(folder.comparison, read_json),
        preference=_read(folder.preference, read_json),
        metrics=read_metrics(folder.metrics),
    )


def _read(path: Path, read: Callable[[Path], Json]) -> Json:
    return read(path) if path.is_file() else {}


def read_yaml(path: Path) -> Json:
    """Read a YAML mapping; an empty file is an empty mapping.

    Raises:
        RunFolderError: the file holds no YAML mapping.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = f"not valid YAML: {error}"
    else:
        if value is None or isinstance(value, dict):
            return value or {}
        what = f"expected a YAML mapping, got {type(value).__name__}"
    raise RunFolderError(what, where=str(path), fix="restore the file from a backup")


def dig(value: Any, *keys: str) -> Any:
    """Return `value[key][key]...`, or None where a level is missing or no mapping."""
    for key in keys:
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def dig_table(value: Any, *keys: str) -> Json:
    """Return the mapping at `keys`, empty where there is none."""
    found = dig(value, *keys)
    return found if isinstance(found, dict) else {}


def dig_list(value: Any, *keys: str) -> list[Any]:
    """Return the list at `keys`; a single value is a list of one, a missing one is empty."""
    found = dig(value, *keys)
    if found is None:
        return []
    return found if isinstance(found, list) else [found]


def dig_number(value: Any, *keys: str) -> float | None:
    """Return the finite number at `keys`, or None: nan and infinity cannot be drawn or compared."""
    found = dig(value, *keys)
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    return found if math.isfinite(found) else None


def early_end(facts: Facts) -> str:
    """Return why training ended before its last step; empty where it took all steps, or does not say.

    Records of earlier versions give a reason though the last step was just taken.
    """
    why = str(facts.record.get("stopped_because") or "")
    return "" if facts.record.get("status") == "completed" and _took_all_steps(facts) else why


def _took_all_steps(facts: Facts) -> bool:
    training = dig_table(facts.config, "training")
    planned, steps = dig_number(training, "max_steps"), dig_number(facts.record, "steps")
    if planned is not None:
        return steps is not None and steps >= planned
    epochs, planned_epochs = dig_number(facts.record, "epochs"), dig_number(training, "num_train_epochs")
    # The record rounds the epochs to six digits.
    return epochs is not None and planned_epochs is not None and epochs >= planned_epochs - 1e-5


def own_parameters(facts: Facts) -> float | None:
    """Return the number of the base's own parameters, without those of the adapter."""
    model = dig_table(facts.record, "model")
    base, whole, trained = (dig_number(model, key) for key in ("base_parameters", "parameters", "trainable_parameters"))
    return base if base is not None or whole is None else whole - (trained or 0)


def flatten_config(config: Json, origin: Json) -> dict[str, Any]:
    """Return the values of a configuration by dotted key.

    Args:
        config: sections, as in `config.yaml`.
        origin: `run.json:origin`; a mapping that has an origin of its own is one value.
    """
    flat: dict[str, Any] = {}
    pending = list(reversed(config.items()))
    while pending:
        key, value = pending.pop()
        is_group = isinstance(value, dict) and bool(value) and key not in origin
        if is_group:
            pending += [(f"{key}.{name}", child) for name, child in reversed(value.items())]
        else:
            flat[str(key)] = value
    return flat
