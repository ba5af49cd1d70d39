"""A sweep: one configuration trained at several points of a space, each a run folder, one table.

Owns `sweep.json`, the order of runs and what is said of the best. The same command again goes on: complete runs are
kept, one that was killed goes on from its checkpoint.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loralab.config.load import LoadedConfig, dump_config, load_config
from loralab.config.metric_facts import figure_name
from loralab.errors import ConfigError, RunFolderError, StoppedBySignal, StorageError, UserError
from loralab.progress import Reporter
from loralab.reports.sweep_page import write_sweep_page
from loralab.reports.sweep_reading import read_sweep
from loralab.run import RunFolder, read_json, write_json, write_text
from loralab.workflows.configure import load_run_config
from loralab.workflows.output import LOCK, has_begun, locked
from loralab.workflows.sweep_checks import check_alone, check_axes, check_base, check_points, comparable, direction
from loralab.workflows.sweep_runs import Stop, is_complete, passing_signals, read_result, run_process, was_stopped
from loralab.workflows.sweep_space import Point, grid_points, random_points, read_space

MANIFEST = "sweep.json"


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
        output: folder of the sweep, or None for sweeps/<name of the configuration file>, or of
            its folder where it is config.yaml, as in a run.
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
        """Write configuration, manifest and page.

        Raises:
            StorageError: they cannot be written.
        """
        try:
            write_text(self.config, dump_config(self.base.config))
            write_json(self.folder / MANIFEST, self.content)
            write_sweep_page(self.folder, self.content)
        except OSError as error:
            raise StorageError(
                f"cannot write to {str(self.folder)!r}: {error.strerror}",
                where="option --output",
                fix="make room or allow yourself to write there; the same command goes on",
            ) from None


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
        StorageError: the folder cannot be written.
        StoppedBySignal: SIGINT or SIGTERM; the run under way has written a checkpoint.
    """
    found = _prepare(search, reporter)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_claim(found.folder))
        except RunFolderError as error:
            what, fix = error.problems[0].what, "wait for it or stop it (its run writes a checkpoint), or name another"
            raise RunFolderError(what, where="option --output", fix=fix) from None
        _take_up(found)
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
    """Check that every run of a sweep came to its end.

    Raises:
        UserError: one did not.
    """
    lacking = [entry for entry in result["runs"] if entry["status"] != "completed"]
    if not lacking:
        return
    failed = any(entry["status"] == "failed" for entry in lacking)
    fix = "the same command with --retry-failed runs them again" if failed else "the same command goes on with them"
    raise UserError(
        f"{len(lacking)} of {len(result['runs'])} runs have no result: {lacking[0]['name']}: {lacking[0]['reason']}",
        where=str(Path(result["folder"]) / "logs"),
        fix=f"read the logs there; {fix}",
    )


def _prepare(search: Search, reporter: Reporter) -> _Sweep:
    """Read the space and check every point, before anything is written."""
    check_alone()
    axes, overrides = read_space(search.grid, search.given)
    check_axes(axes, overrides)
    base = load_run_config(search.config, overrides)
    check_base(base.config, axes)
    points = grid_points(axes) if search.random is None else random_points(axes, search.random, seed=search.seed)
    figure = figure_name(search.metric)
    check_points(points, [_load_point(search, overrides, point) for point in points], search.metric)
    settings = comparable(base.config)
    content: dict[str, Any] = {
        "metric": figure,
        "split": "validation",
        "mode": direction(search.metric, search.mode),
        "search": "grid" if search.random is None else "random",
        "seed": None if search.random is None else search.seed,
        "space": {axis.key: str(axis) for axis in axes},
        "config_sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "config": settings,
    }
    folder = (search.output or Path("sweeps") / _own_name(search.config, base)).expanduser()
    if base.config.output.dir is not None:
        reporter.say(f"output.dir of {search.config} is not used: the runs go to {folder}")
    return _Sweep(folder, base, points, content)


def _own_name(path: Path, base: LoadedConfig) -> str:
    """Return what a sweep is called: as its configuration's file, or as the folder of a run whose file has no name."""
    return base.name if base.name != "config" else path.expanduser().absolute().parent.name or base.name


def _load_point(search: Search, overrides: Sequence[str], point: Point) -> LoadedConfig | ConfigError:
    try:
        return load_run_config(search.config, [*overrides, *point.overrides])
    except ConfigError as error:
        return error


def _claim(folder: Path) -> AbstractContextManager[str]:
    """Make the folder of a sweep, and return what keeps other processes out of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot make {str(folder)!r}: {error.strerror}", where="option --output", fix="name another folder"
        ) from None
    return locked(folder / LOCK, note="")


def _take_up(found: _Sweep) -> None:
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


def _pin(found: _Sweep) -> None:
    """Name the commits that the first run took: runs stand side by side, whatever the Hub's branches are by now."""
    folders = [RunFolder(found.folder / point.name) for point in found.points]
    first = next((each for each in folders if has_begun(each) and each.config.is_file()), None)
    if first is None:
        return
    pins, took = read_json(first.record).get("revisions", {}), load_config(first.config).config
    base, varied = found.base.config, set(found.content["space"])
    model, data = base.model, base.data
    if pins.get("model") and not varied & {"model.name", "model.revision"}:
        model = model.model_copy(update={"revision": took.model.revision})
    if pins.get("data"):
        keys = [key for key in ("train", "validation", "test") if f"data.{key}" not in varied]
        data = data.model_copy(update={key: getattr(took.data, key) for key in keys})
    found.base = replace(found.base, config=base.model_copy(update={"model": model, "data": data}))


def _settle(found: _Sweep, point: Point, entry: dict[str, Any], *, retry: bool, stop: Stop, reporter: Reporter) -> None:
    """Bring one run to its end, and its entry up to date."""
    folder = RunFolder(found.folder / point.name)
    reason = ""
    if not is_complete(folder):
        if entry["status"] == "failed" and not retry:
            reporter.say(f"{point}: failed before ({entry['reason']}); --retry-failed runs it again")
            return
        _pin(found)
        entry |= {"status": "running", "reason": f"begun {datetime.now(UTC).isoformat(timespec='seconds')}"}
        found.save()
        reporter.say(f"{point} of {len(found.points)}")
        overrides = [*point.overrides, "evaluation.split=validation"]
        log = found.folder / "logs" / f"{point.name}.log"
        code, reason = run_process(folder, found.config, overrides, log=log, stop=stop, reporter=reporter)
        if code != 0 and not is_complete(folder):
            interrupted = stop.number is not None or was_stopped(code)
            entry |= {"status": "interrupted" if interrupted else "failed", "reason": reason}
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
