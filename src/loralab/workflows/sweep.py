"""A sweep: one configuration trained at several points of a space, each a run folder, one table.

Owns `sweep.json`, the order of runs and what is said of the best. The same command again goes on: complete runs are
kept, one that was killed goes on from its checkpoint.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loralab.config.load import LoadedConfig, dump_config
from loralab.config.metric_checks import asked_metrics
from loralab.config.metric_facts import ALWAYS, better_of, figure_name, is_outside, owner_of
from loralab.config.schema import Config
from loralab.errors import ConfigError, Problem, RunFolderError, StoppedBySignal, UserError
from loralab.lookup import suggest
from loralab.progress import Reporter
from loralab.reports.sweep_page import write_sweep_page
from loralab.reports.sweep_reading import read_sweep
from loralab.run import RunFolder, read_json, write_json, write_text
from loralab.workflows.configure import load_run_config
from loralab.workflows.output import LOCK, locked
from loralab.workflows.sweep_runs import Stop, is_complete, passing_signals, read_result, run_process
from loralab.workflows.sweep_space import Axis, Point, grid_points, random_points, read_space

MANIFEST = "sweep.json"
# What decides which rows the metric is measured on, or where a run goes: the same for all runs.
_FIXED = ("data.validation", "data.test", "data.split_seed", "data.split_method", "evaluation.split", "output.dir")
# Where a configuration says the same of every machine and folder, it is the same sweep's.
_PLACES = ("output", "cache_dir", "num_workers")
# Figures of every evaluation.
_ALWAYS_MEASURED = {*ALWAYS, "token_accuracy"} - {"loss"}


@dataclass(frozen=True, slots=True)
class Search:
    """What a sweep looks for, and where.

    Attributes:
        config: the configuration file.
        grid: `KEY=V1,V2` of the option.
        given: further arguments, overrides or settings that vary.
        random: points to draw, or None for the whole grid.
        seed: of the drawing.
        metric: the figure of the final evaluation that decides.
        mode: "min", "max", or None where the figure itself says it.
        output: folder of the sweep, or None for sweeps/<name of the configuration file>.
        retry_failed: run those again that failed before.
    """

    config: Path
    grid: Sequence[str] = ()
    given: Sequence[str] = ()
    random: int | None = None
    seed: int = 0
    metric: str = "eval_loss"
    mode: str | None = None
    output: Path | None = None
    retry_failed: bool = False


@dataclass
class _Sweep:
    """A sweep that is checked.

    Attributes:
        folder: where it goes.
        base: the configuration without the points.
        points: what is trained.
        content: of `sweep.json`.
    """

    folder: Path
    base: LoadedConfig
    points: list[Point]
    content: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        """The configuration that every run is trained with, besides its point."""
        return self.folder / f"{self.base.name}.yaml"

    def save(self) -> None:
        """Write manifest and page."""
        write_json(self.folder / MANIFEST, self.content)
        write_sweep_page(self.folder, self.content)


def sweep(search: Search, *, reporter: Reporter) -> dict[str, Any]:
    """Train every point of a space, or go on with it.

    Args:
        search: what to look for, and where.
        reporter: told of progress.

    Returns:
        The content of `sweep.json`, with what can be said of the best run under "reading".

    Raises:
        ConfigError: a point cannot be trained, or the metric is not measured.
        RunFolderError: the folder holds another sweep.
        StoppedBySignal: SIGINT or SIGTERM; the run under way has written a checkpoint.
    """
    found = _prepare(search)
    with contextlib.ExitStack() as stack:
        found.folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(found.folder / LOCK, note=""))
        _take_up(found, search)
        write_text(found.config, dump_config(found.base.config))
        found.save()
        stop = stack.enter_context(passing_signals(reporter))
        for point, entry in zip(found.points, found.content["runs"], strict=True):
            _settle(found, point, entry, retry=search.retry_failed, stop=stop, reporter=reporter)
            if stop.number is not None:
                raise StoppedBySignal(
                    stop.number, where=str(found.folder), fix="go on with the same command; nothing is trained twice"
                )
    return found.content | {"folder": str(found.folder), "reading": read_sweep(found.content)}


def check_all_completed(result: dict[str, Any]) -> None:
    """Check that no run of a sweep failed.

    Raises:
        UserError: one did.
    """
    failed = [entry for entry in result["runs"] if entry["status"] != "completed"]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(result['runs'])} runs failed: {failed[0]['name']}: {failed[0]['reason']}",
            where=str(Path(result["folder"]) / "logs"),
            fix="read the logs there; the same command with --retry-failed runs them again",
        )


def _prepare(search: Search) -> _Sweep:
    """Read the space and check every point, before anything is written."""
    axes, overrides = read_space(search.grid, search.given)
    _check_axes(axes, overrides)
    base = load_run_config(search.config, overrides)
    points = grid_points(axes) if search.random is None else random_points(axes, search.random, seed=search.seed)
    figure = figure_name(search.metric)
    problems: dict[tuple[str, str], Problem] = {}
    for point in points:
        for problem in _point_problems(search, overrides, point, figure):
            problems.setdefault((problem.what, problem.fix), problem)
    if problems:
        raise ConfigError.from_problems(list(problems.values()))
    better = better_of(figure)
    if search.mode is None and better is None:
        what = f"neither direction of {search.metric!r} is better by itself"
        raise ConfigError(what, where="option --metric", fix="say it with --mode min or --mode max")
    content: dict[str, Any] = {
        "metric": figure,
        "split": "validation",
        "mode": search.mode or {"lower": "min", "higher": "max"}[str(better)],
        "search": "grid" if search.random is None else "random",
        "seed": None if search.random is None else search.seed,
        "space": {axis.key: str(axis) for axis in axes},
        "config_sha256": hashlib.sha256(json.dumps(_comparable(base.config), sort_keys=True).encode()).hexdigest(),
        "config": _comparable(base.config),
    }
    folder = search.output or Path("sweeps") / base.name
    return _Sweep(folder.expanduser(), base, points, content)


def _check_axes(axes: Sequence[Axis], overrides: Sequence[str]) -> None:
    for axis in axes:
        if axis.key in _FIXED or axis.key.startswith("output."):
            what = f"{axis.key} cannot vary: all runs are measured on the same rows, each in a folder of its own"
            raise ConfigError(what, where="option --grid", fix="leave it out of the space")
    if any(text.partition("=")[0].strip() == "output.dir" for text in overrides):
        raise ConfigError("output.dir of a sweep", where="command line", fix="name its folder with --output")


def _point_problems(search: Search, overrides: Sequence[str], point: Point, figure: str) -> list[Problem]:
    try:
        config = load_run_config(search.config, [*overrides, *point.overrides]).config
    except ConfigError as error:
        return [Problem(each.what, f"{point}: {each.where}", each.fix) for each in error.problems]
    return [Problem(each.what, f"{point}: {each.where}", each.fix) for each in _metric_problems(config, figure)]


def _metric_problems(config: Config, figure: str) -> list[Problem]:
    problems = []
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
        problems.append(Problem(f"no run measures {figure!r}", "option --metric", fix))
    else:
        fix = suggest(figure, sorted(_ALWAYS_MEASURED))
        problems.append(Problem(f"no such figure: {figure!r}", "option --metric", fix))
    return problems


def _comparable(config: Config) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    return {
        section: {key: value for key, value in fields.items() if key not in _PLACES}
        for section, fields in values.items()
        if section not in _PLACES
    }


def _take_up(found: _Sweep, search: Search) -> None:
    """Go on with the sweep that the folder holds; refuse another one."""
    path, content = found.folder / MANIFEST, found.content
    old: dict[str, Any] = {}
    if path.is_file():
        old = read_json(path)
        differing = _differing(old, content)
        known = [entry["settings"] for entry in old["runs"]]
        if not differing and known != [point.settings for point in found.points][: len(known)]:
            differing = ["the points are others"]
        if differing:
            raise RunFolderError(
                f"the folder holds another sweep: {'; '.join(differing)}",
                where=str(found.folder),
                fix="name another folder with --output",
            )
    elif any(each.name != LOCK for each in found.folder.iterdir()):
        raise RunFolderError(
            f"the folder is not empty and holds no sweep: {str(found.folder)!r}",
            where="option --output",
            fix="name an empty or new folder; nothing there was touched",
        )
    before = {entry["name"]: entry for entry in old.get("runs", ())}
    content["runs"] = [
        before.get(point.name)
        or {"number": point.number, "name": point.name, "settings": point.settings, "status": "pending", "reason": ""}
        for point in found.points
    ]


def _differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    found = [
        f"{key} was {old.get(key)!r}, now {new[key]!r}"
        for key in ("search", "seed", "space")
        if old.get(key) != new[key]
    ]
    before = old.get("config", {})
    return found + [
        f"{section}.{key} was {before.get(section, {}).get(key)!r}, now {value!r}"
        for section, fields in new["config"].items()
        for key, value in fields.items()
        if before.get(section, {}).get(key) != value
    ]


def _settle(found: _Sweep, point: Point, entry: dict[str, Any], *, retry: bool, stop: Stop, reporter: Reporter) -> None:
    """Bring one run to its end, and its entry up to date."""
    folder = RunFolder(found.folder / point.name)
    if entry["status"] == "failed" and not retry:
        reporter.say(f"{point}: failed before ({entry['reason']}); --retry-failed runs it again")
        return
    reason = ""
    if not is_complete(folder):
        entry |= {"status": "running", "reason": ""}
        found.save()
        reporter.say(f"{point} of {len(found.points)}")
        overrides = [*point.overrides, "evaluation.split=validation"]
        log = found.folder / "logs" / f"{point.name}.log"
        code, reason = run_process(folder, found.config, overrides, log=log, stop=stop, reporter=reporter)
        if code != 0 and not is_complete(folder):
            entry |= {"status": "interrupted" if stop.number is not None else "failed", "reason": reason}
            reporter.say(f"{point}: {entry['status']}: {reason}")
            found.save()
            return
    result = read_result(folder, found.content["metric"])
    lacking = result["metric"] is None
    entry |= result | {
        "status": "failed" if lacking else "completed",
        "reason": f"evaluation.json has no {found.content['metric']}" if lacking else "",
    }
    found.save()
