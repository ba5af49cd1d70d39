"""What a sweep refuses before anything is written: points that cannot be trained, or cannot be compared."""

import json
import os
from collections.abc import Sequence
from typing import Any

from loralab.config.load import LoadedConfig
from loralab.config.metric_checks import asked_metrics
from loralab.config.metric_facts import ALWAYS, FACTS, better_of, figure_name, is_outside, owner_of
from loralab.config.schema import Config
from loralab.errors import ConfigError, Problem
from loralab.lookup import suggest
from loralab.workflows.sweep_space import Axis, Point

# What decides which rows the metric is measured on: the same for all runs.
_FIXED = ("data.validation", "data.test", "data.split_seed", "data.split_method", "evaluation.split")
# Where a configuration says the same of every machine and folder, it is the same sweep's.
_PLACES = ("output", "cache_dir", "num_workers")
# Figures of every evaluation.
_ALWAYS_MEASURED = {*ALWAYS, "token_accuracy"} - {"loss"}


def check_alone() -> None:
    """Check that the sweep is no process of a launcher: every one of them would train all runs.

    Raises:
        ConfigError: it is.
    """
    here = os.environ.get("WORLD_SIZE") or "1"
    if here != "1":
        raise ConfigError(
            f"the sweep was started as one of {here} processes, and each of its runs is one process",
            where="environment variable WORLD_SIZE",
            fix="start loralab sweep alone, without a launcher",
        )


def check_axes(axes: Sequence[Axis], overrides: Sequence[str]) -> None:
    """Check that what varies may vary.

    Args:
        axes: what varies.
        overrides: what holds for every run.

    Raises:
        ConfigError: a setting belongs to the sweep as a whole.
    """
    for axis in axes:
        if axis.key in _FIXED or axis.key.partition(".")[0] == "output":
            what = f"{axis.key} cannot vary: all runs are measured on the same rows, each in a folder of its own"
            raise ConfigError(what, where="option --grid", fix="leave it out of the space")
    if any(text.partition("=")[0].strip() == "output.dir" for text in overrides):
        what = "output.dir is one folder, and each run of a sweep has its own"
        raise ConfigError(what, where="command line", fix="name the sweep's folder with --output")


def check_base(config: Config, axes: Sequence[Axis]) -> None:
    """Check that runs of a configuration can stand side by side.

    Args:
        config: without the points.
        axes: what varies.

    Raises:
        ConfigError: all would push to one repository, or their validation rows would differ.
    """
    repo = config.output.hub.repo
    if repo is not None and "{run}" not in repo:
        raise ConfigError(
            f"all runs would push to one repository: {repo!r}",
            where="key output.hub.repo",
            fix="put {run} into its name, or leave it out and push the best run with: loralab push RUN",
        )
    drawn = isinstance(config.data.validation, (int, float))
    if drawn and any(axis.key == "data.train" for axis in axes):
        raise ConfigError(
            "data.train varies, and the validation rows are drawn from it: runs would be measured on different rows",
            where="key data.validation",
            fix="set data.validation to a file",
        )


def direction(metric: str, mode: str | None) -> str:
    """Return "min" or "max".

    Args:
        metric: option --metric.
        mode: option --mode, or None.

    Raises:
        ConfigError: neither is better by itself, and --mode does not say it.
    """
    known = {"lower": "min", "higher": "max"}.get(str(better_of(figure_name(metric))))
    if mode is None and known is None:
        what = f"neither direction of {metric!r} is better by itself"
        raise ConfigError(what, where="option --metric", fix="say it with --mode min or --mode max")
    return mode or str(known)


def check_points(points: Sequence[Point], configs: Sequence[LoadedConfig | ConfigError], metric: str) -> None:
    """Check that every point can be trained, measures the metric, and is not another one written otherwise.

    Args:
        points: of the space.
        configs: the configuration of each, or what is wrong with it.
        metric: option --metric.

    Raises:
        ConfigError: one cannot; each mistake is told once, with the first point that has it.
    """
    problems: dict[tuple[str, str], Problem] = {}
    seen: dict[str, Point] = {}
    for point, loaded in zip(points, configs, strict=True):
        found = loaded.problems if isinstance(loaded, ConfigError) else _metric_problems(loaded.config, metric)
        for each in found:
            fix = _as_values(point, each) or each.fix
            problems.setdefault((each.what, fix), Problem(each.what, f"{point}: {each.where}", fix))
        if isinstance(loaded, LoadedConfig):
            first = seen.setdefault(json.dumps(comparable(loaded.config), sort_keys=True), point)
            if first is not point:
                what = f"{point} is the same as {first}"
                problems.setdefault((what, ""), Problem(what, "option --grid", "give each value once"))
    if problems:
        raise ConfigError.from_problems(list(problems.values()))


def _as_values(point: Point, problem: Problem) -> str | None:
    """Return how values are written that were given as a list in brackets, where that list is the problem."""
    for key, value in point.settings.items():
        if value.startswith("[") and value.endswith("]") and problem.where.endswith(f"key {key}"):
            return f"write {key}={','.join(part.strip() for part in value[1:-1].split(','))}"
    return None


def _metric_problems(config: Config, metric: str) -> list[Problem]:
    problems, figure = [], figure_name(metric)
    if config.data.validation is None:
        fix = "set data.validation: 0.1, a number of rows or a file"
        problems.append(Problem("a sweep chooses by the validation split, and there is none", "data.validation", fix))
    if config.evaluation.split not in ("auto", "validation"):
        what = f"the final evaluation is on the {config.evaluation.split} split: a sweep must not choose by it"
        fix = "add evaluation.split=validation, and measure the best run on test with: loralab eval RUN --split test"
        problems.append(Problem(what, "evaluation.split", fix))
    named = asked_metrics(config.evaluation)
    owner = owner_of(figure)
    if figure in _ALWAYS_MEASURED or owner in named or (owner is None and any(map(is_outside, named))):
        return problems
    if owner is not None:
        fix = f"add evaluation.metrics=[{owner}]"
        problems.append(Problem(f"no run measures {metric!r}", "option --metric", fix))
    else:
        measured = [name for each in named if each in FACTS for name in FACTS[each].figures]
        fix = suggest(metric, dict.fromkeys([*sorted(_ALWAYS_MEASURED), *measured]))
        problems.append(Problem(f"no such figure: {metric!r}", "option --metric", fix))
    return problems


def comparable(config: Config) -> dict[str, Any]:
    """Return the settings that tell one sweep, or one point, from another."""
    values = config.model_dump(mode="json")
    return {
        section: {key: value for key, value in fields.items() if key not in _PLACES}
        for section, fields in values.items()
        if section not in _PLACES
    }
